"""The training loop: one run from start, or from where it stopped, to its end."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from rich.console import Console

from vlora_jax import checkpoint
from vlora_jax.adapters.trees import Tree
from vlora_jax.data.pipeline import TrainBatches, batch_id, held_out_batches
from vlora_jax.distributed import processes
from vlora_jax.distributed.mesh import whole_batch
from vlora_jax.distributed.rows import local_rows
from vlora_jax.errors import BaseMismatchError, CheckpointError, DataError, NonFiniteError, ResumeError
from vlora_jax.training import screens
from vlora_jax.training.config import RunConfig
from vlora_jax.training.job import Job
from vlora_jax.training.logs import Log, Silence, draw_curve
from vlora_jax.training.loss import means
from vlora_jax.training.optimizers import schedule
from vlora_jax.training.profiling import PROFILE, profiled
from vlora_jax.training.progress import HELD_OUT_FAULT, Progress, about, better, not_finite
from vlora_jax.training.reading import flat_keys
from vlora_jax.training.runs import CHECKPOINTS, CONFIG, keep_metrics, lock, open_run, refuse_foreign
from vlora_jax.training.step import TrainState, evaluate_step, leaf_names

CURVE = "curve.png"
UNITS = {"classification": "example", "text_classification": "example", "matrix_completion": "number"}


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: the last one done.
      stopped: a signal or a request ended this session; its checkpoint is saved and the same call continues it.
      state: the last state.
    """

    run: Path
    step: int
    progress: Progress
    stopped: bool
    state: TrainState = field(repr=False)


def train(
    config: RunConfig,
    console: Console | None = None,
    stop: Callable[[], bool] | None = None,
    devices: Sequence[Any] | None = None,
) -> Result:
    """Train, or continue the run that is in `config.run_dir`.

    Several processes that were brought together by `processes.start` call it all with the same config: each reads its
    rows of every batch, one writes and speaks, and what one of them is asked to do, all do.

    Args:
      config: of the run.
      console: for progress; standard output if not given.
      stop: asked after every step; true saves and returns.
      devices: to train on; all there are if not given.

    Raises:
      VloraError: of some kind: the input is wrong, the directory belongs to another run, the loss is not finite.
    """
    console = (console or Console()) if processes.is_writer() else Console(quiet=True)
    processes.same("config", flat_keys(config.plain()))
    job = Job.of(config, devices)
    processes.same("data", {"fingerprint": job.data.fingerprint})
    run = Path(config.run_dir)
    with ExitStack() as held, jax.set_mesh(job.mesh), signals() as asked:

        def enter() -> bool:
            refuse_foreign(run)
            held.enter_context(lock(run))
            return open_run(config)

        continued = processes.decided("run_dir", enter)
        see(run)
        if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
            jax.config.update("jax_compilation_cache_dir", str(run.absolute() / "compile_cache"))
        return Trainer(job, console, lambda: asked() or (stop is not None and stop())).train(continued)


def see(run: Path, seconds: float = 30) -> None:
    """Raises ResumeError in every process if one does not see what the writer has written, which takes its time."""
    end = time.monotonic() + seconds
    while not (run / CONFIG).exists() and time.monotonic() < end:
        time.sleep(0.5)
    seen = processes.gathered("run_dir", (run / CONFIG).exists())
    if not all(seen):
        blind = ", ".join(str(process) for process, sees in enumerate(seen) if not sees)
        raise ResumeError(f"run_dir {run} must be on storage that all processes share; not seen from process {blind}")


