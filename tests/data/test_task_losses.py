"""Losses of text classes and of encoder–decoders: padding and filler rows count nothing, all else its cross-entropy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import parameters

from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.models.encoder import Encoder, EncoderConfig
from vlora_jax.models.seq2seq import Seq2Seq, Seq2SeqConfig
from vlora_jax.training.loss import seq2seq, text_classification

RNG = np.random.default_rng(0)
SIZES = {"vocabulary": 19, "layers": 1, "width": 8, "heads": 2, "mlp_width": 8}
WEIGHT = np.float32([1, 0, 1, 1])


def tokens(length):
    return RNG.integers(0, 19, (4, length)).astype(np.int32)


def segments(length):
    return (np.arange(length) < RNG.integers(2, length, (4, 1))).astype(np.int32)


def cross_entropy(logits, targets):
    logits = np.float64(logits)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def merged(make):
    from flax import nnx

    return nnx.merge(*parameters(make))


@pytest.mark.parametrize("family", ["decoder", "encoder", "encoder with types"])
def test_text_classes(family):
    if family == "decoder":
        model = merged(lambda rngs: Decoder(DecoderConfig(**SIZES, head="sequence", classes=3), rngs))
    else:
        config = EncoderConfig(**SIZES, head="sequence", classes=3, token_types=2, max_positions=12)
        model = merged(lambda rngs: Encoder(config, rngs))
    batch = {"tokens": tokens(10), "segments": segments(10), "label": np.int32([0, 2, 1, 1]), "weight": WEIGHT}
    types = {"types": RNG.integers(0, 2, (4, 10)).astype(np.int32)} if "types" in family else {}
    found = jax.jit(lambda batch: text_classification(model, batch, False))(batch | types)
    rows = []
    for row in range(4):  # each text alone, without its padding
        size = int(batch["segments"][row].sum())
        own = {name: jnp.asarray(array[row : row + 1, :size]) for name, array in types.items()}
        rows.append(np.asarray(model(jnp.asarray(batch["tokens"][row : row + 1, :size]), **own))[0])
    losses = cross_entropy(np.stack(rows), batch["label"])
    np.testing.assert_allclose(found["loss"], (WEIGHT * losses).sum(), rtol=1e-4)
    np.testing.assert_allclose(found["correct"], (WEIGHT * (np.stack(rows).argmax(-1) == batch["label"])).sum())
    assert found["weight"] == 3


def test_seq2seq_is_the_cross_entropy_of_each_answer_alone():
    model = merged(lambda rngs: Seq2Seq(Seq2SeqConfig(**SIZES, decoder_layers=1), rngs))
    asked, answered = segments(9), segments(6)
    batch = {
        "tokens": tokens(9), "segments": asked, "decoder_tokens": tokens(6), "decoder_segments": answered,
        "targets": tokens(6), "mask": answered > 0, "weight": WEIGHT,
    }  # fmt: skip
    found = jax.jit(lambda batch: seq2seq(model, batch, False))(batch)
    loss = 0.0
    for row in np.flatnonzero(WEIGHT):
        source, target = int(asked[row].sum()), int(answered[row].sum())
        sides = batch["tokens"][row : row + 1, :source], batch["decoder_tokens"][row : row + 1, :target]
        logits = model(*map(jnp.asarray, sides))
        loss += cross_entropy(np.asarray(logits)[0], batch["targets"][row, :target]).sum()
    np.testing.assert_allclose(found["loss"], loss, rtol=1e-4)
    assert found["weight"] == (WEIGHT[:, None] * answered).sum()
