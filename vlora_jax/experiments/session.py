"""One program of a sweep, from start or from where it stopped, until each of its members has ended."""

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from vlora_jax import checkpoint
from vlora_jax.adapters.trees import Tree
from vlora_jax.data.pipeline import TrainBatches, batch_id, held_out_batches
from vlora_jax.distributed.mesh import whole_batch
from vlora_jax.errors import BaseMismatchError, CheckpointError
from vlora_jax.experiments.joint import Joint, chosen, raw
from vlora_jax.experiments.sweep import Program, drawn
from vlora_jax.training.loss import means
from vlora_jax.training.progress import HELD_OUT_FAULT, LIBRARIES, Progress, better, not_finite
from vlora_jax.training.runs import CHECKPOINTS, METRICS, keep_metrics, newest_step
from vlora_jax.training.step import TrainState

STATE, BEST = "state", "best"  # trees of a checkpoint


@dataclass
class Standing:
    """Where one member stands; goes into every checkpoint of its program.

    Attributes:
      step: the last one done.
      data: position in the data at its end; None while it is training.
      best: `{"data", "progress"}` at its best evaluation.
      fault: why it failed; empty if it did not.
    """

    progress: Progress
    step: int = 0
    data: dict[str, Any] | None = None
    best: dict[str, Any] | None = None
    fault: str = ""

    @property
    def active(self) -> bool:
        return self.data is None

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Standing":
        """From what `asdict` made of it."""
        values: dict[str, Any] = plain | {"progress": Progress(**plain["progress"])}
        return cls(**values)


def standings_of(folder: Path) -> list[Standing] | None:
    """Where the members of a program stand by its newest checkpoint; None if there is none."""
    newest = newest_step(folder)
    if newest is None:
        return None
    return [Standing.of(each) for each in checkpoint.metadata(folder / CHECKPOINTS, newest)["standings"]]


