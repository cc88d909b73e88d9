"""Methods beside each other: each over tasks and seeds, one JSON file a run, and only what is missing is run.

A comparison is a YAML file: tasks are configs of runs with changes, methods are further changes, and every method meets
every task with the same seeds, so that differences can be taken seed by seed. `{seed}` in a change is the run's seed,
as in `data.shots_seed={seed}` for a new draw of few-shot rows with every seed. A budget is one of steps, which the
task's config sets, and if wanted one of numbers, to which each method's size is fitted.
"""

import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from jax.experimental.compilation_cache import compilation_cache
from pydantic import Field, PositiveInt, ValidationError
from rich.console import Console

from vlora_jax.adapters.adapter import count
from vlora_jax.checkpoint import make_directory
from vlora_jax.errors import CheckpointError, ConfigError, NonFiniteError, VloraError, nearest
from vlora_jax.experiments.budget import fitted
from vlora_jax.training.config import ADDED, RunConfig, Section, load_config
from vlora_jax.training.evaluate import held_out_marks
from vlora_jax.training.job import load_data
from vlora_jax.training.loop import train
from vlora_jax.training.opened import open_model, open_start
from vlora_jax.training.progress import LIBRARIES
from vlora_jax.training.reading import explain, read_yaml
from vlora_jax.training.runs import write_whole

IGNORED = ("run_dir", "log", "checkpoint")  # of a run's config: they change nothing that is compared


class Budget(Section):
    """How much a method may train."""

    numbers: PositiveInt = Field(description="beside what is trained whole; a method's size is the largest that fits")


class TaskConfig(Section):
    """What every method is to learn."""

    config: str | None = Field(default=None, description="a run's YAML file; null: the embedded digits run")
    set: list[str] = Field(default=[], description="changes to it, key.sub=value; {seed} is the run's seed")
    seeds: PositiveInt | None = Field(default=None, description="runs of each method; null: those of the comparison")
    metric: Literal["accuracy", "loss"] = Field(default="accuracy", description="what methods are judged by")
    budget: Budget | None = Field(default=None, description="numbers that a method may train; null: as it is set")
    forget: list[str] = Field(
        default=[], description="changes, as of data, to what the model could do before: how much its loss rises"
    )
    prepare: list[str] = Field(
        default=[], description="configs of the runs that it starts from, trained first where they are not there"
    )


