"""What chips can do, by their makers' own figures, and the topologies they come in.

`network` is what one chip can send (or receive) over all its links together, half of the makers' "bidirectional"
figures: no collective is faster than that, so a time worked out with it is a lower bound.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from vlora_jax.errors import ConfigError, nearest

GB, GIB, TERA = 10**9, 2**30, 10**12


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      memory: bytes of HBM.
      bandwidth: bytes a second of HBM.
      flops: a second, dense bfloat16 products.
      network: bytes a second out of a chip, and as many into it, over its fast links (ICI, NVLink).
      shapes: slices that can be had; of GPUs, any number.
      source: of these figures.
      devices: that JAX sees in one chip.
    """

    name: str
    kind: Literal["tpu", "gpu"]
    memory: int
    bandwidth: int
    flops: int
    network: int
    shapes: tuple[str, ...]
    source: str
    devices: int = 1


FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
COUNTS = ("1", "2", "4", "8", "16", "32", "64", "128", "256")
TPU_DOCS = "https://docs.cloud.google.com/tpu/docs"
GPU_DOCS = "https://www.nvidia.com/en-us/data-center"

CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        # v4's links (6 × 50 GB/s each way): arXiv 2304.01433
        Chip("v4", "tpu", 32 * GIB, 1200 * GB, 275 * TERA, 300 * GB, CUBES, f"{TPU_DOCS}/v4", 2),
        Chip("v5e", "tpu", 16 * GIB, 819 * GB, 197 * TERA, 200 * GB, FLAT, f"{TPU_DOCS}/v5e"),
        Chip("v5p", "tpu", 95 * GIB, 2765 * GB, 459 * TERA, 600 * GB, (*CUBES, "16x16x24"), f"{TPU_DOCS}/v5p"),
        Chip("v6e", "tpu", 32 * GIB, 1638 * GB, 918 * TERA, 400 * GB, FLAT, f"{TPU_DOCS}/v6e"),
        Chip("tpu7x", "tpu", 192 * GIB, 7380 * GB, 2307 * TERA, 600 * GB, CUBES, f"{TPU_DOCS}/tpu7x", 2),
        Chip("a100", "gpu", 80 * GB, 2039 * GB, 312 * TERA, 300 * GB, COUNTS, f"{GPU_DOCS}/a100/"),
        Chip("h100", "gpu", 80 * GB, 3350 * GB, 989 * TERA, 450 * GB, COUNTS, f"{GPU_DOCS}/h100/"),
        Chip("h200", "gpu", 141 * GB, 4800 * GB, 989 * TERA, 450 * GB, COUNTS, f"{GPU_DOCS}/h200/"),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice of chips, `"v5e:4x4"`, or so many GPUs, `"h100:8"`."""

    chip: Chip
    shape: str

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}"

    @property
    def chips(self) -> int:
        """How many there are.

        >>> topology("v5e:4x4").chips
        16
        """
        return math.prod(int(size) for size in self.shape.split("x"))

    @property
    def devices(self) -> int:
        """How many JAX sees."""
        return self.chips * self.chip.devices


def topologies() -> list[str]:
    """All names, chip by chip."""
    return [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.shapes]


def topology(name: str) -> Topology:
    """The topology of this name.

    Raises:
      ConfigError: there is none; the nearest are named.
    """
    kind, _, shape = name.strip().lower().partition(":")
    chip = CHIPS.get(kind)
    gpus = chip is not None and chip.kind == "gpu" and re.fullmatch(r"[1-9]\d*", shape)
    if chip is not None and (shape in chip.shapes or gpus):
        return Topology(chip, shape)
    choices = topologies() if chip is None else [f"{kind}:{each}" for each in chip.shapes]
    raise ConfigError(
        f"topology {name!r} is unknown; nearest: {', '.join(nearest(name, choices))}; "
        f"chips: {', '.join(CHIPS)}; of {kind if chip else 'v5e'}: {', '.join((chip or CHIPS['v5e']).shapes)}"
    )
