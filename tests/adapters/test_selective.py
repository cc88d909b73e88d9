"""Parameters trained as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import moved, parameters

import vlora_jax as vj
from vlora_jax.errors import ConfigError, TargetError


class Probed(nnx.Module):
    """A body with a norm, and a head."""

    def __init__(self, rngs):
        self.body, self.norm = nnx.Linear(4, 5, rngs=rngs), nnx.LayerNorm(5, rngs=rngs)
        self.head = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.norm(self.body(x))))


X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)


@pytest.mark.parametrize(
    ("full", "trained"),
    [
        ("head", {"head/kernel", "head/bias"}),
        (".*/bias", {"body/bias", "norm/bias", "head/bias"}),
        (["norm", "head/bias"], {"norm/scale", "norm/bias", "head/bias"}),
    ],
)
def test_what_full_names_starts_as_it_is_and_nothing_else_trains(full, trained):
    graphdef, base = parameters(Probed)
    adapter = vj.init(vj.Selective(full=full), jax.random.key(0), base)
    assert set(adapter.trainable["full"]) == trained
    assert vj.count(adapter) == sum(np.size(leaf) for leaf in adapter.trainable["full"].values())
    assert not adapter.sites
    np.testing.assert_array_equal(vj.apply(graphdef, base, adapter, X), vj.apply(graphdef, base, None, X))


def test_a_probe_s_gradient_is_that_of_a_linear_layer_on_the_frozen_features():
    """Of 0.5·Σ(h W + b)²: hᵀ(h W + b) to W, its column sums to b."""
    graphdef, base = parameters(Probed)
    probe = moved(vj.init(vj.Selective(full="head"), jax.random.key(0), base))
    loss = lambda trainable: 0.5 * (vj.apply(graphdef, base, probe.with_trainable(trainable), X) ** 2).sum()
    gradient = jax.jit(jax.grad(loss))(probe.trainable)["full"]
    body, full = nnx.merge(graphdef, base), probe.trainable["full"]
    h = np.tanh(np.asarray(body.norm(body.body(X))))
    out = h @ np.asarray(full["head/kernel"]) + np.asarray(full["head/bias"])
    np.testing.assert_allclose(gradient["head/kernel"], h.T @ out, atol=1e-5)
    np.testing.assert_allclose(gradient["head/bias"], out.sum(0), atol=1e-5)


def test_it_goes_beside_an_adapter_but_not_beside_itself():
    graphdef, base = parameters(Probed)
    probe = moved(vj.init(vj.Selective(full="head"), jax.random.key(0), base))
    lora = moved(vj.init(vj.LoRA(rank=2, targets="body"), jax.random.key(1), base))
    merged = vj.merge(base, probe, lora)
    np.testing.assert_allclose(
        vj.apply(graphdef, base, [probe, lora], X), vj.apply(graphdef, merged, None, X), atol=1e-5
    )
    with pytest.raises(ConfigError, match=r"two adapters train head/.* whole"):
        vj.merge(base, probe, probe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "full is empty, so that nothing would be trained"),
        ({"full": "head", "targets": "body"}, "it trains what full names"),
        ({"full": "head", "exclude": "body"}, "it trains what full names"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vj.Selective(**options)


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(TargetError, match=r"full 'heads' matches nothing; nearest: head/"):
        vj.init(vj.Selective(full="heads"), jax.random.key(0), parameters(Probed)[1])
