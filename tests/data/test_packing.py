"""Packed rows: every document once, seen by itself alone, and learnt exactly as in a row of its own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import parameters

from vlora_jax.data.dataset import DataSet
from vlora_jax.data.documents import gather
from vlora_jax.data.packing import Packed, Padded, best_fit
from vlora_jax.data.pipeline import TrainBatches, held_out_batches
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.training.loss import next_token

VOCABULARY, LENGTH, PAD = 29, 24, 7


def made(sizes, seed=0):
    """Documents that take so many places, about half of their tokens supervised."""
    rng = np.random.default_rng(seed)
    tokens = [rng.integers(0, VOCABULARY, size + 1) for size in sizes]
    return gather([(each, rng.random(len(each)) < 0.5) for each in tokens], np.arange(len(sizes)))


SIZES = [3, 17, 5, 9, 24, 1, 12, 8, 2, 6]
DOCUMENTS = made(SIZES)
PACKED = Packed(DOCUMENTS, best_fit(DOCUMENTS.sizes, LENGTH), LENGTH, PAD)
PADDED = Padded(DOCUMENTS, LENGTH, PAD)


def stacked(source):
    rows = [source[index] for index in range(len(source))]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def plainly(sizes, length):
    """Best fit by looking at every row."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [place for place, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= size
        else:
            rooms.append(length - size)
    return sorted(rooms)


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_is_best_fit(seed):
    rng = np.random.default_rng(seed)
    sizes, length = rng.integers(1, 65, 300), 64
    bins = best_fit(sizes, length)
    assert sorted(document for row in bins for document in row) == list(range(300))
    rooms = [length - sum(int(sizes[document]) for document in row) for row in bins]
    assert min(rooms) >= 0
    assert sorted(rooms) == plainly(sizes.tolist(), length)


def test_a_packed_row_holds_its_documents_apart():
    seen = []
    for index, row in enumerate(PACKED.bins):
        example = PACKED[index]
        segments = example["segments"]
        assert sorted(set(segments[segments > 0])) == list(range(1, len(row) + 1))
        for segment, document in enumerate(row, 1):
            mine = segments == segment
            tokens, supervised = DOCUMENTS[document]
            np.testing.assert_array_equal(example["tokens"][mine], tokens[:-1])
            np.testing.assert_array_equal(example["targets"][mine], tokens[1:])
            np.testing.assert_array_equal(example["mask"][mine], supervised[1:])
            np.testing.assert_array_equal(example["positions"][mine], np.arange(mine.sum()))
            seen.append(document)
        assert not example["mask"][segments == 0].any()
        assert (example["tokens"][segments == 0] == PAD).all()
    assert sorted(seen) == list(range(len(DOCUMENTS)))


def test_padding_is_told_by_length_not_by_its_token():
    """The pad token is learnt like any other where it is a document's own."""
    documents = gather([(np.int32([1, PAD, 2, PAD]), np.array([False, True, True, True]))], np.arange(1))
    for source in (Padded(documents, 6, PAD), Packed(documents, [[0]], 6, PAD)):
        np.testing.assert_array_equal(source[0]["mask"], [True, True, True, False, False, False])
        np.testing.assert_array_equal(source[0]["targets"], [PAD, 2, PAD, PAD, PAD, PAD])


@pytest.fixture(scope="module", params=["rotary", "learned"])
def model(request):
    own = {"max_positions": LENGTH, "rotary_theta": None} if request.param == "learned" else {}
    config = DecoderConfig(vocabulary=VOCABULARY, layers=2, width=16, heads=2, kv_heads=1, mlp_width=16, **own)
    return parameters(lambda rngs: Decoder(config, rngs))


@jax.jit
def _logits(graphdef, params, tokens, positions, segments):
    return nnx.merge(graphdef, params)(tokens, positions, segments)