class Trainer:
    """One session of a run."""

    def __init__(self, job: Job, console: Console, stop: Callable[[], bool]):
        self.job, self.config, self.console = job, job.config, console
        self.stop = processes.agreed(stop, job.mesh)
        self.run = Path(job.config.run_dir)
        self.progress = Progress()
        self.unit = UNITS.get(job.data.task, "token")
        self.evaluate_compiled = evaluate_step(job.subject)
        self.rate = schedule(self.config.optimizer, self.config.steps)
        self.began = time.monotonic()

    def train(self, continued: bool) -> Result:
        """Restore what is there, train, save, and sum up."""
        config, job = self.config, self.job
        say = lambda line: self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        self.checkpoints = checkpoint.Checkpoints(self.run / CHECKPOINTS, config.checkpoint.keep, say)
        rows = local_rows(config.data.batch, job.mesh)
        self.batches = TrainBatches(job.data, config.data.batch, config.accumulate, config.seed, rows)
        base, state, step = self.restore(say) if continued else self.start()
        if processes.is_writer():
            keep_metrics(self.run, step)
        self.seconds_before = self.progress.seconds
        if step >= config.steps or self.progress.early:
            say(f"{self.run} is finished at step {step}: nothing to do; another run_dir starts another run")
            self.checkpoints.close()
            return self.sum_up(state, step, stopped=False)
        compiled = job.step().lower(job.state, job.base, job.batch).compile()
        self.console.print(screens.first_screen(job, compiled.memory_analysis()))
        if job.data.summary is not None and step == 0:
            self.console.print(screens.data_screen(job.data.summary), soft_wrap=True)
        chosen = config.log.profiled if processes.is_writer() else range(0)  # one process shows what all do
        with (
            Log(config, self.console, step) if processes.is_writer() else Silence() as self.log,
            profiled(compiled, chosen, step, self.run / PROFILE, self.log.say) as compiled,
        ):
            state, step, stopped = self.steps(compiled, base, state, step)
        self.checkpoints.close()
        return self.sum_up(state, step, stopped)

    def start(self) -> tuple[Tree, TrainState, int]:
        """The start, from one and the same step of `init_from`, which may be training still."""
        self.source_step = self.job.source_step
        base, state = self.job.start(self.job.parameters(self.source_step))
        self.fingerprint = None if self.config.adapter is None else checkpoint.fingerprint(base)
        return base, state, 0

    def restore(self, say: Callable[[str], None]) -> tuple[Tree, TrainState, int]:
        """The newest whole checkpoint's state, with data, progress and base checked; the start if there is none."""
        job, newest = self.job, self.checkpoints.newest_whole()
        if newest is None:
            say(f"{self.run} has no whole checkpoint yet: starting at step 0")
            return self.start()
        saved = checkpoint.read(self.run / CHECKPOINTS, newest, where=job.places())
        state = job.restored(saved)
        job.check_data(saved)
        self.batches.restore(saved.metadata["data"])
        self.progress = Progress(**saved.metadata["progress"])
        self.fingerprint, self.source_step = saved.metadata["base_fingerprint"], saved.metadata["source_step"]
        base: Tree = {}
        if self.config.adapter is not None:
            base = job.parameters(self.source_step)
            found = checkpoint.fingerprint(base)
            if found != self.fingerprint:
                raise BaseMismatchError(
                    f"{self.run} was trained on a base with fingerprint {self.fingerprint}; that of "
                    f"{self.config.init_from or 'this seed'} is {found}"
                )
        elif jax.tree.leaves(job.base):
            raise CheckpointError(f"{self.run}: the model has variables that are no parameters, which are not saved")
        else:
            base = job.base
        say(f"continuing {self.run} after step {newest} of {self.config.steps}")
        return base, state, newest

    def steps(self, compiled: Callable, base: Tree, state: TrainState, step: int) -> tuple:
        """Train until the end, an early stop or a request; returns the state, its step, and whether asked."""
        config = self.config
        if step == 0 and config.init_from is not None:
            self.progress.first = self.evaluate(state, base, 0)
        waiting: tuple[int, dict] | None = None  # metrics are read one step late, so that no device waits
        moment = time.monotonic()
        while step < config.steps:
            with jax.profiler.TraceAnnotation("next batch"):  # so that a profile shows whether devices wait for it
                batch = next(self.batches)
                placed = self.job.place(batch)
            state, metrics = compiled(state, base, placed)
            step += 1
            metrics["batch"] = batch_id(batch)
            if waiting is not None:
                moment = self.note(*waiting, moment)
            waiting = (step, metrics)
            last, stopped = step == config.steps, self.stop()
            evaluates = step % config.evaluate.every == 0 or last
            if evaluates or step % config.checkpoint.every == 0 or stopped:
                moment = self.note(step, metrics, moment)  # never save what has not been looked at
                waiting = None
                is_best = self.judge(state, base, step) if evaluates else False
                patience, early = config.evaluate.patience, self.progress.early
                if last or early or stopped or is_best or step % config.checkpoint.every == 0:
                    self.save(state, step, is_best)
                if early and not last:
                    self.log.say(f"no better {config.evaluate.metric} for {patience} evaluations: stopping early")
                if early or (stopped and not last):
                    return state, step, stopped and not early
                moment = time.monotonic()
        return state, step, False

    def note(self, step: int, metrics: dict[str, Any], since: float) -> float:
        """Read a step's metrics, refuse what is not finite, write the rest down; returns the time."""
        batch = metrics["batch"]
        host = jax.device_get({name: value for name, value in metrics.items() if name != "batch"})
        now = time.monotonic()
        fault = not_finite(host["finite"], leaf_names(self.job.state.trainable))
        if fault is not None:
            self.give_up(step, fault)
        if not host["weight"] > 0:
            raise DataError(f"step {step}: every label of the batch is masked, there is nothing to learn from")
        self.progress.units += float(host["weight"])
        record = {name: float(host[name]) for name in ("loss", "accuracy", "gradient_norm")}
        record |= {"rate": float(jnp.asarray(self.rate(step - 1))), "batch": batch, "step_seconds": now - since}
        record |= {"units_per_second": float(host["weight"]) / max(now - since, 1e-9), "unit": self.unit}
        self.log.step(step, record)
        return now

    def give_up(self, step: int, fault: str) -> NoReturn:
        """Raises NonFiniteError, once what is being saved is whole."""
        self.checkpoints.close()
        kept = self.checkpoints.steps()
        last = f"the last good checkpoint is step {kept[-1]}" if kept else "there was no checkpoint yet"
        advice = "Try a lower optimizer.rate or more warmup, in another run_dir"
        raise NonFiniteError(f"step {step}: {fault}; {last}. {advice}")

    def evaluate(self, state: TrainState, base: Tree, step: int) -> dict[str, Any]:
        """Loss and accuracy over all held-out data; refuses what is not finite."""
        size = whole_batch(self.config.evaluate.batch, self.job.mesh)
        sums = [
            self.evaluate_compiled(state, base, self.job.place(batch))
            for batch in held_out_batches(self.job.data, size, local_rows(size, self.job.mesh))
        ]
        found = {"step": step, **{name: value for name, value in means(sums).items() if name != "weight"}}
        if not math.isfinite(found["loss"]):
            self.give_up(step, HELD_OUT_FAULT)
        is_best = better(found, self.progress.best, self.config.evaluate.metric)
        self.log.held_out(step, {name: found[name] for name in ("loss", "accuracy")}, is_best and step > 0)
        return found

    def judge(self, state: TrainState, base: Tree, step: int) -> bool:
        """Evaluate and keep the books; returns whether this is the best step so far."""
        wanted = self.config.evaluate
        return self.progress.judge(self.evaluate(state, base, step), wanted.metric, wanted.patience)

    def save(self, state: TrainState, step: int, best: bool) -> None:
        """Start saving."""
        self.progress.seconds = self.seconds_before + time.monotonic() - self.began
        metadata = about(self.job, self.progress, self.batches.state(), self.fingerprint, self.source_step)
        self.checkpoints.save(step, self.job.trees(state), metadata, best)

    def sum_up(self, state: TrainState, step: int, stopped: bool) -> Result:
        """Draw the curve and show the last screen."""
        result = Result(self.run, step, self.progress, stopped, state)
        if stopped:
            self.console.print(
                f"stopped and saved at step {step} of {self.config.steps}; the same command continues {self.run}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
            return result
        if processes.is_writer():
            draw_curve(self.run, self.run / CURVE, screens.title(self.job))
        self.console.print(screens.last_screen(self.job, self.progress, self.run / CURVE))
        return result


@contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C came in; a second one ends the process as it always does."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came.is_set
        return
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def handle(kind: int, frame: Any) -> None:
        came.set()
        os.write(2, b"stopping after the next step; once more to stop at once\n")
        for each in kinds:
            signal.signal(each, before[each])

    for kind in kinds:
        signal.signal(kind, handle)
    try:
        yield came.is_set
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])