class Session:
    """One session of a program.

    Args:
      program: its members with their jobs.
      folder: of its checkpoints and metrics.
      devices: to run on.
      say: told, in a line each, what happens.
      watch: shown how members stand, after every step that was looked at.
      stop: asked after every step.
    """

    def __init__(
        self,
        program: Program,
        folder: Path,
        devices: Sequence[Any],
        say: Callable[[str], None],
        watch: Callable[[Sequence[Standing], int], None],
        stop: Callable[[], bool],
    ):
        self.program, self.folder, self.say, self.watch, self.stop = program, folder, say, watch, stop
        self.first = program.jobs[0]
        self.joint = Joint.of(program.jobs, devices)
        self.standings = [Standing(Progress()) for _ in program.members]
        seeds = dict.fromkeys(job.config.seed for job in program.jobs)
        config = self.first.config
        self.orders = {s: TrainBatches(self.first.data, config.data.batch, config.accumulate, s) for s in seeds}
        self.began, self.before = time.monotonic(), 0.0

    def run(self) -> bool:
        """Train until every member has ended; true if a request to stop came first, and all is saved."""
        self.checkpoints = checkpoint.Checkpoints(
            self.folder / CHECKPOINTS, self.first.config.checkpoint.keep, self.say
        )
        newest = self.checkpoints.newest_whole()
        base, state, best, step = self.start() if newest is None else self.restore(newest)
        keep_metrics(self.folder, step)
        try:
            with (
                jax.set_mesh(self.joint.mesh),
                (self.folder / METRICS).open("a", encoding="utf-8", buffering=1) as self.log,
            ):
                return self.steps(base, state, best, step)
        finally:
            self.checkpoints.close()

    def start(self) -> tuple[Tree, TrainState, TrainState, int]:
        """Base, state and best state before the first step, each member's start as by itself."""
        jobs, self.source_step = self.program.jobs, self.first.source_step
        flats: dict[int, Any] = {}
        fingerprints: dict[int, str | None] = {}
        begins: dict[Any, Callable] = {}
        base = params = seed = None
        for place in sorted(range(len(jobs)), key=lambda place: (place > 0, jobs[place].config.seed)):
            job, adapter = jobs[place], jobs[place].subject.adapter
            if params is None or (job.config.seed != seed and drawn(job.config) != ()):
                params, fingerprint = self._parameters(job)
                seed = job.config.seed
            begin = begins.setdefault(adapter and adapter.method, job.beginning)
            with jax.set_mesh(job.mesh):
                rest, state = job.start(params, begin)
            base = rest if base is None else base
            flats[place], fingerprints[place] = self.joint.joined(job, state), fingerprint
        self.fingerprints = [fingerprints[place] for place in range(len(jobs))]
        state = self.joint.stacked([flats[place] for place in range(len(jobs))])
        return self.joint.base(base), state, jax.tree.map(jnp.copy, state), 0

    def _parameters(self, job: Any) -> tuple[Tree, str | None]:
        """A member's parameters before it trains, and the fingerprint of what stays frozen."""
        with jax.set_mesh(job.mesh):
            params = job.parameters(self.source_step)
            return params, None if job.subject.adapter is None else checkpoint.fingerprint(params)

    def restore(self, step: int) -> tuple[Tree, TrainState, TrainState, int]:
        """The same as a checkpoint has it, with data and base checked."""
        saved = checkpoint.read(self.folder / CHECKPOINTS, step)
        self.first.check_data(saved)
        self.standings = [Standing.of(each) for each in saved.metadata["standings"]]
        self.fingerprints, self.source_step = saved.metadata["fingerprints"], saved.metadata["source_step"]
        self.before = saved.metadata["seconds"]
        for seed, position in saved.metadata["data"]:
            self.orders[seed].restore(position)
        base = self.first.base
        if self.first.subject.adapter is not None:
            base, found = self._parameters(self.first)
            if found != self.fingerprints[0]:
                raise BaseMismatchError(
                    f"{self.folder} was trained on a base with fingerprint {self.fingerprints[0]}; that of "
                    f"{self.first.config.init_from or 'this seed'} is {found}"
                )
        elif jax.tree.leaves(base):
            raise CheckpointError(f"{self.folder}: the model has variables that are no parameters, which are not saved")
        self.say(f"continuing {self.folder} after step {step}")
        state, best = (self.joint.on_devices(saved.trees[name]) for name in (STATE, BEST))
        return self.joint.base(base), state, best, step

    def steps(self, base: Tree, state: TrainState, best: TrainState, step: int) -> bool:
        """Train on; see `run`."""
        compiled, self.evaluate_compiled, own = self.joint.step(), self.joint.evaluate(), self.joint.own()
        choose = jax.jit(chosen)
        if step == 0 and self.first.config.init_from is not None:
            marks = self.evaluate(state, base, 0)
            for standing, found in zip(self.standings, marks, strict=True):
                standing.progress.first = found
            self.write_marks(marks, 0)
        waiting: tuple | None = None  # metrics are read one step late, so that no device waits
        self.moment, saved = time.monotonic(), step
        while any(standing.active for standing in self.standings):
            active = [standing.active for standing in self.standings]
            batches = self.next_batches(active)
            state, metrics = compiled(state, base, self.joint.place(batches), own, self.joint.flags(active))
            step += 1
            if waiting is not None:
                self.note(*waiting)
            waiting = (step, metrics, active, [batch_id(batch) for batch in batches])
            stopped, due = self.stop(), self.due(step)
            if due or stopped or step % self.first.config.checkpoint.every == 0:
                self.note(*waiting)  # never save what has not been looked at
                waiting = None
                if due:
                    is_best = self.judge(self.evaluate(state, base, step), step, due)
                    best = choose(self.joint.flags(is_best), state, best)
                over = not any(standing.active for standing in self.standings)
                if stopped or over or step % self.first.config.checkpoint.every == 0:
                    self.save(state, best, step)
                    saved = step
                if stopped and not over:
                    return True
                self.moment = time.monotonic()
        if saved != step:  # the last member failed in a step that was looked at late
            self.save(state, best, step)
        return False

    def next_batches(self, active: Sequence[bool]) -> list[dict[str, Any]]:
        """Each member's next batch; members of one seed read together, those that have ended get any."""
        seeds = [job.config.seed for job in self.program.jobs]
        wanted = dict.fromkeys(seed for seed, on in zip(seeds, active, strict=True) if on)
        read = {seed: next(self.orders[seed]) for seed in wanted}
        return [read.get(seed, next(iter(read.values()))) for seed in seeds]

    def due(self, step: int) -> list[int]:
        """Members that are judged after this step."""
        wanted = lambda config: step % config.evaluate.every == 0 or step == config.steps
        configs = [job.config for job in self.program.jobs]
        return [place for place, each in enumerate(self.standings) if each.active and wanted(configs[place])]

    def note(self, step: int, metrics: dict[str, Any], active: Sequence[bool], batches: Sequence[int]) -> None:
        """Read a step's metrics, end members that failed, write the rest down."""
        found, now = jax.device_get(metrics), time.monotonic()
        record: dict[str, list] = {name: [] for name in ("loss", "accuracy", "gradient_norm", "rate", "batch")}
        for place, standing in enumerate(self.standings):
            if active[place] and standing.active:
                fault = not_finite(found["finite"][place], self.joint.names())
                if fault is None and not found["weight"][place] > 0:
                    fault = "every label of the batch is masked, there is nothing to learn from"
                if fault is not None:
                    self.end(place, step, f"step {step}: {fault}")
            good = active[place] and not standing.fault
            standing.progress.units += float(found["weight"][place]) if good else 0.0
            standing.step = step if good else standing.step
            for name in ("loss", "accuracy", "gradient_norm"):
                record[name].append(float(found[name][place]) if good else None)
            record["rate"].append(float(self.joint.rates[place][step - 1]) if good else None)
            record["batch"].append(batches[place] if good else None)
        if step % self.first.config.log.every == 0 or any(step == job.config.steps for job in self.program.jobs):
            self.write(step, "train", record | {"step_seconds": now - self.moment})
        self.watch(self.standings, step)
        self.moment = now

    def write(self, step: int, kind: str, record: dict[str, Any]) -> None:
        """One line of metrics: a list with one entry a member, None where there is none."""
        self.log.write(json.dumps({"step": step, "kind": kind, **record}) + "\n")

    def write_marks(self, marks: Sequence[dict[str, Any]], step: int) -> None:
        """Evaluations as a line of metrics."""
        seen = [{} if standing.fault else mark for mark, standing in zip(marks, self.standings, strict=True)]
        self.write(step, "held_out", {name: [mark.get(name) for mark in seen] for name in ("loss", "accuracy")})

    def evaluate(self, state: TrainState, base: Tree, step: int) -> list[dict[str, Any]]:
        """Loss and accuracy of each member over all held-out data."""
        size = whole_batch(self.first.config.evaluate.batch, self.first.mesh)
        batches = held_out_batches(self.first.data, size)
        sums = [self.evaluate_compiled(state, base, self.joint.held_out(batch)) for batch in batches]
        host: Any = jax.device_get(sums)
        marks = [
            means([{name: values[place] for name, values in each.items()} for each in host])
            for place in range(len(self.standings))
        ]
        return [{"step": step, "loss": mark["loss"], "accuracy": mark["accuracy"]} for mark in marks]

    def judge(self, marks: Sequence[dict[str, Any]], step: int, due: Sequence[int]) -> list[bool]:
        """Take evaluations into the books, and end members that are through; returns of whom this is the best step."""
        is_best = [False] * len(self.standings)
        for place in due:
            standing, config = self.standings[place], self.program.jobs[place].config
            if not standing.active:  # it failed in this step
                continue
            if not math.isfinite(marks[place]["loss"]):
                self.end(place, step, f"step {step}: {HELD_OUT_FAULT}")
                continue
            progress = standing.progress
            progress.seconds = self.seconds()
            is_best[place] = progress.judge(marks[place], config.evaluate.metric, config.evaluate.patience)
            if is_best[place]:
                standing.best = {"data": self.orders[config.seed].state(), "progress": copy.deepcopy(asdict(progress))}
            if progress.early or step == config.steps:
                self.end(place, step)
        self.write_marks([mark if place in due else {} for place, mark in enumerate(marks)], step)
        self.say(self.sentence(step))
        self.watch(self.standings, step)
        return is_best

    def sentence(self, step: int) -> str:
        """How the members stand, in a line."""
        best, told = None, "no evaluation yet"
        for member, standing in zip(self.program.members, self.standings, strict=True):
            mark = standing.progress.best
            if mark is not None and not standing.fault and better(mark, best, self.first.config.evaluate.metric):
                best, told = mark, f"best accuracy {mark['accuracy']:.2%}, loss {mark['loss']:.4f} ({member.name})"
        return f"step {step:>5}: {told}; {sum(standing.active for standing in self.standings)} training"

    def end(self, place: int, step: int, fault: str = "") -> None:
        """A member has ended."""
        standing = self.standings[place]
        standing.fault, standing.progress.seconds = fault, self.seconds()
        standing.data = self.orders[self.program.jobs[place].config.seed].state()

    def seconds(self) -> float:
        """Of training, all sessions of this program together."""
        return self.before + time.monotonic() - self.began

    def save(self, state: TrainState, best: TrainState, step: int) -> None:
        """Start saving."""
        about = {
            "members": [member.values for member in self.program.members],
            "standings": [asdict(standing) for standing in self.standings],
            "fingerprints": self.fingerprints,
            "source_step": self.source_step,
            "data_fingerprint": self.first.data.fingerprint,
            "data": [[seed, order.state()] for seed, order in self.orders.items()],
            "seconds": self.seconds(),
            "best": None,
            "versions": {name: version(name) for name in LIBRARIES},
        }
        self.checkpoints.save(step, {STATE: raw(state), BEST: raw(best)}, about)