def test_packed_logits_are_each_documents_own(model):
    batch = stacked(PACKED)
    packed = _logits(*model, batch["tokens"], batch["positions"], batch["segments"])
    alone = _logits(*model, stacked(PADDED)["tokens"], None, None)
    for row, documents in enumerate(PACKED.bins):
        for segment, document in enumerate(documents, 1):
            found = packed[row][batch["segments"][row] == segment]
            np.testing.assert_allclose(found, alone[document][: len(found)], rtol=1e-4, atol=1e-5)


def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(model):
    graphdef, params = model

    @jax.jit
    def sums(params, batch):
        found = next_token(nnx.merge(graphdef, params), batch, True)
        return found["loss"], found

    (_, packed), packed_slope = jax.value_and_grad(sums, has_aux=True)(params, stacked(PACKED))
    (_, padded), padded_slope = jax.value_and_grad(sums, has_aux=True)(params, stacked(PADDED))
    assert packed["weight"] == padded["weight"] == DOCUMENTS.learnt.sum()
    assert packed["correct"] == padded["correct"]
    np.testing.assert_allclose(packed["loss"], padded["loss"], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, packed_slope, padded_slope)


def test_no_gradient_crosses_a_segment(model):
    """Documents of tokens of their own: the loss of one has no slope by the embeddings of the others."""
    graphdef, params = model
    parts = [np.arange(start, start + 6) for start in (0, 6, 12, 18)]
    documents = gather([(part, np.ones(6, bool)) for part in parts], np.arange(4))
    row = stacked(Packed(documents, [[0, 1, 2, 3]], LENGTH, PAD))
    picked = row | {"mask": row["mask"] & (row["segments"] == 3)}

    def slope(params, batch):
        states = lambda params: nnx.merge(graphdef, params).hidden(
            batch["tokens"], batch["positions"], batch["segments"]
        )
        return jax.grad(lambda params: (states(params) ** 2 * batch["mask"][..., None]).sum())(params)

    found = np.abs(np.asarray(jax.jit(slope)(params, picked)["embed"]["embedding"][...])).sum(-1)
    assert (found[12:17] > 0).all()
    assert found[:12].max() == found[18:].max() == 0


def numbered(packing):
    documents = made(np.random.default_rng(3).integers(1, LENGTH + 1, 40), seed=3)
    bins = best_fit(documents.sizes, LENGTH)
    source = Packed(documents, bins, LENGTH, PAD) if packing else Padded(documents, LENGTH, PAD)
    return DataSet("packed", "next_token", source, source, "0")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_packed_stream_goes_on_exactly_in_the_middle_of_any_epoch(accumulate):
    data = numbered(packing=True)
    steps = 3 * len(data.train) // (3 * accumulate)
    make = lambda: TrainBatches(data, 3, accumulate, seed=5)
    batches, states, seen = make(), [], []
    for _ in range(steps):
        states.append(json.loads(json.dumps(batches.state())))
        seen.append(next(batches))
    epochs = np.concatenate([batch["id"].ravel() for batch in seen])[: 2 * len(data.train)].reshape(2, -1)
    assert (np.sort(epochs) == np.arange(len(data.train))).all()
    assert (epochs[0] != epochs[1]).any()
    for stop in (1, steps // 3 + 1, steps // 2, 2 * steps // 3 + 1):
        again = make()
        again.restore(states[stop])
        for expected in seen[stop : stop + 4]:
            got = next(again)
            assert got.keys() == expected.keys()
            for name, array in expected.items():
                np.testing.assert_array_equal(got[name], array)


def test_held_out_sums_do_not_depend_on_packing(model):
    def total(packing):
        sums = jnp.zeros(2)
        for batch in held_out_batches(numbered(packing), 7):
            found = _sums(*model, {name: array[0] for name, array in batch.items()})
            sums += jnp.stack([found["loss"], found["weight"]])
        return sums

    np.testing.assert_allclose(total(True), total(False), rtol=1e-5)


@jax.jit
def _sums(graphdef, params, batch):
    return next_token(nnx.merge(graphdef, params), batch, False)