class CompareConfig(Section):
    """A comparison; the order of tasks and methods is that of the report."""

    results: str = Field(description="directory of the results, one JSON file a run")
    seeds: PositiveInt = Field(default=3, description="runs of each method on a task")
    baseline: str = Field(default="lora", description="the method that the others' differences are taken from")
    tasks: dict[str, TaskConfig] = Field(min_length=1)
    methods: dict[str, list[str] | None] = Field(
        min_length=1, description="changes to a task's config; null: adapter.method=NAME"
    )
    grid: dict[str, Annotated[list[str | int | float], Field(min_length=1)]] = Field(
        default={}, description="values by key: every method is run with each, under the name method@value"
    )

    def arms(self) -> dict[str, list[str]]:
        """Changes by method, and by value of the grid's keys where there is one."""
        found = {name: [f"adapter.method={name}"] if own is None else own for name, own in self.methods.items()}
        for key, values in self.grid.items():
            found = {f"{arm}@{value}": [*own, f"{key}={value}"] for arm, own in found.items() for value in values}
        return found


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
      config: of the run, except for its directory.
      path: of its result.
      before: the same config on data that the model was good at before; None if that is not asked.
    """

    task: str
    method: str
    seed: int
    config: RunConfig
    path: Path
    before: RunConfig | None = None

    @property
    def key(self) -> str:
        """Of all that decides the result; a result with another one is out of date."""
        plain = {name: value for name, value in self.config.plain().items() if name not in IGNORED}
        plain = {name: value for name, value in plain.items() if value is not None or name not in ADDED}
        if self.before is not None:
            plain["before"] = self.before.plain()["data"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Record:
    """What one run came to.

    Attributes:
      key: of the config it was run with.
      accuracy, loss: on the held-out rows after the last step; None if it failed.
      trained: numbers that the adapter trains, or the model without one.
      whole: numbers of parameters that are trained whole beside the adapter, such as a new head.
      rate: peak learning rate.
      seconds: of training and evaluation, compilation included.
      cpu_seconds: of the same, over all threads, with reading data and model: other work on the machine matters less.
      failure: why it has no result, in one line.
      about: versions, machine, time.
      bytes: of the adapter's tensors, frozen ones too, as a checkpoint keeps them, or of the model without one.
      forgetting: by how much the loss on what the model could do before rose; None if that was not asked.
    """

    task: str
    method: str
    seed: int
    key: str
    accuracy: float | None
    loss: float | None
    trained: int
    whole: int
    rate: float
    steps: int
    seconds: float
    cpu_seconds: float
    failure: str = ""
    about: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None
    forgetting: float | None = None


def load_comparison(path: Path) -> CompareConfig:
    """A comparison from its YAML file.

    Raises:
      ConfigError: the file is missing or no YAML, a key unknown, a value impossible, the baseline no method.
    """
    try:
        comparison = CompareConfig.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, CompareConfig)}") from None
    if comparison.baseline not in (arms := comparison.arms()):
        raise ConfigError(
            f"{path}: baseline {comparison.baseline!r} is none of the methods; nearest: "
            f"{nearest(comparison.baseline, arms, 1)[0]!r}"
        )
    return comparison


def chosen(names: Sequence[str] | None, there: Sequence[str], what: str) -> list[str]:
    """Those of the names that were asked for, all without asking, in their own order.

    Raises:
      ConfigError: one is not there.
    """
    for name in names or ():
        if name not in there:
            raise ConfigError(f"the comparison has no {what} {name!r}; nearest: {nearest(name, there, 1)[0]!r}")
    return [name for name in there if not names or name in names]


def cells(
    comparison: CompareConfig, tasks: Sequence[str] | None = None, methods: Sequence[str] | None = None
) -> list[Cell]:
    """All runs of a comparison, or those of some tasks and methods: seed by seed, so that methods stay comparable.

    Raises:
      ConfigError: a task or a method is unknown, or a run's config is impossible.
    """
    found, arms = [], comparison.arms()
    for task in chosen(tasks, list(comparison.tasks), "task"):
        section = comparison.tasks[task]
        for seed in range(section.seeds or comparison.seeds):
            for method in chosen(methods, list(arms), "method"):
                changes = [*section.set, *arms[method], f"seed={seed}"]
                changes = [change.replace("{seed}", str(seed)) for change in changes]
                file = None if section.config is None else Path(section.config)
                try:
                    config = load_config(file, changes)
                    before = load_config(file, [*changes, *section.forget]) if section.forget else None
                    if section.budget is not None:
                        config = fitted(config, section.budget.numbers)
                except VloraError as error:
                    raise ConfigError(f"{method} on {task}: {error}") from None
                path = Path(comparison.results, task, method, f"{seed}.json")
                found.append(Cell(task, method, seed, last_step_only(config), path, before))
    return sorted(found, key=lambda cell: cell.seed)


def last_step_only(config: RunConfig) -> RunConfig:
    """A config whose run evaluates and saves once, at its end: nothing is chosen by looking at held-out rows."""
    every = {"every": config.steps}
    return config.model_copy(
        update={
            "evaluate": config.evaluate.model_copy(update=every | {"patience": None}),
            "checkpoint": config.checkpoint.model_copy(update=every),
            "log": config.log.model_copy(update=every | {"tensorboard": False, "progress": False}),
        }
    )


def read_record(path: Path) -> Record | None:
    """A run's result; None if there is none.

    Raises:
      CheckpointError: the file holds something else.
    """
    if not path.exists():
        return None
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise CheckpointError(f"{path} is no result of a comparison; remove it, and its run is done again") from None


def done(cell: Cell) -> Record | None:
    """A cell's result; None if it is missing or of another config."""
    record = read_record(cell.path)
    return record if record is not None and record.key == cell.key else None


