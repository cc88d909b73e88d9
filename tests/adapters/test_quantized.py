"""Kernels in fewer bits: their values, and everything that is done with a base on one that holds them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, filled, moved
from test_methods import small

import vlora_jax as vj
from vlora_jax.adapters.quantize import left_whole
from vlora_jax.adapters.quantized import NF4, encode, is_quantized, levels
from vlora_jax.adapters.registry import METHODS
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError
from vlora_jax.models.build import abstract_model
from vlora_jax.models.decoder import DecoderConfig

SIZES = {"width": 32, "heads": 2, "mlp_width": 96, "layers": 2, "vocabulary": 11}
TOKENS = jnp.asarray(np.random.default_rng(3).integers(0, 11, (2, 5)))
FORMS = ("int8", "nf4")
QUICK = {("lora", "int8"), *((name, "nf4") for name in ("lora", "dora", "vera", "ia3"))}


@functools.cache
def model(**options):
    graphdef, shapes = abstract_model(DecoderConfig(**SIZES | options))
    return graphdef, filled(shapes, 0)


def kernels(base):
    return {path: leaf for path, leaf in flatten(base).items() if is_quantized(leaf)}


def test_each_code_of_nf4_is_its_level():
    np.testing.assert_array_equal(levels(jnp.arange(16, dtype=jnp.uint8)), np.float32(NF4))


@pytest.mark.parametrize(("inputs", "block"), [(128, 64), (96, 32), (48, 16)])
def test_nf4_takes_the_nearest_level_of_the_block_s_largest_value(inputs, block):
    kernel = np.random.default_rng(0).normal(size=(3, inputs, 5)).astype(np.float32)
    kernel[1, :block] = 0
    held = encode(jnp.asarray(kernel), "nf4")
    assert (held.codes.dtype, held.codes.shape) == (jnp.uint8, (3, inputs // 2, 5)), "two codes a byte"
    blocks = kernel.reshape(3, -1, block, 5)
    largest = np.abs(blocks).max(axis=2, keepdims=True)
    choices = np.float32(NF4) * largest[..., None]
    nearest = np.take_along_axis(choices, np.abs(choices - blocks[..., None]).argmin(-1)[..., None], -1)[..., 0]
    np.testing.assert_allclose(held.values(), nearest.reshape(kernel.shape), rtol=1e-6)
    assert held.shape == kernel.shape
    assert held.size == kernel.size
    assert held.dtype == kernel.dtype


def test_int8_is_within_half_a_step_of_every_value():
    kernel = np.random.default_rng(1).normal(size=(2, 20, 7)).astype(np.float32)
    held = encode(jnp.asarray(kernel), "int8")
    assert held.codes.dtype == jnp.int8
    assert held.scale.shape == (2, 1, 7)
    np.testing.assert_allclose(held.scale[:, 0], np.abs(kernel).max(1) / 127.5, rtol=1e-6)
    assert (np.abs(np.asarray(held) - kernel) <= 0.5001 * np.asarray(held.scale)).all()


@pytest.mark.parametrize("form", FORMS)
def test_codes_follow_products_which_every_device_rounds_alike(form):
    """Quotients are rounded otherwise on GPUs: a run's base, quantised anew elsewhere, would be another one there."""
    largest = np.random.default_rng(4).uniform(0.5, 1, 64).astype(np.float32)
    steps = np.float32([(low + high) / 2 for low, high in itertools.pairwise(NF4)] if form == "nf4" else np.r_[-7:8])
    unit = largest if form == "nf4" else largest * np.float32(1 / 127.5)
    edge = (steps if form == "nf4" else steps + np.float32(0.5))[:, None] * unit
    below = encode(jnp.asarray(np.concatenate([largest[None], edge])), form).values()[1:]
    above = encode(jnp.asarray(np.concatenate([largest[None], np.nextafter(edge, np.inf)])), form).values()[1:]
    low, high = (np.float32(NF4)[:-1], np.float32(NF4)[1:]) if form == "nf4" else (steps, steps + 1)
    np.testing.assert_array_equal(below, low[:, None] * unit)
    np.testing.assert_array_equal(above, high[:, None] * unit)


