"""What a comparison came to: means with standard errors, differences seed by seed, as a table and as Markdown."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.table import Table
from scipy import stats

from vlora_jax.experiments.compare import CompareConfig, Record

CONFIDENCE = 0.95
COLUMNS = ("method", "numbers trained", "rate", "runs", "accuracy", "difference", "beyond noise", "CPU seconds")


@dataclass(frozen=True)
class Mark:
    """A mean over runs with its standard error, NaN of a single run."""

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mark":
        """Of at least one value.

        >>> Mark.of([1.0, 3.0])
        Mark(mean=2.0, error=1.0, count=2)
        """
        several = len(values) > 1
        error = statistics.stdev(values) / math.sqrt(len(values)) if several else math.nan
        return cls(statistics.fmean(values), error, len(values))

    def interval(self) -> float:
        """Half the width of the confidence interval of the mean, by Student's t; NaN of a single run."""
        return self.error * float(stats.t.ppf((1 + CONFIDENCE) / 2, self.count - 1)) if self.count > 1 else math.nan


@dataclass(frozen=True)
class Line:
    """One method on one task.

    Attributes:
      accuracy: over its runs; None if all failed.
      difference: from the baseline, seed by seed; None of the baseline itself and without a common seed.
      failed: runs without a result.
      seconds, cpu_seconds: medians of a run.
    """

    task: str
    method: str
    trained: int
    whole: int
    rate: float
    accuracy: Mark | None
    difference: Mark | None
    failed: int
    seconds: float
    cpu_seconds: float

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the confidence interval of the difference leaves out zero; None if that cannot be said."""
        if self.difference is None or self.difference.count < 2:
            return None
        return abs(self.difference.mean) > self.difference.interval()


def lines(comparison: CompareConfig, records: Iterable[Record]) -> list[Line]:
    """One for each task and method that has a result, the best method of a task first."""
    found: dict[tuple[str, str], dict[int, Record]] = {}
    for record in records:
        found.setdefault((record.task, record.method), {})[record.seed] = record
    made = []
    for (task, method), runs in found.items():
        marks = accuracies(runs)
        base = accuracies(found.get((task, comparison.baseline), {}))
        gaps = [marks[seed] - base[seed] for seed in sorted(marks.keys() & base.keys())]
        whole = next((run for run in runs.values() if run.accuracy is not None), next(iter(runs.values())))
        made.append(
            Line(
                task, method, whole.trained, whole.whole, whole.rate,
                Mark.of(list(marks.values())) if marks else None,
                Mark.of(gaps) if gaps and method != comparison.baseline else None,
                len(runs) - len(marks),
                statistics.median(run.seconds for run in runs.values()),
                statistics.median(run.cpu_seconds for run in runs.values()),
            )
        )  # fmt: skip
    tasks = list(comparison.tasks)
    return sorted(made, key=lambda line: (tasks.index(line.task), -(line.accuracy.mean if line.accuracy else -1)))


def accuracies(runs: dict[int, Record]) -> dict[int, float]:
    """By seed, of the runs that have one."""
    return {seed: run.accuracy for seed, run in runs.items() if run.accuracy is not None}


def cells_of(line: Line) -> tuple[str, ...]:
    """A line's texts, in the order of `COLUMNS`."""
    percent = lambda mark, sign="": (
        f"{mark.mean:{sign}.1%}" + ("" if math.isnan(mark.error) else f" ± {mark.error:.1%}")
    )
    failed = f", {line.failed} failed" if line.failed else ""
    beyond = {None: "", True: "yes", False: "no"}[line.beyond_noise]
    return (
        line.method,
        f"{line.trained:,}",
        f"{line.rate:g}",
        f"{line.accuracy.count if line.accuracy else 0}{failed}",
        percent(line.accuracy) if line.accuracy else "",
        percent(line.difference, "+") if line.difference else "",
        beyond,
        f"{line.cpu_seconds:.0f}",
    )


def legend(comparison: CompareConfig) -> str:
    """What the columns mean."""
    return (
        f"Accuracy on the held-out rows after the last step, mean ± standard error over runs. The difference is to "
        f"{comparison.baseline} with the same seed; it is beyond noise if its {CONFIDENCE:.0%} confidence interval "
        f"(Student's t) leaves out zero, which among twenty methods that are all alike one does by chance. Numbers "
        f"trained are without what every method of a task trains whole. CPU seconds are the median of a run's, over "
        f"all threads, with everything: reading, compiling, training, evaluating."
    )


def table(task: str, found: Sequence[Line]) -> Table:
    """One task's lines for a terminal."""
    shown = Table(title=task, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for place, column in enumerate(COLUMNS):
        shown.add_column(column, justify="right" if place else "left", no_wrap=place == 0)
    for line in found:
        shown.add_row(*cells_of(line))
    return shown


def markdown(comparison: CompareConfig, found: Sequence[Line]) -> str:
    """All tasks' lines as a page."""
    parts = ["# Comparison", legend(comparison)]
    for task, section in comparison.tasks.items():
        mine = [line for line in found if line.task == task]
        if not mine:
            continue
        rows = ["| " + " | ".join(cells_of(line)) + " |" for line in mine]
        head = ["| " + " | ".join(COLUMNS) + " |", "|---|" + "---:|" * (len(COLUMNS) - 1)]
        changes = " ".join(f"`{change}`" for change in section.set)
        whole = f" Beside each method's numbers, {mine[0].whole:,} are trained whole." if mine[0].whole else ""
        task_of = f"`{section.config}`" if section.config else "The embedded digits run"
        with_changes = f" with {changes}" if changes else ""
        parts += [f"## {task}", f"{task_of}{with_changes}.{whole}", "\n".join([*head, *rows])]
    return "\n\n".join(parts) + "\n"
