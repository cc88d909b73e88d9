"""Activations stay split over the batch, whatever XLA would make of kernels that are split over the same devices.

A kernel's inputs lie over `fsdp`, as the batch does. Left alone, XLA gathers the activations of the whole batch and
adds up partial products of them, as large as all activations; told that they stay split, it gathers the kernel.

Beside a split `tensor` axis all is left to XLA: with all three axes split, its partitioner (jaxlib 0.10.2) makes a
program of these constraints that computes other gradients.
"""

import math
from typing import TypeVar

import jax
from jax.sharding import PartitionSpec as P

from vlora_jax.distributed.mesh import BATCH_AXES

A = TypeVar("A", bound=jax.Array)


def by_row(x: A) -> A:
    """`x` with its first axis, the batch, split over `data` and `fsdp` of the mesh in use; the rest is XLA's choice."""
    if not applies(x):
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def looked_up(x: A) -> A:
    """Rows `(batch, length, features)` of an embedding table, whose features lie over `fsdp`, split over the batch.

    In two steps, of which each is one exchange; XLA would put all of it on every device in between.
    """
    if applies(x) and x.shape[-1] % jax.sharding.get_abstract_mesh().shape["fsdp"] == 0:
        x = jax.lax.with_sharding_constraint(x, P("data", None, "fsdp"))
    return by_row(x)


def applies(x: jax.Array) -> bool:
    """Whether there is a mesh with the axes in question, and the batch divides."""
    sizes = jax.sharding.get_abstract_mesh().shape
    ways = math.prod(sizes.get(axis, 1) for axis in BATCH_AXES)
    return sizes.get("fsdp", 1) > 1 and x.shape[0] % ways == 0
