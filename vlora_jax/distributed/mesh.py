"""The device mesh of a run."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from vlora_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all devices, or the given ones; one size may be -1 and takes what the others leave.

    Raises:
      ConfigError: the sizes don't multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // known if len(devices) % known == 0 else 0
    if math.prod(sizes) != len(devices):
        shown = " × ".join(f"{name} {size}" for name, size in zip(AXES, (data, fsdp, tensor), strict=True))
        raise ConfigError(f"mesh {shown} does not multiply to the {len(devices)} devices there are")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def whole_batch(batch: int, mesh: Mesh) -> int:
    """The least multiple of the devices that share a batch, `batch` or above."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return -(-batch // ways) * ways


def check_batch(batch: int, mesh: Mesh) -> None:
    """Raises ConfigError if a micro-batch cannot be split evenly over the mesh."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch % ways:
        raise ConfigError(f"data.batch {batch} cannot be split over {ways} devices (mesh axes data × fsdp)")
