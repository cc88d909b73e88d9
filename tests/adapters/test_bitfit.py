"""BitFit: it finds all biases by itself, as many as the paper counts, and nothing else moves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import moved, parameters
from third_party import Attention

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError, TargetError
from vlora_jax.models.build import abstract_model
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.encoder import EncoderConfig
from vlora_jax.models.seq2seq import Seq2SeqConfig

BERT = {"vocabulary": 30522, "head": "none"}
BASE = EncoderConfig(layers=12, width=768, heads=12, mlp_width=3072, **BERT)
LARGE = EncoderConfig(layers=24, width=1024, heads=16, mlp_width=4096, **BERT)


def trained(base, method=None):
    return jax.eval_shape(lambda base: vj.init(method or vj.BitFit(), jax.random.key(0), base), base)


@pytest.mark.parametrize(("config", "numbers", "share"), [(BASE, 102_912, 0.09), (LARGE, 272_384, 0.08)])
def test_bert_has_as_many_biases_as_the_paper_says(config, numbers, share):
    """.09 % of BERT-base and .08 % of BERT-large (arXiv 2106.10199)."""
    base = abstract_model(config)[1]
    adapter = trained(base)
    assert vj.count(adapter) == numbers
    assert round(100 * numbers / vj.count(base), 2) == share
    assert not adapter.sites


def test_biases_of_any_flax_model_are_found():
    found = trained(parameters(Attention)[1]).trainable["full"]
    linear = [*(f"attn/{name}" for name in ("query", "key", "value", "out")), "mlp/up", "mlp/down", "head"]
    assert set(found) == {f"{name}/bias" for name in (*linear, "norm")}
    assert found["attn/query/bias"].shape == (2, 3)


def test_a_head_s_bias_is_one_and_a_table_of_position_biases_is_not():
    masked = EncoderConfig(layers=2, width=8, heads=2, mlp_width=16, head="masked_lm")
    assert "head_bias" in trained(abstract_model(masked)[1]).trainable["full"]
    with pytest.raises(ConfigError, match="bitfit: this model has no biases"):
        trained(abstract_model(Seq2SeqConfig(layers=2, decoder_layers=2, width=8, heads=2, mlp_width=16))[1])


def test_a_llama_has_none():
    message = r"bitfit: this model has no biases \(it has embed/embedding, .*, …\); train others by name"
    with pytest.raises(ConfigError, match=message):
        trained(abstract_model(DecoderConfig(layers=2, width=8, heads=2, mlp_width=16))[1])


def test_a_new_head_trains_beside_them_and_all_else_stays():
    graphdef, base = parameters(Attention)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    adapter = moved(vj.init(vj.BitFit(full="head"), jax.random.key(0), base))
    assert {"head/kernel", "head/bias", "norm/bias"} <= set(adapter.trainable["full"])
    bound, merged = jax.jit(lambda: (vj.apply(graphdef, base, adapter, x), vj.merge(base, adapter)))()
    np.testing.assert_allclose(bound, nnx.merge(graphdef, merged)(x), atol=1e-5)
    before, after = (flatten(tree) for tree in (base, merged))
    same = {path for path in before if np.array_equal(before[path], after[path])}
    assert same == set(before) - set(adapter.trainable["full"])


def test_targets_choose_among_them():
    """Queries and the MLP's first layer of BERT-base: .04 % of its numbers (arXiv 2106.10199)."""
    base = abstract_model(BASE)[1]
    adapter = trained(base, vj.BitFit(targets="q|up"))
    assert set(adapter.trainable["full"]) == {"layers/block/attn/q/bias", "layers/block/mlp/up/bias"}
    assert round(100 * vj.count(adapter) / vj.count(base), 2) == 0.04
    without = trained(base, vj.BitFit(exclude=["attn", "mlp", ".*norm"]))
    assert set(without.trainable["full"]) == {"pooler/bias"}
    with pytest.raises(TargetError, match="bitfit: target 'query' matches nothing; nearest: "):
        trained(base, vj.BitFit(targets="query"))
    with pytest.raises(TargetError, match="bitfit: targets select nothing once"):
        trained(base, vj.BitFit(exclude=".*"))
