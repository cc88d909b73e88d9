"""Kernels in fewer bits against those who hold them so as well: Google's qwix, and bitsandbytes, which QLoRA came with.

Bit for bit: the codes, and the values that they stand for. Models with adapters on such kernels are compared with
transformers, PEFT and bitsandbytes in `test_methods_peft.py`, the cases "…, 4 bits".
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import decoded, error, logits, model_of, stored, their_logits, torch, whole_model_of

from vlora_jax.adapters.quantized import NF4, block_of, encode, is_quantized
from vlora_jax.adapters.trees import flatten
from vlora_jax.hub.peft_modules import Modules

qwix = pytest.importorskip("qwix")
functional = pytest.importorskip("bitsandbytes").functional

MIDDLES = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def zeros():
    """Whole blocks of zeros: one of a column's two, and a whole column."""
    kernel = drawn(128, 6)
    kernel[:64, 2] = 0
    kernel[:, 4] = 0
    return kernel


def ties():
    """A block whose largest value is 1, ties between two levels and their next floats on both sides among the rest."""
    middles = np.array(MIDDLES, np.float32)
    near = np.concatenate([middles, *(np.nextafter(middles, np.float32(side)) for side in (-2, 2)), NF4])
    columns = [np.resize(near, 64), np.resize(-near, 64), np.resize(near[::-1], 64)]
    kernel = np.stack(columns, axis=1).astype(np.float32)
    kernel[0] = 1, -1, 1
    return kernel


KERNELS = {
    "one block": drawn(64, 1),
    "a layer": drawn(128, 48),
    "a stack": drawn(3, 192, 40),
    "a stack of stacks": drawn(2, 2, 64, 24),
    "small": 1e-30 * drawn(128, 16),
    "one far out": drawn(128, 16) + 1e3 * np.eye(128, 16, dtype=np.float32),
    "blocks of 32": drawn(96, 20),
    "blocks of 16": drawn(2, 80, 20),
    "zeros": zeros(),
    "ties": ties(),
}


HARD = {"small", "ties"}  # where qwix differs: below 1e-19 all is 0, and beside a tie its two distances round to one
COMPILED = jax.jit(encode, static_argnames="form")


def codes_of(held):
    """A number from 0 to 15 for each of a kernel's, from our pairs of half a block each."""
    *stack, blocks, out = held.scale.shape
    pairs = np.asarray(held.codes).reshape(*stack, blocks, -1, out)
    return np.concatenate([pairs & 15, pairs >> 4], axis=-2).reshape(held.shape)


def by_qwix(kernel, form):
    """One scale for each column and each block of its inputs, or all of them; in float32, as it would else compute."""
    rows = kernel.ndim - 2
    others = tuple(axis for axis in range(kernel.ndim) if axis != rows)
    tiles = {rows: block_of(kernel.shape[rows])} if form == "nf4" else None
    kind = "nf4" if form == "nf4" else jnp.int8
    return qwix.quantize(kernel.astype(jnp.float32), kind, channelwise_axes=others, tiled_axes=tiles)


def by_bitsandbytes(kernel):
    """Codes, scales and values; of the kernel turned round, as torch's weights are."""
    block = block_of(kernel.shape[-2])
    turned = torch.from_numpy(np.array(kernel, np.float32).swapaxes(-1, -2).copy())
    packed, state = functional.quantize_4bit(
        turned.to(getattr(torch, kernel.dtype.name)), blocksize=block, quant_type="nf4"
    )
    pairs = packed.numpy().reshape(-1, 1)
    codes = np.concatenate([pairs >> 4, pairs & 15], axis=1).reshape(turned.shape)
    scales = state.absmax.numpy().reshape(*turned.shape[:-1], -1)
    values = functional.dequantize_4bit(packed, state).float().numpy()
    return [part.swapaxes(-1, -2) for part in (codes, scales, values)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(set(KERNELS) - HARD))