def test_a_layer_of_a_kernel_is_that_layer_s():
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(3, 64, 4)), jnp.bfloat16)
    held = encode(kernel, "nf4")
    assert held.values().dtype == jnp.bfloat16
    np.testing.assert_array_equal(held[1].values(), held.values()[1])
    np.testing.assert_array_equal(encode(kernel[1], "nf4").values(), held.values()[1])


def test_kernels_of_layers_are_held_so_and_nothing_else():
    base = model()[1]
    held = vj.quantize(base, "nf4")
    assert list(flatten(held)) == list(flatten(base))
    assert vj.count(held) == vj.count(base)
    inside = {path for path in flatten(base) if path.startswith("layers/") and path.endswith("kernel")}
    assert set(kernels(held)) == inside
    assert len(inside) == 7
    assert vj.find_sites(held) == vj.find_sites(base)
    stored = sum(leaf.nbytes for path in inside for leaf in jax.tree.leaves(flatten(held)[path]))
    assert stored == sum(leaf.size for leaf in kernels(held).values()) * (1 / 2 + 4 / 32), "codes, and 32 to a scale"


def test_inputs_that_no_block_divides_stay_whole_and_are_named():
    base = model(mlp_width=40)[1]
    assert "layers/block/mlp/down/kernel" not in kernels(vj.quantize(base, "nf4"))
    assert left_whole(base, "nf4") == ["layers/block/mlp/down/kernel (40): no multiple of 16 inputs, not held as nf4"]
    assert left_whole(base, "int8") == []


@pytest.mark.parametrize(
    ("name", "form"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(METHODS, FORMS)
    ],
)
def test_a_method_does_on_codes_what_it_does_on_the_values_they_stand_for(name, form):
    """Start, change, gradient and merge; so that what is shown of a method on any base holds on this one."""
    if name in ("lorta", "bitfit"):
        pytest.skip("takes kernels of one size only, or biases, which this model has none of")
    graphdef, base = model()
    held = vj.quantize(base, form)
    values = vj.merge(held)
    assert not kernels(values)
    own_targets = METHODS[name].targets == "embeddings" or name == "ln_tuning"
    method = small(name) if own_targets else small(name, targets="attention")
    start = lambda base: vj.init(method, jax.random.key(1), base)
    one, two = jax.jit(start)(held), jax.jit(start)(values)
    close_trees(one, two, 1e-5)
    adapter = moved(one)

    @jax.jit
    def both(trainable, base):
        def loss(trainable):
            out = vj.apply(graphdef, base, adapter.with_trainable(trainable), TOKENS)
            return (out**2).mean(), out

        return jax.grad(loss, has_aux=True)(trainable)

    (slope, out), (expected_slope, expected) = both(adapter.trainable, held), both(adapter.trainable, values)
    close(out, expected, 1e-5)
    close_trees(slope, expected_slope, 1e-4)
    if method.mergeable:
        merged, same = vj.merge(held, adapter), vj.merge(values, adapter)
        close_trees(merged, same, 1e-6)


def close_trees(one, other, tolerance):
    left, right = flatten(one), flatten(other)
    assert list(left) == list(right)
    for path, leaf in left.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            close(leaf, right[path], tolerance)
        else:
            np.testing.assert_array_equal(leaf, right[path], path)


def test_what_is_trained_whole_starts_as_the_values():
    base = vj.quantize(model()[1], "nf4")
    adapter = vj.init(vj.LoRA(rank=2, targets="q", full="mlp/up"), jax.random.key(0), base)
    path = "layers/block/mlp/up/kernel"
    np.testing.assert_array_equal(adapter.trainable["full"][path], kernels(base)[path].values())


