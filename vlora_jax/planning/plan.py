"""A plan: what the compiler found, held against what the chips can do."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlora_jax.distributed.chips import Chip, Topology
from vlora_jax.distributed.mesh import AXES, BATCH_AXES, check_ways, filled
from vlora_jax.hub.architecture import find_config
from vlora_jax.planning.compiler import Compiler
from vlora_jax.planning.worker import Request
from vlora_jax.training.config import PretrainedConfig, RunConfig

LASTING = ("base", "adapter", "optimizer", "batch")


@dataclass(frozen=True)
class Bounds:
    """Seconds that a step takes at least, by what it needs of a chip, and the tokens a second that this leaves.

    Attributes:
      compute: products at the chip's peak, evenly over all chips.
      memory: what must go through HBM: arguments read, the new state written, results of collectives written and read.
      network: bytes that a chip must receive, over all its links at once.
    """

    compute: float
    memory: float
    network: float
    tokens: float

    @property
    def step(self) -> float:
        """The largest of the three: they may overlap."""
        return max(self.compute, self.memory, self.network)

    @property
    def by(self) -> str:
        """Which of them it is."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


@dataclass(frozen=True)
class Plan:
    """What one step of a run takes on a topology; bytes and collectives are those of one chip.

    Attributes:
      model: its source or family.
      changes: what was changed against the config, as overrides.
      fits: the program fits into the chip's memory.
      memory: bytes by part; `temporaries` is the peak without the others. Without a peak where it does not fit.
      hbm: bytes of the chip.
      needed: bytes that a program needed which does not fit, and what the compiler allows.
      collectives: by kind; see `inspection.hlo.collectives`.
      flops: of a step, over all chips.
      tokens: of a step, padding included, or examples where there are no tokens.
      unit: `"tokens"` or `"examples"`.
      seconds: of planning, by stage.
      analytic: worked out by formulas, without a compiler.
    """

    model: str
    topology: str
    chips: int
    devices: int
    mesh: dict[str, int]
    parameters: int
    changes: tuple[str, ...]
    fits: bool
    memory: dict[str, int]
    hbm: int
    needed: int | None
    available: int | None
    collectives: dict[str, dict[str, int]]
    flops: float
    tokens: int
    unit: str
    bounds: Bounds | None
    seconds: dict[str, float]
    analytic: bool = False

    @property
    def peak(self) -> int | None:
        """Bytes of one chip at the worst moment; what a program that does not fit would need."""
        return self.memory.get("peak", self.needed)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        derived = {} if self.bounds is None else {"step": self.bounds.step, "by": self.bounds.by}
        whole = asdict(self)
        return whole | {"bounds": None if self.bounds is None else whole["bounds"] | derived}


def bounds(chip: Chip, chips: int, flops: float, moved: float, wire: float, tokens: int) -> Bounds:
    """Lower bounds of a step.

    Args:
      chips: that share the products.
      flops: of the step.
      moved, wire: bytes through one chip's HBM, and into one chip.
      tokens: of the step.
    """
    compute = flops / (chips * chip.flops)
    memory, network = moved / chip.bandwidth, wire / chip.network
    return Bounds(compute, memory, network, tokens / max(compute, memory, network))


def model_file(config: RunConfig, given: Path | None, config_path: Path | None) -> Path | None:
    """The architecture of a pretrained model: given, with the model, in the hub's cache, or beside the config.

    Raises:
      ModelFileError: there is none.
    """
    if not isinstance(config.model, PretrainedConfig):
        return None
    folder = None if config_path is None else config_path.parent / "models"
    return find_config(config.model.source, given, folder)


def tokens_of(config: RunConfig) -> int:
    """Tokens of a step; examples, where rows have no length."""
    rows = config.data.batch * config.accumulate
    return rows * (getattr(config.data, "length", None) or 1)


def check(config: RunConfig, topology: Topology) -> None:
    """Raises ConfigError if the mesh does not multiply to the topology's devices, or they cannot share the batch."""
    sizes = dict(zip(AXES, filled(**config.mesh.sizes, devices=topology.devices), strict=True))
    check_ways(config.data.batch, math.prod(sizes[axis] for axis in BATCH_AXES))


def plan(
    config: RunConfig,
    topology: Topology,
    compiler: Compiler,
    model: Path | None = None,
    changes: tuple[str, ...] = (),
    text: Path | None = None,
) -> Plan:
    """Compile a run's train step for a topology.

    Args:
      compiler: of that topology.
      model: the `config.json` of a pretrained model.
      changes: that made this config from the user's, to be told.
      text: where to write the optimised program.

    Raises:
      VloraError: what the config asks for is impossible, or the compiler failed.
    """
    check(config, topology)
    where = None if model is None else str(model.absolute())
    request = Request(config.plain(), where, topology.name, None if text is None else str(text))
    return made(config, topology, compiler.ask(request), changes)


def made(config: RunConfig, topology: Topology, found: dict[str, Any], changes: tuple[str, ...] = ()) -> Plan:
    """A plan from a compiler's answer."""
    chip, chips, devices = topology.chip, topology.chips, found["devices"]
    cores = max(1, devices // chips)  # devices that are parts of one chip
    parts = {name: size * cores for name, size in found["bytes"].items()}
    lasting = sum(parts.get(name, 0) for name in LASTING)
    if "peak" in parts:
        parts["temporaries"] = parts["peak"] - lasting
    traffic = {
        kind: {"count": each["count"], "bytes": each["bytes"] * cores, "wire": each["wire"] * cores}
        for kind, each in found.get("collectives", {}).items()
    }
    limits = None
    if "collectives" in found:
        moved = lasting + parts["adapter"] + parts["optimizer"] + 2 * sum(each["bytes"] for each in traffic.values())
        wire = sum(each["wire"] for each in traffic.values())
        limits = bounds(chip, chips, found["flops"], moved, wire, tokens_of(config))
    section = config.model
    scaled = lambda name: None if found.get(name) is None else found[name] * cores
    return Plan(
        model=section.source if isinstance(section, PretrainedConfig) else getattr(section, "family", "model"),
        topology=topology.name,
        chips=chips,
        devices=devices,
        mesh=found["mesh"],
        parameters=found["parameters"],
        changes=changes,
        fits=found["fits"],
        memory=parts,
        hbm=chip.memory,
        needed=scaled("needed"),
        available=scaled("available"),
        collectives=traffic,
        flops=found["flops"],
        tokens=tokens_of(config),
        unit="tokens" if getattr(config.data, "length", None) else "examples",
        bounds=limits,
        seconds=found["seconds"],
        analytic=found.get("analytic", False),
    )