def test_codes_scales_and_values_of_nf4_are_qwix_s(name, dtype):
    kernel = jnp.asarray(KERNELS[name], dtype)
    held, expected = COMPILED(kernel, form="nf4"), by_qwix(kernel, "nf4")
    np.testing.assert_array_equal(codes_of(held), expected.qvalue.astype(int))
    np.testing.assert_array_equal(held.scale, expected.scale.reshape(held.scale.shape))
    assert held.values().dtype == dtype
    np.testing.assert_array_equal(held.values(), qwix.dequantize(expected).astype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(set(KERNELS) - HARD))
def test_codes_and_scales_of_int8_are_qwix_s_but_for_ties(name, dtype):
    """It divides where we multiply: a scale's last bit, and on which side of a tie a value falls, may differ."""
    kernel = jnp.asarray(KERNELS[name], dtype)
    held, expected = COMPILED(kernel, form="int8"), by_qwix(kernel, "int8")
    np.testing.assert_allclose(held.scale, expected.scale.reshape(held.scale.shape), rtol=2e-7)
    quotient = np.asarray(kernel, np.float64) / np.asarray(held.scale, np.float64)
    tie = np.abs(np.abs(quotient % 1) - 0.5) < 1e-4
    codes, theirs = np.asarray(held.codes, int), np.asarray(expected.qvalue, int)
    np.testing.assert_array_equal(codes[~tie], theirs[~tie])
    assert np.abs(codes - theirs).max() <= 1
    assert tie.mean() < 0.2
    assert held.values().dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if block_of(kernel.shape[-2]) >= 32])
def test_codes_scales_and_values_are_bitsandbytes_s(name, dtype):
    """It has no blocks of 16, and 0 as the scale of zeros where we have 1."""
    kernel = jnp.asarray(KERNELS[name], dtype)
    held = COMPILED(kernel, form="nf4")
    codes, scales, values = by_bitsandbytes(kernel)
    np.testing.assert_array_equal(codes_of(held), codes)
    np.testing.assert_array_equal(held.scale, np.where(scales > 0, scales, 1))
    assert held.values().dtype == dtype
    np.testing.assert_array_equal(held.values().astype(np.float32), values)


def test_a_tie_goes_to_the_lower_level():
    """The next float above it goes to the upper one; bitsandbytes agrees on this kernel, in the test above."""
    kernel = KERNELS["ties"][:, :1]
    codes = codes_of(COMPILED(jnp.asarray(kernel), form="nf4"))
    for code, middle in enumerate(np.array(MIDDLES, np.float32)):
        assert set(codes[kernel == middle]) == {code}
        assert set(codes[kernel == np.nextafter(middle, np.float32(2))]) == {code + 1}


def test_a_loaded_model_is_transformers_with_bitsandbytes():
    """What is in 4 bits, and what it computes with no adapter; `test_methods_peft.py` goes on from here."""
    theirs, (_, model) = model_of("llama_nf4"), stored("llama_nf4")
    in_4_bits = {name for name, value in theirs.named_parameters() if hasattr(value, "quant_state")}
    leaves, modules = flatten(model.base), Modules.of(model.base, model.names)
    ours = {
        f"{module.name}.{leaf}": (path, module.layer)
        for module in modules.table.values()
        for leaf, path in module.leaves.items()
    }
    assert {name for name, (path, _) in ours.items() if is_quantized(leaves[path])} == in_4_bits
    assert len(in_4_bits) == 21
    state = decoded(theirs).state_dict()
    for name, where in ours.items():
        np.testing.assert_array_equal(modules.tensor(*where), state[name].numpy(), err_msg=name)
    expected = their_logits("llama_nf4", theirs)
    assert error(logits("llama_nf4", model.graphdef, model.base, None), expected) < 1e-5 * np.abs(expected).max()
    whole = their_logits("llama_nf4", whole_model_of("llama_nf4"))
    assert error(whole, expected) > 1e-2
