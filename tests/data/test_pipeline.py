"""The data order: complete, shuffled anew in every epoch, and continued exactly from wherever it stopped."""

import json

import numpy as np
import pytest

from vlora_jax.data.dataset import DataSet
from vlora_jax.data.pipeline import TrainBatches, batch_id, held_out_batches
from vlora_jax.errors import DataError


class Numbers:
    """Examples that are a number each."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)
        return {"value": np.float32([10 * index]), "id": np.int32(index)}


def noisy(example, rng):
    return example | {"value": example["value"] + rng.random(dtype=np.float32)}


def data(train=10, held_out=7, augment=None):
    return DataSet("numbers", "classification", Numbers(train), Numbers(held_out), "0", augment)


def taken(batches, count, name="id"):
    return np.stack([next(batches)[name] for _ in range(count)])


@pytest.mark.parametrize(("batch", "accumulate"), [(2, 1), (4, 1), (2, 2)])
def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(batch, accumulate):
    """Batches go on across the end of an epoch, so that none is short."""
    batches = TrainBatches(data(), batch, accumulate, seed=3)
    ids = taken(batches, 4 * 10 // (batch * accumulate))
    assert ids.shape[1:] == (accumulate, batch)
    epochs = ids.reshape(4, 10)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(epoch) for epoch in [np.arange(10), *epochs]}) == 5


def test_the_order_is_the_seeds():
    first, same, other = (taken(TrainBatches(data(), 5, 1, seed), 2) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_augmentation_differs_by_epoch_and_seed_alone():
    """Values leave their example's number of ten by a noise that is drawn once per place in the order."""
    noises = {}
    for run, (seed, batch, accumulate) in {"a": (1, 5, 1), "b": (1, 5, 2), "c": (2, 5, 1)}.items():
        batches = TrainBatches(data(augment=noisy), batch, accumulate, seed)
        drawn = [next(batches) for _ in range(4 // accumulate)]
        values, ids = (np.stack([each[name] for each in drawn]).reshape(20) for name in ("value", "id"))
        noises[run] = values - 10 * ids
        assert ((noises[run] >= 0) & (noises[run] < 1)).all()
        assert len(set(noises[run])) > 15, "the second epoch has its own"
    np.testing.assert_array_equal(noises["a"], noises["b"])
    assert (noises["a"] != noises["c"]).any()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("augment", [None, noisy])
def test_a_restored_stream_goes_on_as_if_it_had_not_stopped(augment, accumulate):
    """From the start, the middle of the first and of a later epoch; long after, so that batches were read ahead."""
    make = lambda: TrainBatches(data(augment=augment), 3, accumulate, seed=5)
    batches, states, seen = make(), [], []
    for _ in range(20):
        states.append(json.loads(json.dumps(batches.state())))
        seen.append(next(batches))
    for stop in (0, 1, 2, 11, 12):
        again = make()
        next(again)
        again.restore(states[stop])
        assert again.state() == states[stop]
        for expected in seen[stop : stop + 6]:
            got = next(again)
            for name, array in expected.items():
                np.testing.assert_array_equal(got[name], array)


def test_a_stream_restored_twice_in_a_row_goes_on_too():
    make = lambda: TrainBatches(data(), 4, 1, seed=5)
    whole, pieces = taken(make(), 9), []
    state = make().state()
    for _ in range(3):
        batches = make()
        batches.restore(state)
        pieces.append(taken(batches, 3))
        state = json.loads(json.dumps(batches.state()))
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_fewer_examples_than_a_step_needs_are_refused():
    TrainBatches(data(train=6), 3, 2, seed=0)
    with pytest.raises(DataError, match="numbers has 5 examples, fewer than one step of 6"):
        TrainBatches(data(train=5), 3, 2, seed=0)


@pytest.mark.parametrize(("held_out", "batch"), [(7, 3), (6, 3), (2, 5)])
def test_held_out_examples_are_each_seen_once(held_out, batch):
    seen = []
    for found in held_out_batches(data(held_out=held_out), batch):
        assert found["weight"].shape == found["id"].shape == (1, batch)
        assert found["value"].shape == (1, batch, 1)
        np.testing.assert_array_equal(found["value"][..., 0], 10 * found["id"])
        assert set(found["weight"].flat) <= {0.0, 1.0}
        seen += found["id"][found["weight"] == 1].tolist()
    assert seen == list(range(held_out))


def test_a_batch_s_number_tells_which_examples_it_has_and_in_which_order():
    ids = [[1, 2, 3], [1, 3, 2], [1, 2, 4], [1, 2]]
    numbers = [batch_id({"id": np.int32([row]), "value": np.float32(row)}) for row in ids]
    assert len(set(numbers)) == 4
    assert numbers[0] == batch_id({"id": np.int32([[1, 2, 3]]), "value": np.float32([0])})
    turned = np.int32([[1, 9], [2, 9], [3, 9]])[:, 0]
    assert numbers[0] == batch_id({"id": turned}), "memory layout does not count"
