"""Vertical to dense: the same function as ordinary parameters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tiny import abstract, filled, increment

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.expand import expand


def decoder(vertical, **options):
    config = DecoderConfig(width=8, heads=2, kv_heads=1, mlp_width=12, layers=4, vocabulary=16, vertical=vertical)
    config = config.model_copy(update=options)
    return vj.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


def test_a_vertical_decoder_and_its_dense_twin_agree():
    """Some targets only, a rank of its own for one of them."""
    vertical = Vertical(size=2, increment=increment(rank_pattern={"down": 3}), targets=("attention", "down"))
    graphdef, shapes = decoder(vertical)
    base = filled(shapes, deviation=0.3)
    tokens = jnp.arange(10).reshape(2, 5)

    @jax.jit
    def run(base):
        dense_graph, dense = expand(graphdef, base)
        return dense, vj.apply(graphdef, base, None, tokens), vj.apply(dense_graph, dense, None, tokens)

    dense, vertical_logits, dense_logits = run(base)
    np.testing.assert_allclose(dense_logits, vertical_logits, atol=1e-5)
    assert jax.tree.map(np.shape, flatten(dense)) == jax.tree.map(np.shape, flatten(decoder(None)[1]))


def test_the_dense_twin_is_the_model_a_dense_config_builds():
    """Same graph and metadata, so that checkpoints and exports of dense models take it."""
    graphdef, shapes = decoder(Vertical(size=2, increment=increment()))
    expanded_graph, dense = nnx.eval_shape(lambda: expand(graphdef, jax.tree.map(jnp.zeros_like, shapes)))
    expected_graph, expected = vj.split(nnx.merge(*decoder(None)))
    assert jax.tree.structure(dense) == jax.tree.structure(expected)
    assert expanded_graph == expected_graph


def test_kernels_keep_the_dtype_of_the_base():
    graphdef, shapes = decoder(Vertical(size=2, increment=increment()), param_dtype="bfloat16")
    dense = jax.eval_shape(lambda base: expand(graphdef, base)[1], shapes)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(dense)} == {"bfloat16"}


def test_a_dense_model_comes_back_unchanged():
    graphdef, shapes = abstract()
    params = filled(shapes)
    same_graph, same = expand(graphdef, params)
    assert same_graph == graphdef
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(flatten(same)[path], leaf)


def test_an_adapter_with_dropout_does_the_same_on_both():
    """DoRA reads kernel and output, of a layer whose kernel is made of its compound's and an increment."""
    graphdef, shapes = abstract(layers=2, vertical=Vertical(size=2, increment=increment()))
    base, h = filled(shapes), np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    start = lambda base: vj.init(vj.DoRA(rank=2, dropout=0.5, targets="up"), jax.random.key(0), base)
    adapter = filled(jax.eval_shape(lambda base: start(expand(graphdef, base)[1]), base), seed=1)

    @jax.jit
    def run(base, adapter, key):
        twin = expand(graphdef, base)
        models = ((graphdef, base), key), (twin, key), (twin, None)
        return [vj.apply(*model, adapter, h, key=each) for model, each in models]

    vertical, dense, whole = run(base, adapter, jax.random.key(0))
    np.testing.assert_allclose(vertical, dense, atol=1e-5)
    assert np.abs(dense - whole).max() > 0.1
