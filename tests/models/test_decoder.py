"""The decoder: published parameter counts, its options, causality, packing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.vertical.config import Vertical

GPT2_STYLE = {
    "norm": "layer",
    "activation": "gelu_tanh",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "rotary_theta": None,
    "fused_qkv": True,
}
SMALL = {"width": 8, "heads": 2, "mlp_width": 12, "layers": 2, "vocabulary": 16}
LENGTH = 6


def build(**options):
    """A decoder with random values everywhere."""
    graphdef, shapes = vj.split(nnx.eval_shape(lambda: Decoder(DecoderConfig(**options), nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)


def test_gpt2_has_as_many_numbers_as_published():
    """Vocabulary, positions, 12 layers of 12 d² + 13 d, the last norm; the head is the embedding."""
    config = DecoderConfig(
        **GPT2_STYLE, width=768, heads=12, mlp_width=3072, layers=12, vocabulary=50_257, max_positions=1024
    )
    count = vj.count(vj.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))[1])
    assert count == (50_257 + 1024) * 768 + 12 * (12 * 768**2 + 13 * 768) + 2 * 768 == 124_439_808


@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "mlp_width", "layers", "published"),
    [(4096, 32, 32, 11_008, 32, 6_738_415_616), (2048, 32, 4, 5632, 22, 1_100_048_384)],
    ids=["Llama-2-7B", "TinyLlama-1.1B"],
)
def test_llamas_have_as_many_numbers_as_published(width, heads, kv_heads, mlp_width, layers, published):
    config = DecoderConfig(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        layers=layers,
        vocabulary=32_000,
        tied_head=False,
    )
    count = vj.count(vj.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))[1])
    attention = 2 * width**2 + 2 * width * (width // heads) * kv_heads
    assert count == 2 * 32_000 * width + layers * (attention + 3 * width * mlp_width + 2 * width) + width == published


@pytest.mark.parametrize(
    "options",
    [
        {**GPT2_STYLE, "max_positions": LENGTH, "tied_head": False},
        {"kv_heads": 1, "vertical": Vertical(size=2, increment=vj.LoRA(rank=2, start="kaiming_both"))},
    ],
    ids=["gpt2", "vertical-llama"],
)
def test_no_gradient_reaches_later_tokens(options):
    """With every token another word, the gradient of logits i to word j is that to position j."""
    graphdef, params = build(**SMALL, **options)
    tokens = jnp.arange(LENGTH)[None]

    @jax.jit
    def dependence(params):
        def rows(embedding):
            model = nnx.merge(graphdef, params)
            head = model.embed.embedding.get_value()
            model.embed.embedding = nnx.Param(embedding)
            hidden = model.hidden(tokens)[0]
            return (hidden @ head.T if model.config.tied_head else model.logits(hidden)).sum(axis=-1)

        embedding = jnp.asarray(flatten(params)["embed/embedding"])
        return jnp.abs(jax.jacrev(rows)(embedding)).max(axis=-1)[:, :LENGTH]

    np.testing.assert_array_equal(np.asarray(dependence(params)) > 0, np.tril(np.ones((LENGTH, LENGTH), bool)))


def test_a_tied_head_is_the_embedding_transposed():
    graphdef, params = build(**SMALL)
    tokens = jnp.arange(LENGTH)[None]

    @jax.jit
    def both(params):
        model = nnx.merge(graphdef, params)
        return model(tokens), model.hidden(tokens) @ model.embed.embedding.get_value().T

    np.testing.assert_allclose(*both(params), atol=1e-5)


def test_packed_documents_are_what_they_are_alone():
    """Positions restart, segments isolate; learned and rotary positions alike."""
    graphdef, params = build(**SMALL, max_positions=4)
    run = jax.jit(lambda params, *inputs: vj.apply(graphdef, params, None, *inputs))
    tokens = jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])
    positions, segments = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3]]), jnp.asarray([[1, 1, 1, 1, 2, 2, 2, 2]])
    packed = run(params, tokens, positions, segments)
    alone = run(params, tokens.reshape(2, 4))
    np.testing.assert_allclose(packed.reshape(alone.shape), alone, atol=1e-5)


def test_logits_are_float32_in_a_bfloat16_model():
    graphdef, shapes = build(**SMALL, dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(shapes)} == {"bfloat16"}
    logits = jax.eval_shape(lambda base: vj.apply(graphdef, base, None, jnp.zeros((1, 3), jnp.int32)), shapes)
    assert (logits.shape, logits.dtype) == ((1, 3, 16), jnp.float32)


def test_more_tokens_than_learned_positions_are_refused():
    graphdef, shapes = build(**SMALL, max_positions=4)
    with pytest.raises(ConfigError, match="5 tokens, but max_positions is 4"):
        jax.eval_shape(lambda base: vj.apply(graphdef, base, None, jnp.zeros((1, 5), jnp.int32)), shapes)


def test_what_elementwise_steps_give_is_not_kept_for_the_backward_pass():
    """Of a gated MLP with adapters its two inputs are kept; the product that `down` reads is computed again."""
    options = {**SMALL, "mlp_width": 44, "layers": 3, "tied_head": False}
    graphdef, params = build(**options)
    ids = jnp.zeros((2, LENGTH), jnp.int32)
    adapter = jax.eval_shape(lambda base: vj.init(vj.LoRA(rank=2), jax.random.key(0), base), params)

    def kept(params, trainable):
        apply = lambda trainable: vj.apply(graphdef, params, adapter.with_trainable(trainable), ids)
        return jax.tree.leaves(jax.vjp(apply, trainable)[1])

    shapes = [leaf.shape for leaf in jax.eval_shape(kept, params, adapter.trainable)]
    assert sum(math.prod(shape) == 3 * ids.size * 44 for shape in shapes) == 2
