"""What a function asks, while it is traced, of the mesh that it will run on (`jax.set_mesh`)."""

import math

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from vlora_jax.distributed.mesh import BATCH_AXES


def target() -> str:
    """The platform that is compiled for: that of the mesh, which need not be this machine's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def batch_axes() -> tuple[str, ...]:
    """Axes of the mesh that share a batch: of those that are left to the compiler, not that `shard_map` has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return tuple(axis for axis in BATCH_AXES if kinds.get(axis) == AxisType.Auto)


def batch_ways() -> int:
    """Devices that share a batch."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in batch_axes())


def automatic() -> bool:
    """Whether the compiler lays arrays out, as it does outside `shard_map` and of axes that are not explicit."""
    return all(kind == AxisType.Auto for kind in jax.sharding.get_abstract_mesh().axis_types)


def split_batch(x: Array, axis: int = 0) -> Array:
    """`x` with its batch over the devices that share it and nothing else split, and so its gradient.

    Left to itself the compiler may follow a kernel's split instead and gather activations of the whole batch; and where
    all three mesh axes are split, its partitioner (jaxlib 0.10.2) makes wrong gradients of a loss in chunks, with axes
    left unconstrained too.
    """
    ways = batch_ways()
    if ways == 1 or not automatic() or x.shape[axis] % ways:
        return x
    return jax.lax.with_sharding_constraint(x, P(*(None,) * axis, batch_axes()))