def test_the_backward_pass_decodes_again_and_keeps_no_kernel():
    """One decoded kernel a layer would be as much as the whole base was before."""
    graphdef, base = model(width=64, mlp_width=64, layers=8)
    held = vj.quantize(base, "nf4")
    adapter = vj.init(vj.LoRA(rank=2, targets="all-linear"), jax.random.key(0), held)
    loss = lambda trainable, base: vj.apply(graphdef, base, adapter.with_trainable(trainable), TOKENS).mean()
    temporary = lambda base: (
        jax.jit(jax.grad(loss)).lower(adapter.trainable, base).compile().memory_analysis().temp_size_in_bytes
    )
    one_layer = sum(leaf.size * 4 // 8 for leaf in kernels(held).values())
    assert temporary(held) < temporary(base) + 4 * one_layer, "of 8 layers"


def test_a_decoder_answers_as_on_the_values():
    graphdef, base = model()
    held = vj.quantize(base, "nf4")
    answers = [vj.generate(graphdef, each, [[1, 2, 3], [4]], most=4) for each in (held, vj.merge(held))]
    assert answers[0].tokens == answers[1].tokens


def test_a_vertical_model_has_its_shared_kernels_in_fewer_bits():
    graphdef, base = model(layers=4, vertical=vj.Vertical(size=2))
    held = vj.quantize(base, "nf4")
    assert all(leaf.shape[0] == 2 for leaf in kernels(held).values()), "one a compound"
    close(vj.apply(graphdef, held, None, TOKENS), vj.apply(graphdef, vj.merge(held), None, TOKENS), 1e-5)
    dense, expanded = vj.expand(graphdef, held)
    assert not kernels(expanded)
    close(vj.apply(dense, expanded, None, TOKENS), vj.apply(graphdef, held, None, TOKENS), 1e-5)


def test_quantising_twice_changes_nothing():
    held = vj.quantize(model()[1], "nf4")
    again = vj.quantize(held, "nf4")
    assert all(leaf is kernels(again)[path] for path, leaf in kernels(held).items())


class Others(nnx.Module):
    """Layers of Flax's own kinds, stacked."""

    def __init__(self, rngs: nnx.Rngs):
        def block(rngs: nnx.Rngs) -> nnx.Sequential:
            return nnx.Sequential(nnx.Linear(32, 32, rngs=rngs), nnx.LinearGeneral(32, (16, 2), rngs=rngs))

        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(block))(rngs)

    def __call__(self, x):
        graphdef, layers = nnx.split(self.blocks)
        return jax.lax.scan(lambda x, one: (nnx.merge(graphdef, one)(x).reshape(x.shape), None), x, layers)[0]


@pytest.mark.parametrize("form", FORMS)
def test_layers_of_others_read_codes_as_well(form):
    graphdef, base = vj.split(Others(nnx.Rngs(0)))
    held = vj.quantize(base, form)
    assert list(kernels(held)) == ["blocks/layers/0/kernel"], "of the other, inputs are not the last axis but one"
    adapter = moved(vj.init(vj.DoRA(rank=2, dropout=0.5), jax.random.key(0), held))
    call = lambda base, key: vj.apply(graphdef, base, adapter, jnp.ones((2, 32)), key=key)
    answer = jax.jit(lambda base: jnp.stack([call(base, key) for key in (None, jax.random.key(1))]))
    close(answer(held), answer(vj.merge(held)), 1e-6)


def test_what_starts_from_values_needs_them():
    shapes = jax.eval_shape(lambda base: vj.quantize(base, "nf4"), model()[1])
    start = lambda method: vj.init(method, jax.random.key(0), shapes)
    with pytest.raises(ConfigError, match="it starts from the values of layers/block/attn/q; the base has shapes only"):
        start(vj.PiSSA(rank=2, targets="q"))
    with pytest.raises(ConfigError, match="mlp/up/kernel is trained whole and starts from its values; the base has"):
        start(vj.LoRA(rank=2, targets="q", full="mlp/up"))


def test_what_cannot_be_quantised_is_said(unchecked):
    held = vj.quantize(model()[1], "nf4")
    with pytest.raises(ConfigError, match="kernel is held as nf4 already; quantize the base as it was before"):
        vj.quantize(held, "int8")
    with pytest.raises(ConfigError, match="quantize 'fp3' must be one of 'int8', 'nf4'"):
        vj.quantize({"kernel": jnp.ones((64, 2))}, "fp3")
    with pytest.raises(ConfigError, match="quantize 'fp3' must be one of 'int8', 'nf4'"):
        encode(jnp.ones((16, 2)), "fp3")
    with pytest.raises(ConfigError, match="a kernel of 20 inputs can't be held as nf4: no multiple of 16"):
        encode(jnp.ones((20, 2)), "nf4")
    with pytest.raises(ConfigError, match="no kernel can be held as nf4"):
        vj.quantize({"kernel": jnp.ones((64, 2))}, "nf4")
