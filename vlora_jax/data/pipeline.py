"""The order in which a run sees its data, and its exact continuation, by grain."""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from vlora_jax.data.dataset import DataSet, Example
from vlora_jax.errors import DataError

ENDLESS = 2**52  # examples; grain counts batches in floats, which lose count of its own endless repetition


class TrainBatches:
    """An endless, shuffled stream of batches whose position can be saved and restored in constant time.

    Args:
      data: what to read.
      batch: examples a micro-batch.
      accumulate: micro-batches a step; arrays are `(accumulate, batch, …)`.
      seed: of the order, new in every epoch, and of the augmentation.
      rows: of a micro-batch, to read no others: what is this process's. `id` is that of all rows all the same, and
        order and position do not depend on it.

    Raises:
      DataError: fewer examples than one step needs.
    """

    def __init__(self, data: DataSet, batch: int, accumulate: int, seed: int, rows: Sequence[int] | None = None):
        if len(data.train) < batch * accumulate:
            raise DataError(f"{data.name} has {len(data.train)} examples, fewer than one step of {batch * accumulate}")
        epochs = ENDLESS // len(data.train)
        stream = grain.MapDataset.source(data.train).seed(seed).shuffle().repeat(epochs)
        if data.augment is not None:
            stream = stream.random_map(data.augment)
        if rows is None or len(rows) == batch:
            stream = stream.batch(batch).batch(accumulate)
        else:
            order = grain.MapDataset.range(len(data.train)).seed(seed).shuffle().repeat(epochs)
            stream = of_rows(stream, order, rows, batch, accumulate)
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


def of_rows(
    stream: grain.MapDataset, order: grain.MapDataset, rows: Sequence[int], batch: int, accumulate: int
) -> grain.MapDataset:
    """Steps of a stream of examples with some rows of each micro-batch only, and the `id` of all.

    Args:
      order: numbers of the stream's examples.
    """
    place = lambda index: index // len(rows) * batch + rows[index % len(rows)]
    some = grain.MapDataset.range(ENDLESS // batch * len(rows)).map(lambda index: stream[place(index)])

    def with_ids(step: int, found: Example) -> Example:
        first = step * accumulate * batch
        ids = [order[first + i] for i in range(accumulate * batch)]
        return found | {"id": np.asarray(ids, found["id"].dtype).reshape(accumulate, batch)}

    return some.batch(len(rows)).batch(accumulate).map_with_index(with_ids)


def held_out_batches(data: DataSet, batch: int, rows: Sequence[int] | None = None) -> Iterator[Example]:
    """All held-out examples once, in order; the last batch is filled up with examples of weight 0.

    Every batch has the same shapes and a `weight` `(1, batch)`; arrays are `(1, batch, …)` like a training step's.

    Args:
      rows: of a batch, to read no others; `id` is that of all rows all the same.
    """
    for start in range(0, len(data.held_out), batch):
        indices = [min(start + i, len(data.held_out) - 1) for i in range(batch)]
        rows = range(batch) if rows is None else rows
        read = [data.held_out[indices[row]] for row in rows]
        stacked = {name: np.stack([row[name] for row in read])[None] for name in read[0]}
        real = np.asarray([start + row < len(data.held_out) for row in rows], np.float32)[None]
        yield stacked | {"weight": real, "id": np.asarray(indices, stacked["id"].dtype)[None]}


def batch_id(batch: Example) -> int:
    """A number that tells which examples are in a batch and in what order."""
    return zlib.crc32(np.ascontiguousarray(batch["id"]).tobytes())
