"""The Transformer block against NumPy, and the parts that are not plain Flax."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.models.elementwise import ACTIVATIONS
from vlora_jax.models.layers import (
    LLAMA_STYLE,
    Block,
    BlockConfig,
    Context,
    Linear,
    patches_of,
    position_tables,
)

BATCH, LENGTH, WIDTH = 2, 5, 8
SIZES = {"width": WIDTH, "heads": 4, "mlp_width": 12}


def block_in_numpy(config, params, x, positions, segments):
    """Attention and MLP in float64, head by head, from the formulas of the papers."""
    p = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(params).items()}

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        scaled = (
            centred
            / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_eps)
            * (p[f"{name}/scale"] + config.norm_offset)
        )
        return scaled + p.get(f"{name}/bias", 0.0)

    def dense(x, name):
        return x @ p[f"{name}/kernel"] + p.get(f"{name}/bias", 0.0)

    def activation(x):
        return x / (1 + np.exp(-x)) if config.activation == "silu" else x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2

    def rotated(x):
        frequencies = config.rotary_theta ** (-2 * np.arange(config.dim // 2) / config.dim)
        half = config.dim // 2
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[..., None] * frequencies)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    def enter(x, branch):
        return x if config.norm_place == "post" else norm(x, f"{branch}_norm")

    def leave(x, out, branch):
        if config.norm_place == "post":
            return norm(x + out, f"{branch}_norm")
        return x + (norm(out, f"{branch}_post_norm") if config.norm_place == "both" else out)

    h, out = enter(x, "attn"), []
    heads, keys = config.heads * config.dim, config.key_heads * config.dim
    if config.fused_qkv:
        q, k, v = np.split(dense(h, "attn/qkv"), [heads, heads + keys], axis=-1)
    else:
        q, k, v = (dense(h, f"attn/{name}") for name in "qkv")
    sees = segments[:, :, None] == segments[:, None, :]
    sees = sees & (np.tril(np.ones((LENGTH, LENGTH), bool)) | (not config.causal))
    if config.window:
        sees = sees & (np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)) < config.window)
    for head in range(config.heads):
        group = head // (config.heads // config.key_heads)
        mine, shared = (slice(i * config.dim, (i + 1) * config.dim) for i in (head, group))
        q_h, k_h, v_h = q[..., mine], k[..., shared], v[..., shared]
        if config.qk_norm:
            q_h, k_h = norm(q_h, "attn/q_norm"), norm(k_h, "attn/k_norm")
        if config.rotary_theta:
            q_h, k_h = rotated(q_h), rotated(k_h)
        scores = q_h @ k_h.swapaxes(1, 2) * (config.query_scale or config.dim**-0.5)
        if config.softcap:
            scores = config.softcap * np.tanh(scores / config.softcap)
        weights = np.where(sees, np.exp(scores), 0)
        out.append(weights / weights.sum(-1, keepdims=True) @ v_h)
    x = leave(x, dense(np.concatenate(out, axis=-1), "attn/o"), "attn")
    h = enter(x, "mlp")
    inner = activation(dense(h, "mlp/gate")) * dense(h, "mlp/up") if config.gated else activation(dense(h, "mlp/up"))
    return leave(x, dense(inner, "mlp/down"), "mlp")


GEMMA = {**LLAMA_STYLE, "norm_place": "both", "norm_offset": True, "softcap": 2.0, "query_scale": 0.7, "window": 2}


@pytest.mark.parametrize(
    "options",
    [
        {"fused_qkv": True},
        {"norm_place": "post"},
        {**LLAMA_STYLE, "kv_heads": 2, "head_dim": 6, "rotary_theta": 50.0, "qk_norm": True},
        GEMMA,
    ],
    ids=["vit", "bert", "qwen", "gemma"],
)
def test_a_block_computes_the_formulas(options):
    config = BlockConfig(**SIZES, **options)
    graphdef, shapes = vj.split(nnx.eval_shape(lambda: Block(config, nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0.2, 0.5, leaf.shape).astype(np.float32), shapes)
    x = rng.normal(size=(BATCH, LENGTH, WIDTH))
    positions, segments = np.asarray([[0, 1, 2, 0, 1], [4, 5, 6, 7, 8]]), np.asarray([[1, 1, 1, 2, 2], [1] * 5])

    @jax.jit
    def run(params, x, positions, segments):
        context = Context(segments, rotary=position_tables(config, positions)[0])
        return vj.apply(graphdef, params, None, x, context)

    got = run(params, jnp.asarray(x, jnp.float32), jnp.asarray(positions), jnp.asarray(segments))
    np.testing.assert_allclose(got, block_in_numpy(config, params, x, positions, segments), atol=1e-4, rtol=1e-5)


def test_activations_are_what_they_are_called():
    x = np.linspace(-3, 3, 7)
    tanh = x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    expected = {
        "gelu": x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
        "gelu_tanh": tanh,
        "silu": x / (1 + np.exp(-x)),
        "relu": np.maximum(x, 0),
    }
    got = jax.jit(lambda x: {name: activation(x) for name, activation in ACTIVATIONS.items()})(x)
    assert set(got) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(got[name], values, atol=1e-6, err_msg=name)


def test_a_linear_layer_takes_any_leading_axes():
    layer = Linear(3, 4, kernel_init=nnx.initializers.ones, bias_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    x = np.arange(2 * 5 * 3, dtype=np.float32).reshape(2, 5, 3)
    expected = np.repeat(x.sum(-1, keepdims=True) + 1, 4, axis=-1)
    np.testing.assert_array_equal(layer(jnp.asarray(x)), expected)
    np.testing.assert_array_equal(layer(jnp.asarray(x[0, 0])), expected[0, 0])


def test_patches_are_cut_row_by_row():
    images = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    cut = [images[:, y : y + 2, x : x + 2].reshape(2, -1) for y in (0, 2) for x in (0, 2, 4)]
    np.testing.assert_array_equal(patches_of(jnp.asarray(images), 2), np.stack(cut, axis=1))


@pytest.mark.parametrize("std", [None, 0.02])
def test_kernels_start_at_the_deviation_asked_for(std):
    """`None` is 1/√in, whatever the width."""
    config = BlockConfig(width=128, heads=2, mlp_width=512, kernel_std=std)
    _, params = vj.split(Block(config, nnx.Rngs(0)))
    for site in vj.find_sites(params):
        kernel = np.asarray(flatten(params)[site.leaf_path])
        assert abs(kernel.std() / (std or site.in_dim**-0.5) - 1) < 0.02, site.path
        assert abs(kernel.mean()) < 0.02 * kernel.std() + 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 4, "kv_heads": 3}, "heads 4 must be a multiple of kv_heads 3"),
        ({"width": 10, "heads": 4}, "width 10 must be a multiple of heads 4, or give head_dim"),
        ({"head_dim": 5, "rotary_theta": 10.0}, "even head_dim, not 5"),
        ({"hedas": 4}, "hedas"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlockConfig(**options)
