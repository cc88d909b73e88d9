"""Sweeps: many runs that differ in the values of a grid, as many as possible trained in one program.

A sweep is a YAML file: a run's config with changes, and a grid of keys with values. Members share a program where only
numbers differ: seed, length, the optimiser's numbers, early stopping, and of LoRA and its kin also rank, alpha and
targets. Members that differ in anything else are trained in several programs, one after the other.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PositiveInt, ValidationError

from vlora_jax.checkpoint import make_directory
from vlora_jax.data.dataset import DataSet
from vlora_jax.errors import ConfigError, ResumeError, VloraError
from vlora_jax.experiments.joint import place_of_one
from vlora_jax.training.config import PretrainedConfig, RunConfig, Section, load_config
from vlora_jax.training.job import Job, described
from vlora_jax.training.reading import explain, flat_keys, read_yaml
from vlora_jax.training.runs import differing, write_whole

SWEEP = "sweep.yaml"  # in the directory of the results
# What may differ between the members of one program: it comes in as a number, or stays outside of the program.
OWN = (
    "seed", "steps", "evaluate.every", "evaluate.patience", "optimizer.rate", "optimizer.schedule", "optimizer.warmup",
    "optimizer.end", "optimizer.decay", "optimizer.clip", "optimizer.b1", "optimizer.b2", "optimizer.eps",
    "optimizer.groups",
)  # fmt: skip
COMMON = ("run_dir", "log", "checkpoint", "mesh", "distributed", "evaluate.metric", "evaluate.batch")
SEED = "seed"


class SweepConfig(Section):
    """A sweep: every combination of the grid's values is a member."""

    results: str = Field(description="directory of the results")
    config: str | None = Field(default=None, description="a run's YAML file; null: the embedded digits run")
    set: list[str] = Field(default=[], description="changes to it, key.sub=value; {seed} is the member's seed")
    grid: dict[str, list[Any]] = Field(description="values by key of the run's config")
    together: PositiveInt | None = Field(default=None, description="members of a program at most; null: all that can")
    keep: Literal["winner", "all"] = Field(default="winner", description="of whom a run directory is written")


@dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
      number: its place in the grid.
      values: of the grid's keys.
      config: of the run, except for its directory.
    """

    number: int
    values: dict[str, Any]
    config: RunConfig

    @property
    def name(self) -> str:
        """The grid's values in a few words."""
        return named(self.values)

    @property
    def setting(self) -> str:
        """The same without the seed: members of one setting are repetitions."""
        return named({key: value for key, value in self.values.items() if key != SEED}) or "all"


@dataclass(frozen=True)
class Program:
    """Members that train together, with their jobs."""

    members: tuple[Member, ...]
    jobs: tuple[Job, ...]


def named(values: dict[str, Any]) -> str:
    """Values by key in a few words, keys without their sections where that is enough.

    >>> named({"optimizer.rate": 0.01, "adapter.rank": 4})
    'rate 0.01, rank 4'
    """
    last = [key.rpartition(".")[2] for key in values]
    short = {key: end if last.count(end) == 1 else key for key, end in zip(values, last, strict=True)}
    text = lambda value: value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else f"{value}"
    return ", ".join(f"{short[key]} {text(value)}" for key, value in values.items())


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """A sweep from its YAML file.

    Args:
      path: the file.
      overrides: further changes to all members.

    Raises:
      ConfigError: the file is missing or no YAML, a key unknown, a value impossible, the grid empty.
    """
    try:
        sweep = SweepConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, SweepConfig)}") from None
    if not sweep.grid:
        raise ConfigError(f"{path}: grid is empty; give it keys with values, as optimizer.rate: [1e-3, 3e-3]")
    for key, values in sweep.grid.items():
        if not values:
            raise ConfigError(f"{path}: grid: {key} has no values")
        common = next((each for each in COMMON if f"{key}.".startswith(f"{each}.")), None)
        if common is not None:
            raise ConfigError(f"{path}: grid: {key} is the same for all members of a sweep; give it in set")
        again = next((value for place, value in enumerate(values) if value in values[:place]), None)
        if again is not None:
            raise ConfigError(f"{path}: grid: {key} lists {again} twice")
    changes = [*sweep.set, *overrides]
    if any("{seed}" in change for change in changes) and SEED not in sweep.grid:
        raise ConfigError(f"{path}: a change has {{seed}} in it, but the grid has no seed")
    return sweep.model_copy(update={"set": changes})