def compare(
    wanted: Sequence[Cell],
    notify: Callable[[int, Record], None] = lambda place, record: None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Record]:
    """The results of cells; those that are missing are run and written, one after the other.

    Args:
      notify: told of each run that was done: its place among the cells, and the result.
      stop: asked after every step of a run.

    Ends early when a run is stopped by a signal: the rest is still missing.
    """
    for place, cell in enumerate(wanted):
        record = done(cell)
        if record is None:
            record = run_cell(cell, stop)
            if record is None:
                return
            write(cell.path, record)
            notify(place, record)
        yield record


def prepare(
    comparison: CompareConfig,
    tasks: Sequence[str] | None = None,
    notify: Callable[[str], None] = lambda line: None,
    stop: Callable[[], bool] | None = None,
) -> bool:
    """Train the runs that tasks start from, where they are not finished; False if one was stopped by a signal.

    Raises:
      VloraError: of some kind: one of the configs is wrong, or its run failed.
    """
    wanted = [comparison.tasks[task] for task in chosen(tasks, list(comparison.tasks), "task")]
    for path in dict.fromkeys(path for task in wanted for path in task.prepare):
        config = load_config(Path(path))
        notify(f"{path}: {config.run_dir}")
        if train(config, Console(quiet=True), stop).stopped:
            return False
    return True


@contextmanager
def compiled_once() -> Iterator[None]:
    """What a run compiles serves the later ones, those of other seeds, unless a cache is set already."""
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        try:
            yield
        finally:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()


def run_cell(cell: Cell, stop: Callable[[], bool] | None = None) -> Record | None:
    """Train one cell in a directory that is removed again; None if it was stopped."""
    spent = stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = cell.config.model_copy(update={"run_dir": f"{folder}/run"})
        try:
            result = train(config, Console(quiet=True), stop)
        except NonFiniteError as error:
            return record_of(cell, *spent(), failure=str(error))
        last = result.progress.last
        if result.stopped or last is None:
            return None
        used = spent()  # without the marks on other data, which are no part of learning
        forgetting = None if cell.before is None else rise(config, cell.before)
    trainable: Any = result.state.trainable
    whole = 0 if config.adapter is None else count(trainable["full"])
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((trainable, result.state.frozen)))
    return record_of(
        cell, *used, accuracy=last["accuracy"], loss=last["loss"], trained=count(trainable) - whole, whole=whole,
        bytes=kept, forgetting=forgetting,
    )  # fmt: skip


def stopwatch() -> Callable[[], tuple[float, float]]:
    """Seconds since now, by the clock and of the processor."""
    began, cpu = time.monotonic(), time.process_time()
    return lambda: (time.monotonic() - began, time.process_time() - cpu)


def rise(run: RunConfig, before: RunConfig) -> float:
    """By how much a run raised its model's loss on other data's held-out rows."""
    data = load_data(before)
    loss = lambda opened: held_out_marks(opened, opened.adapters, data, before.evaluate.batch).loss
    return loss(open_model(run.run_dir)) - loss(open_start(run))


def record_of(cell: Cell, seconds: float, cpu_seconds: float, **found: Any) -> Record:
    """What a cell's run came to, with where and with what it was done."""
    about = {name: version(name) for name in LIBRARIES} | {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rate = cell.config.optimizer.rate
    assert rate is not None
    nothing: dict[str, Any] = {"accuracy": None, "loss": None, "trained": 0, "whole": 0}
    return Record(
        cell.task, cell.method, cell.seed, cell.key, rate=rate, steps=cell.config.steps, about=about,
        seconds=round(seconds, 2), cpu_seconds=round(cpu_seconds, 2), **nothing | found,
    )  # fmt: skip


def write(path: Path, record: Record) -> None:
    """Write a result in one piece."""
    make_directory(path.parent)
    write_whole(path, json.dumps(asdict(record), indent=1) + "\n")
