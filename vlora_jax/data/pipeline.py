"""The order in which a run sees its data, and its exact continuation, by grain."""

import zlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from vlora_jax.data.dataset import DataSet, Example
from vlora_jax.errors import DataError


class TrainBatches:
    """An endless, shuffled stream of batches whose position can be saved and restored in constant time.

    Args:
      data: what to read.
      batch: examples a micro-batch.
      accumulate: micro-batches a step; arrays are `(accumulate, batch, …)`.
      seed: of the order, new in every epoch, and of the augmentation.

    Raises:
      DataError: fewer examples than one step needs.
    """

    def __init__(self, data: DataSet, batch: int, accumulate: int, seed: int):
        if len(data.train) < batch * accumulate:
            raise DataError(f"{data.name} has {len(data.train)} examples, fewer than one step of {batch * accumulate}")
        stream = grain.MapDataset.source(data.train).seed(seed).shuffle().repeat(None)
        if data.augment is not None:
            stream = stream.random_map(data.augment)
        stream = stream.batch(batch).batch(accumulate)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        self._iterator = iter(stream.to_iter_dataset(read_options=options))

    def __iter__(self) -> Iterator[Example]:
        return self

    def __next__(self) -> Example:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """The position, as JSON."""
        return self._iterator.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


def held_out_batches(data: DataSet, batch: int) -> Iterator[Example]:
    """All held-out examples once, in order; the last batch is filled up with examples of weight 0.

    Every batch has the same shapes and a `weight` `(1, batch)`; arrays are `(1, batch, …)` like a training step's.
    """
    for start in range(0, len(data.held_out), batch):
        indices = [min(start + i, len(data.held_out) - 1) for i in range(batch)]
        rows = [data.held_out[index] for index in indices]
        stacked = {name: np.stack([row[name] for row in rows])[None] for name in rows[0]}
        real = np.arange(start, start + batch) < len(data.held_out)
        yield stacked | {"weight": real.astype(np.float32)[None]}


def batch_id(batch: Example) -> int:
    """A number that tells which examples are in a batch and in what order."""
    return zlib.crc32(np.ascontiguousarray(batch["id"]).tobytes())
