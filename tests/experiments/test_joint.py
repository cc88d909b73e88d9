"""Several runs in one form: what is filled up changes nothing, and optimisers keep their own numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import moved, parameters

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.experiments.joint import common, filled_up
from vlora_jax.training.optimizers import OptimizerConfig, chain, decayed, numbers_of, optimizer


class Two(nnx.Module):
    """Two layers, of which an adapter may change one."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


GRAPHDEF, BASE = parameters(Two)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 6)), jnp.float32)
KIN = {  # methods whose rank, scale and sites may differ within a program
    "lora": lambda **options: vj.LoRA(bias=True, **options),
    "rslora": lambda **options: vj.LoRA(rank_stabilised=True, start="kaiming_both", **options),
    "dora": lambda **options: vj.DoRA(**options),
    "pissa": lambda **options: vj.PiSSA(**options),
    "olora": lambda **options: vj.OLoRA(**options),
}


@jax.jit
def slopes(adapter):
    """Outputs, and the gradient of their square by what trains."""
    outputs = lambda trainable: vj.apply(GRAPHDEF, BASE, adapter.with_trainable(trainable), X)
    gradient = jax.grad(lambda trainable: (outputs(trainable) ** 2).sum())(adapter.trainable)
    return outputs(adapter.trainable), flatten(gradient)


@pytest.mark.parametrize("name", KIN)
def test_an_adapter_in_the_common_form_changes_and_learns_as_by_itself(name):
    make = KIN[name]
    small = moved(vj.init(make(rank=2, alpha=3.0, targets="second"), jax.random.key(0), BASE))
    large = vj.init(make(rank=4, alpha=8.0), jax.random.key(1), BASE)
    template, joined = common([small, large]), small.method.join(small)
    assert joined.method == large.method.join(large).method == template.method
    assert [site.path for site in template.sites] == ["second", "first"]
    parts = {}
    for part in ("trainable", "frozen"):
        own, shapes = flatten(getattr(joined, part)), flatten(getattr(template, part))
        leaves = [jnp.asarray(filled_up(own.get(path), like.shape, like.dtype)) for path, like in shapes.items()]
        parts[part] = jax.tree.unflatten(jax.tree.structure(getattr(template, part)), leaves)
    value, gradient = slopes(dataclasses.replace(template, **parts))
    expected, own = slopes(small)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    for path, leaf in gradient.items():
        room = np.array(leaf)
        if path in own:
            corner = tuple(slice(0, size) for size in own[path].shape)
            np.testing.assert_allclose(room[corner], own[path], rtol=1e-4, atol=1e-5, err_msg=path)
            room[corner] = 0
        assert not room.any(), path  # what fills up has no gradient: no clip, moment or decay ever sees it


def test_other_methods_share_a_form_only_with_their_equals():
    first, second = (vj.init(vj.LoHa(rank=rank), jax.random.key(0), BASE) for rank in (2, 3))
    assert first.method.joined() == first.method != second.method.joined()
    assert common([first, first]) is first


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_traced_numbers_update_like_those_of_a_config(name):
    adapter = vj.init(vj.LoRA(rank=2), jax.random.key(0), BASE)
    configs = [
        OptimizerConfig(name=name, rate=0.1, decay=0.2, clip=0.3, b1=0.5, groups={"first": 0.5}),
        OptimizerConfig(name=name, rate=0.1, decay=0.0, clip=None, b2=0.9, eps=1e-3),
    ]
    numbers = [numbers_of(config, adapter.trainable, adapter) for config in configs]
    stacked = jax.tree.map(lambda *values: jnp.asarray(values), *numbers)
    grads = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape)), adapter.trainable
    )
    params, decays = jax.tree.map(jnp.ones_like, grads), decayed(adapter.trainable, adapter)

    def twice(tx):
        state = tx.init(params)
        first, state = tx.update(grads, state, params)
        return tx.update(grads, state, optax.apply_updates(params, first))[0]

    found = jax.jit(jax.vmap(lambda own: twice(chain(name, lambda count: 0.1, own, decays))))(stacked)
    for place, config in enumerate(configs):
        plain = config.model_copy(update={"schedule": "constant", "warmup": 0})
        expected = flatten(jax.jit(lambda: twice(optimizer(plain, 10, adapter.trainable, adapter)))())
        for path, leaf in flatten(found).items():
            np.testing.assert_allclose(leaf[place], expected[path], rtol=2e-5, atol=1e-7, err_msg=path)
