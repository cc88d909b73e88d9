"""The device mesh of a run."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from vlora_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
AUTO = (AxisType.Auto,) * len(AXES)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or the given ones; one size may be -1 and takes what the others leave.

    Raises:
      ConfigError: the sizes don't multiply to the number of devices, or would split `tensor` over slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = filled(data, fsdp, tensor, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=AUTO, devices=devices)
    return Mesh(over_slices(sizes, slices, devices), AXES, axis_types=AUTO)


def abstract_mesh(data: int, fsdp: int, tensor: int, devices: int) -> AbstractMesh:
    """The mesh of that many devices which are not here.

    Raises:
      ConfigError: the sizes don't multiply to their number.
    """
    return AbstractMesh(filled(data, fsdp, tensor, devices), AXES, axis_types=AUTO)


def filled(data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, ...]:
    """The sizes of all axes.

    >>> filled(-1, 2, 2, devices=16)
    (4, 2, 2)

    Raises:
      ConfigError: they don't multiply to the number of devices.
    """
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = devices // known if known > 0 and devices % known == 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != devices:
        shown = " × ".join(f"{name} {size}" for name, size in zip(AXES, (data, fsdp, tensor), strict=True))
        raise ConfigError(f"mesh {shown} does not multiply to the {devices} devices there are")
    return tuple(sizes)


def over_slices(sizes: tuple[int, ...], slices: int, devices: Sequence[Any]) -> np.ndarray:
    """Devices of several slices, between which links are slow, in the order of a mesh.

    `data` goes over slices as far as it divides, then `fsdp`; `tensor`, which talks most, stays within one.

    Raises:
      ConfigError: that is not possible.
    """
    data, fsdp, tensor = sizes
    outer = math.gcd(data, slices)
    rest = slices // outer
    if fsdp % rest:
        raise ConfigError(
            f"mesh data {data} × fsdp {fsdp} × tensor {tensor} cannot be laid over {slices} slices, whose links are "
            f"too slow for tensor: data × fsdp must be a multiple of {slices}"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // outer, fsdp // rest, tensor),
        (outer, rest, 1),
        devices,
        allow_split_physical_axes=devices[0].device_kind in ("TPU v5 lite", "TPU v5e"),  # as in jax.make_mesh
    )


def whole_batch(batch: int, mesh: Mesh) -> int:
    """The least multiple of the devices that share a batch, `batch` or above."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return -(-batch // ways) * ways


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises ConfigError if a micro-batch cannot be split evenly over the mesh."""
    check_ways(batch, math.prod(mesh.shape[axis] for axis in BATCH_AXES))


def check_ways(batch: int, ways: int) -> None:
    """Raises ConfigError if a micro-batch cannot be split evenly over so many devices."""
    if batch % ways:
        raise ConfigError(f"data.batch {batch} cannot be split over {ways} devices (mesh axes data × fsdp)")


def check_sequence(length: int | None, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError if rows of so many tokens cannot be split over `tensor` between a block's branches.

    Args:
      length: None where the model is no decoder.
    """
    data, fsdp, tensor = (mesh.shape[axis] for axis in AXES)
    if length is None:
        raise ConfigError("mesh.sequence splits the rows of a decoder; this model is none")
    if tensor == 1:
        raise ConfigError("mesh.sequence splits rows over mesh.tensor, which is 1")
    if min(data, fsdp) > 1:
        raise ConfigError(
            f"mesh.sequence with data {data} × fsdp {fsdp} × tensor {tensor}: one of data and fsdp must be 1; where "
            "all three are above, XLA's partitioner has computed other gradients"
        )
    if length % tensor:
        raise ConfigError(f"mesh.sequence: rows of {length} tokens cannot be split over mesh.tensor {tensor}")