def members(sweep: SweepConfig) -> list[Member]:
    """Every combination of the grid's values, the last key's values changing first.

    Raises:
      ConfigError: a key is unknown (the nearest is named), a value impossible, or two members are the same run.
    """
    found: list[Member] = []
    seen: dict[str, str] = {}
    for number, combination in enumerate(itertools.product(*sweep.grid.values())):
        values = dict(zip(sweep.grid, combination, strict=True))
        changes = [change.replace("{seed}", str(values.get(SEED))) for change in sweep.set]
        changes += [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
        try:
            config = load_config(None if sweep.config is None else Path(sweep.config), changes)
        except VloraError as error:
            raise ConfigError(f"grid, {named(values)}: {error}") from None
        member = Member(number, values, config)
        text = json.dumps(config.decisive(), sort_keys=True)
        if text in seen:
            raise ConfigError(f"grid: {seen[text]!r} and {member.name!r} are the same run; drop one of them")
        seen[text] = member.name
        found.append(member)
    return found


def programs(found: Sequence[Member], devices: Sequence[Any], together: int | None = None) -> list[Program]:
    """Members by the program that they can share, in the order of the grid.

    Args:
      devices: to run on.
      together: members of a program at most.

    Raises:
      ConfigError: what a member's config asks for is impossible.
    """
    data: dict[str, DataSet] = {}
    shapes: dict[str, Job] = {}
    groups: dict[str, list[tuple[Member, Job]]] = {}
    for member in found:
        config, place = place_of_one(member.config, devices)
        reads, shape = (json.dumps(each, sort_keys=True) for each in (read_by(config), shape_of(config)))
        try:
            if shape not in shapes:
                shapes[shape] = Job.of(config, place, data.get(reads))
            job = shapes[shape].with_config(config)
        except VloraError as error:
            raise ConfigError(f"{member.name}: {error}") from None
        data[reads] = job.data
        groups.setdefault(json.dumps(shared_by(job), sort_keys=True), []).append((member, job))
    made = []
    for group in groups.values():
        count = -(-len(group) // (together or len(group)))
        size = -(-len(group) // count)
        chunks = [group[start : start + size] for start in range(0, len(group), size)]
        made += [Program(tuple(m for m, _ in chunk), tuple(job for _, job in chunk)) for chunk in chunks]
    return made


def read_by(config: RunConfig) -> list[Any]:
    """What the data set depends on."""
    plain = config.plain()
    return [plain[name] for name in ("data", "model", "init_from")]


def shape_of(config: RunConfig) -> dict[str, Any]:
    """What shapes and the method depend on: members in which it is the same differ in numbers only."""
    kept = {key: value for key, value in flat_keys(config.plain()).items() if not starts_with(key, (*OWN, "run_dir"))}
    if config.adapter is None:
        return kept
    return without(kept, "adapter") | {"adapter": config.adapter.for_run(config.steps).config()}


def shared_by(job: Job) -> dict[str, Any]:
    """What members of one program have in common."""
    config, kept = job.config, shape_of(job.config)
    seed = {SEED: config.seed} if frozen_at_random(job) else {}
    if config.adapter is None or config.optimizer.name == "adafactor":  # its means are over all rows and columns
        return kept | seed
    return kept | {"adapter": config.adapter.for_run(config.steps).joined().config()} | seed


def starts_with(key: str, sections: Sequence[str]) -> bool:
    """Whether a dotted key is one of these or within one of them."""
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


def without(flat: dict[str, Any], section: str) -> dict[str, Any]:
    """Flat values without those of a section."""
    return {key: value for key, value in flat.items() if not starts_with(key, (section,))}


def drawn(config: RunConfig) -> tuple[str, ...] | None:
    """Paths of a model's parameters that are drawn from the seed; None for all of them."""
    if config.init_from is not None:
        return ()
    return described(config.model).plan.fresh if isinstance(config.model, PretrainedConfig) else None


def frozen_at_random(job: Job) -> bool:
    """Whether what stays frozen is drawn from the seed, so that members of other seeds have another base."""
    fresh, adapter = drawn(job.config), job.subject.adapter
    if adapter is None:
        return False
    return fresh is None or any(path not in adapter.trainable["full"] for path in fresh)


def open_sweep(sweep: SweepConfig, first: Member, write: bool = True) -> None:
    """Make the directory of a sweep's results, or make sure that the one that is there belongs to it.

    Args:
      sweep: whose results they are to be.
      first: its first member, which stands for what all have in common.
      write: false to look only.

    Raises:
      ResumeError: it belongs to another sweep (the differing keys are listed), or holds something else.
      ResourceError: it cannot be written.
    """
    results = Path(sweep.results)
    about = {"sweep": sweep.model_dump(mode="json"), "first": first.config.decisive()}
    if (results / SWEEP).exists():
        known = read_yaml(results / SWEEP)
        flat = lambda about: without(flat_keys(about["sweep"]), "keep") | about["first"]
        try:
            differences = differing(flat(known), flat(about))
        except (KeyError, TypeError, AttributeError):
            raise ResumeError(f"{results / SWEEP} is damaged; move {results} away to start again") from None
        if differences:
            raise ResumeError(f"{results} belongs to another sweep: {differences}; choose another results")
    elif results.is_dir() and any(not path.name.startswith(".") for path in results.iterdir()):
        raise ResumeError(f"results {results} is not empty and holds no sweep; choose another results")
    if not write:
        return
    make_directory(results)
    write_whole(results / SWEEP, yaml.safe_dump(about, sort_keys=False))
