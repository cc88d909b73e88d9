"""Which rows of a batch each process reads, and the batch that they make together.

The global batch of a step is the same rows in the same order, however many processes read it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlora_jax.distributed.specs import batch_sharding


def local_rows(batch: int, mesh: Mesh) -> list[int]:
    """Rows of a batch of that many that this process's devices need, in order: all of them with one process."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((1, batch)).values()
    return sorted({row for part in parts if part is not None for row in range(*part[1].indices(batch))})


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch on the devices of all processes.

    Args:
      batch: arrays `(micro-batches, examples, …)`: `id` of the whole batch, the others whole or of this process's rows.
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(dict(batch), sharding)
    whole = batch["id"].shape[1]
    rows = local_rows(whole, mesh)

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[1].indices(whole)
            if array.shape[1] != whole:  # a device's rows follow each other, so they do in what was read
                start, stop = rows.index(start), rows.index(start) + stop - start
            return array[:, start:stop]

        return jax.make_array_from_callback((array.shape[0], whole, *array.shape[2:]), sharding, part)

    return {name: place(np.asarray(array)) for name, array in batch.items()}
