"""What a run says while it trains: a live bar, metrics.jsonl, TensorBoard events, and a curve at the end."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlora_jax.training.config import RunConfig
from vlora_jax.training.runs import METRICS, read_metrics


class Log:
    """Writes the records of a run, and shows them.

    Args:
      config: of the run.
      console: where people look.
      step: the run continues after this one.
    """

    def __init__(self, config: RunConfig, console: Console, step: int):
        self._config, self._console = config, console
        run = Path(config.run_dir)
        self._file = (run / METRICS).open("a", encoding="utf-8", buffering=1)
        self._events = None
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=console,
            disable=not (config.log.progress and console.is_terminal),
            transient=True,
        )
        self._task = self._bar.add_task("training", total=config.steps, completed=step, now="")
        self._last_shown = 0.0

    def __enter__(self) -> "Log":
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        self._file.close()
        if self._events is not None:
            self._events.close()

    def step(self, step: int, record: dict[str, Any]) -> None:
        """A training step is done; every `log.every` of them is written down."""
        if step % self._config.log.every == 0 or step == self._config.steps:
            self._write(step, "train", record)
        if not self._bar.disable and (time.monotonic() - self._last_shown > 0.2 or step == self._config.steps):
            self._last_shown = time.monotonic()
            rate = f"{record['units_per_second']:,.0f} {record['unit']}s/s"
            self._bar.update(self._task, completed=step, now=f"loss {record['loss']:.3f} · {rate}")

    def held_out(self, step: int, record: dict[str, Any], best: bool) -> None:
        """An evaluation on held-out data is done."""
        self._write(step, "held_out", record)
        shown = f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.2%}"
        self.say(f"step {step:>5}: held-out {shown}{' (best so far)' if best else ''}")

    def say(self, line: str) -> None:
        """One line, above the bar."""
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        sys.stdout.flush()

    def _write(self, step: int, kind: str, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, "kind": kind, **record}) + "\n")
        if self._events is not None:
            for name, value in record.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)


class Silence:
    """The log of a process that writes none."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def step(self, step: int, record: dict[str, Any]) -> None:
        pass

    def held_out(self, step: int, record: dict[str, Any], best: bool) -> None:
        pass

    def say(self, line: str) -> None:
        pass


def draw_curve(run: Path, file: Path, title: str) -> None:
    """Training and held-out loss, and held-out accuracy, over steps, as a picture."""
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    records = read_metrics(run)
    train = [record for record in records if record["kind"] == "train"]
    held = [record for record in records if record["kind"] == "held_out"]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    left = figure.add_subplot()
    left.plot(
        [r["step"] for r in train], [r["loss"] for r in train], color="#9bbcd9", linewidth=1, label="training loss"
    )
    left.plot(
        [r["step"] for r in held],
        [r["loss"] for r in held],
        color="#1f5f99",
        marker="o",
        markersize=4,
        label="held-out loss",
    )
    low = min((r["loss"] for r in train + held), default=1)
    high = max((r["loss"] for r in train + held), default=1)
    if low > 0 and high / low > 20:
        left.set_yscale("log")
    left.set_xlabel("step")
    left.set_ylabel("loss (nats)")
    left.grid(alpha=0.25)
    right = left.twinx()
    right.plot(
        [r["step"] for r in held], [100 * r["accuracy"] for r in held], color="#c4722b", marker="s", markersize=4,
        linestyle="--", label="held-out accuracy",
    )  # fmt: skip
    right.set_ylabel("accuracy (%)")
    right.set_ylim(0, 101)
    lines = [*left.get_lines(), *right.get_lines()]
    figure.legend(lines, [str(line.get_label()) for line in lines], loc="outside lower center", ncols=3, frameon=False)
    left.set_title(title)
    figure.savefig(file)
