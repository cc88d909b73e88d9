"""Every form of attention against XLA's own; causality, segments and rotary positions as properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlora_jax.models import blocks as module
from vlora_jax.models.attention import attention, best_form, splash
from vlora_jax.models.rotary import Rotary, frequencies

BATCH, LENGTH, HEADS, DIM = 2, 10, 4, 6


def qkv(kv_heads=2, length=LENGTH, dim=DIM):
    rng = np.random.default_rng(0)
    shapes = [(BATCH, length, heads, dim) for heads in (HEADS, kv_heads, kv_heads)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def segments_of(length=LENGTH):
    """Two documents that end elsewhere in each row."""
    return jnp.asarray([np.arange(length) >= length // 3, np.arange(length) >= length // 2], jnp.int32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_and_their_gradients_are_those_of_plain_attention(causal, packed, monkeypatch):
    """Three blocks of queries, the last one short; grouped-query heads."""
    monkeypatch.setattr(module, "block_size", lambda length, causal: 4 if causal else length)
    arrays, segments = qkv(), segments_of() if packed else None

    def loss(arrays, form):
        out = attention(*arrays, causal=causal, segments=segments, form=form)
        return (out**2).sum(), out

    both = jax.jit(lambda arrays: [jax.grad(loss, has_aux=True)(arrays, form) for form in ("blocks", "plain")])
    got, expected = both(arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_splash_is_plain_attention(kv_heads):
    """The TPU's kernel, interpreted: packed documents, one key head or grouped ones."""
    arrays, segments = qkv(kv_heads, length=128, dim=64), segments_of(128)

    @jax.jit
    def both(arrays):
        return splash(*arrays, segments, interpret=True), attention(
            *arrays, causal=True, segments=segments, form="plain"
        )

    np.testing.assert_allclose(*both(arrays), atol=1e-5)


def test_splash_splits_heads_over_devices_that_outnumber_the_key_heads():
    arrays = qkv(1, length=128, dim=64)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    expected = attention(*arrays, causal=True, form="plain")
    with jax.set_mesh(mesh):
        got = jax.jit(lambda arrays: splash(*arrays, None, interpret=True))(arrays)
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "form"),
    [
        (("cpu", jnp.float32, 256, 64, True), "blocks"),
        (("gpu", jnp.bfloat16, 256, 64, True), "cudnn"),
        (("gpu", jnp.float32, 256, 64, True), "plain"),
        (("gpu", jnp.bfloat16, 256, 256, True), "plain"),
        (("tpu", jnp.bfloat16, 256, 128, True), "splash"),
        (("tpu", jnp.bfloat16, 256, 128, False), "plain"),
        (("tpu", jnp.bfloat16, 200, 128, True), "plain"),
        (("tpu", jnp.bfloat16, 256, 80, True), "plain"),
    ],
)
def test_each_backend_takes_its_form(arguments, form):
    backend, dtype, length, head_dim, causal = arguments
    assert best_form(backend, jnp.dtype(dtype), length, head_dim, causal) == form


def test_no_gradient_reaches_later_tokens(monkeypatch):
    """Position i depends on every key and value up to i and, exactly, on none after it."""
    monkeypatch.setattr(module, "block_size", lambda length, causal: 4 if causal else length)
    q, k, v = qkv()

    @jax.jit
    def dependence(k, v):
        rows = lambda k, v: attention(q, k, v, causal=True, form="blocks")[0].sum(axis=(1, 2))
        jacobians = jax.jacrev(rows, (0, 1))(k, v)
        return [jnp.abs(jacobian[:, 0]).max(axis=(2, 3)) for jacobian in jacobians]

    by_key, by_value = dependence(k, v)
    past = np.tril(np.ones((LENGTH, LENGTH), bool))
    np.testing.assert_array_equal(np.asarray(by_value) > 0, past)
    past[0, 0] = False  # softmax over one key is 1 whatever the key
    assert np.all(np.asarray(by_key)[~past] < 1e-6)
    assert np.all(np.asarray(by_key)[past] > 1e-6)


def test_a_packed_document_is_what_it_is_alone():
    q, k, v = qkv()
    start = LENGTH // 2  # of the second row's second document
    packed = attention(q, k, v, causal=True, segments=segments_of(), form="blocks")
    alone = attention(*(a[1:, start:] for a in (q, k, v)), causal=True, form="blocks")
    np.testing.assert_allclose(packed[1:, start:], alone, atol=1e-6)


def test_rotation_is_that_of_complex_numbers():
    """(x₁ + i x₂) e^{i p θ^(-2j/d)}, the halves of a head as real and imaginary parts."""
    x, theta = qkv()[0], 100.0
    positions = np.asarray([np.arange(LENGTH), np.arange(LENGTH) * 3 + 1])
    turns = np.exp(1j * positions[..., None] * theta ** (-2 * np.arange(DIM // 2) / DIM))[:, :, None]
    turned = (np.asarray(x)[..., : DIM // 2] + 1j * np.asarray(x)[..., DIM // 2 :]) * turns
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(Rotary.at(jnp.asarray(positions), frequencies(DIM, theta))(x), expected, atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    q, k, _ = qkv(HEADS)
    at = lambda shift: jnp.broadcast_to(jnp.arange(LENGTH) + shift, (BATCH, LENGTH))

    @jax.jit
    def scores(shift):
        turned_q, turned_k = (Rotary.at(at(shift), frequencies(DIM, 10_000.0))(a) for a in (q, k))
        return jnp.einsum("bshk,bthk->bhst", turned_q, turned_k)

    np.testing.assert_allclose(scores(0), scores(500), atol=2e-4)
    assert np.abs(scores(0) - jnp.einsum("bshk,bthk->bhst", q, k)).max() > 0.1


def test_half_precision_keeps_its_dtype_and_sums_in_float32():
    """A thousand equal keys: their shares, summed in bfloat16, would not come near 1."""
    ones = jnp.ones((1, 1000, 1, 8), jnp.bfloat16)
    out = attention(ones, ones, ones, form="blocks")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), 1.0, atol=2**-7)
