"""Merged parameters against ΔW written out in NumPy."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, parameters, random_adapter
from third_party import Block, LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.method import Factors, SiteMethod
from vlora_jax.adapters.sites import Layout
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import BaseMismatchError, ConfigError, ConversionError

LORA = vj.LoRA(rank=2, alpha=3.0)


@pytest.fixture(scope="module")
def stacked():
    return parameters(LaxScanned)[1]


def by_hand(base, adapter):
    """Kernels of `LaxScanned` with LoRA's ΔW, each axis named: l layer, r rank."""
    sums = {"blocks/up": "lir,lro->lio", "blocks/mix": "lijr,lrpq->lijpq", "blocks/down": "lijr,lro->lijo"}
    merged = {}
    for site in adapter.sites:
        a, b = (np.asarray(adapter.factors(site.path)[name], np.float64) for name in "ab")
        a, b = a.reshape(3, *site.in_shape, 2), b.reshape(3, 2, *site.out_shape)
        delta = 3.0 / 2 * np.einsum(sums[site.path], a, b)
        merged[site.leaf_path] = flatten(base)[site.leaf_path] + delta
    return merged


def test_kernels_of_any_axes_take_their_change_layer_by_layer(stacked):
    adapter = random_adapter(LORA, stacked)
    merged, expected = flatten(jax.jit(vj.merge)(stacked, adapter)), by_hand(stacked, adapter)
    assert len(expected) == 3
    for path, leaf in flatten(stacked).items():
        if path in expected:
            close(merged[path], expected[path])
        else:
            np.testing.assert_array_equal(merged[path], leaf)


def test_output_axes_before_input_axes_are_kept_in_place():
    _, base = parameters(lambda rngs: nnx.Einsum("btd,ndh->btnh", (2, 4, 5), rngs=rngs))
    adapter = random_adapter(LORA, base)
    a, b = (np.asarray(adapter.factors("")[name]) for name in "ab")
    delta = 1.5 * np.einsum("dr,rnh->ndh", a, b.reshape(2, 2, 5))
    close(vj.merge(base, adapter)["kernel"].get_value(), base["kernel"].get_value() + delta)


def test_several_adapters_add_up_and_the_base_stays(stacked):
    before = jax.tree.map(np.array, stacked)
    first, second = random_adapter(LORA, stacked, 1), random_adapter(vj.Diagonal(targets="up"), stacked, 2)
    merge = jax.jit(vj.merge)
    at_once, in_turn = merge(stacked, first, second), merge(merge(stacked, first), second)
    jax.tree.map(close, at_once, in_turn)
    assert vj.find_sites(at_once) == vj.find_sites(stacked)
    jax.tree.map(np.testing.assert_array_equal, stacked, before)


def test_changes_are_added_in_float32_and_rounded_once():
    """Two changes to a bfloat16 one: each alone is lost, their sum is just above half the distance to its neighbour."""
    base = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    adapter = random_adapter(vj.Diagonal(), base)
    adapter = adapter.with_trainable(jax.tree.map(lambda d: jnp.full(d.shape, 2**-9 + 1e-7), adapter.trainable))
    assert vj.merge(base, adapter)["kernel"][0, 0] == 1.0
    merged = vj.merge(base, adapter, adapter)["kernel"]
    assert merged.dtype == jnp.bfloat16
    assert merged[0, 0] == 1 + 2**-7


def test_a_kernel_trained_whole_by_one_adapter_is_changed_by_another():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 5, rngs=rngs))
    whole = random_adapter(LORA, base, 1)
    value = jnp.asarray(np.random.default_rng(3).normal(size=(4, 5)), jnp.float32)
    whole = whole.with_trainable({"sites": {}, "shared": {}, "full": {"kernel": value}})
    whole = vj.Adapter(whole.trainable, whole.frozen, LORA, ())
    adapter = random_adapter(vj.Diagonal(), base, 2)
    expected = value + np.eye(4, 5) * np.append(adapter.factors("")["d"], 0)
    for pair in ((whole, adapter), (adapter, whole)):
        close(vj.merge(base, *pair)["kernel"].get_value(), expected)
        close(vj.bind(graphdef, base, *pair).kernel.get_value(), expected)


def test_a_parameter_trained_whole_twice_is_refused(stacked):
    adapter = random_adapter(vj.LoRA(rank=2, full="up/bias"), stacked)
    with pytest.raises(ConfigError, match="two adapters train blocks/up/bias whole"):
        vj.merge(stacked, adapter, adapter)


@pytest.mark.parametrize(
    ("method", "missing"),
    [(LORA, "blocks/down/kernel"), (vj.LoRA(rank=2, targets="out", full="up/bias"), "blocks/up/bias")],
)
def test_an_adapter_of_another_base_is_refused(stacked, method, missing):
    out = {"out": {"kernel": jnp.ones((4, 4))}}
    trained_on = {**stacked, **out} if method.full else stacked
    adapter = random_adapter(method, trained_on)
    with pytest.raises(BaseMismatchError, match=f"the adapter changes {missing}, which this base does not have"):
        vj.merge(out, adapter)


def test_a_vertical_base_is_refused():
    """Six layers that share two stored kernels have no kernel of their own to change."""
    kernel = nnx.Param(jnp.ones((2, 4, 5)), layout=Layout("dense", (0,), (1,), layers=6))
    base = nnx.State({"up": nnx.State({"kernel": kernel})})
    with pytest.raises(ConversionError, match=r"up/kernel stores \(2, 4, 5\) for 6 layers .* expand it to dense"):
        vj.merge(base, random_adapter(LORA, base))


def test_a_method_that_depends_on_the_input_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Gated(SiteMethod):
        name = "gated"

        def init_site(self, key, site, kernel):
            return Factors({"g": jnp.zeros(site.out_dim)})

        def forward(self, x, y, kernel, factors):
            return y * jnp.tanh(y @ factors["g"])[:, None]

    base = {"kernel": jnp.ones((4, 5))}
    with pytest.raises(ConversionError, match="gated depends on the input and cannot be merged"):
        vj.merge(base, random_adapter(Gated(), base))


def test_unstacked_layers_merge_like_one_layer_of_a_stack(stacked):
    """The last of the stacked layers, taken out with its share of the adapter."""
    adapter = random_adapter(LORA, stacked)
    _, alone = parameters(Block)
    last = lambda tree: jax.tree.map(lambda leaf: leaf[-1], tree)
    single = random_adapter(LORA, alone)
    sites = {path: adapter.factors(f"blocks/{path}") for path in single.trainable["sites"]}
    single = single.with_trainable({"sites": last(sites), "shared": {}, "full": {}})
    merge = jax.jit(vj.merge)
    jax.tree.map(close, merge(last(stacked["blocks"]), single), last(merge(stacked, adapter)["blocks"]))
