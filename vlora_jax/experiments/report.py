"""What a comparison came to: means with standard errors, differences seed by seed, as a table and as Markdown."""

import dataclasses
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text
from scipy import stats

from vlora_jax.experiments.compare import CompareConfig, Record, TaskConfig

CONFIDENCE = 0.95


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

    def __format__(self, form: str) -> str:
        """The mean, and its error where there are several values.

        >>> f"{Mark.of([0.25, 0.75]):+.1%}"
        '+50.0% ± 25.0%'
        """
        return format(self.mean, form) + ("" if math.isnan(self.error) else f" ± {self.error:{form.removeprefix('+')}}")

    def chance(self) -> float | None:
        """P of Student's t-test that the mean is zero, two-sided; None of a single run."""
        if self.count < 2:
            return None
        if self.error == 0:
            return float(self.mean == 0)
        return float(2 * stats.t.sf(abs(self.mean / self.error), self.count - 1))


@dataclass(frozen=True)
class Line:
    """One method on one task.

    Attributes:
      metric: what `mark` and `difference` are of.
      trained: numbers, without the `whole` that every method of the task trains.
      mark: over its runs; None if all failed.
      difference: from the baseline, seed by seed; None of the baseline itself and without a common seed.
      chance: p of the paired t-test, by Holm's correction for all methods of the task; None without a test.
      failed: runs without a result.
      bytes: see `Record`, as `forgetting`.
      seconds, cpu_seconds: medians of a run.
    """

    task: str
    method: str
    metric: Literal["accuracy", "loss"]
    trained: int
    whole: int
    bytes: int | None
    rate: float
    mark: Mark | None
    difference: Mark | None
    chance: float | None
    forgetting: Mark | None
    failed: int
    seconds: float
    cpu_seconds: float

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the difference is significant among those of all methods; None if that cannot be said."""
        return None if self.chance is None else self.chance < 1 - CONFIDENCE

    @property
    def order(self) -> float:
        """The smaller, the better."""
        if self.mark is None:
            return math.inf
        return -self.mark.mean if self.metric == "accuracy" else self.mark.mean


def lines(comparison: CompareConfig, records: Iterable[Record]) -> list[Line]:
    """One for each task and method that has a result, the best method of a task first."""
    found: dict[str, dict[str, dict[int, Record]]] = {task: {} for task in comparison.tasks}
    for record in records:
        found[record.task].setdefault(record.method, {})[record.seed] = record
    made = []
    for task, methods in found.items():
        metric = comparison.tasks[task].metric
        base = marks(methods.get(comparison.baseline, {}), metric)
        mine = [
            line_of(runs, metric, {} if method == comparison.baseline else base) for method, runs in methods.items()
        ]
        made += sorted(corrected(without_common(mine)), key=lambda line: line.order)
    return made


def line_of(runs: dict[int, Record], metric: Literal["accuracy", "loss"], base: dict[int, float]) -> Line:
    """A method's runs by seed as one line, with differences from the baseline's marks; its chance is not corrected."""
    found = marks(runs, metric)
    gaps = [found[seed] - base[seed] for seed in sorted(found.keys() & base.keys())]
    difference = Mark.of(gaps) if gaps else None
    rises = [run.forgetting for run in runs.values() if run.forgetting is not None]
    whole = next((run for run in runs.values() if run.accuracy is not None), next(iter(runs.values())))
    return Line(
        whole.task, whole.method, metric, whole.trained, whole.whole, whole.bytes, whole.rate,
        Mark.of(list(found.values())) if found else None,
        difference,
        None if difference is None else difference.chance(),
        Mark.of(rises) if rises else None,
        len(runs) - len(found),
        statistics.median(run.seconds for run in runs.values()),
        statistics.median(run.cpu_seconds for run in runs.values()),
    )  # fmt: skip


def without_common(found: Sequence[Line]) -> list[Line]:
    """Lines of one task whose `trained` is all that trains but for what all of them train whole, which is `whole`."""
    common = min((line.whole for line in found if line.mark is not None), default=0)
    beyond = lambda line: max(0, line.trained + line.whole - common)
    return [dataclasses.replace(line, trained=beyond(line), whole=common) for line in found]


def marks(runs: dict[int, Record], metric: str) -> dict[int, float]:
    """By seed, of the runs that have one."""
    return {seed: getattr(run, metric) for seed, run in runs.items() if getattr(run, metric) is not None}


def corrected(found: Sequence[Line]) -> list[Line]:
    """Lines of one task with their chances after Holm's correction."""
    tested = [line for line in found if line.chance is not None]
    chances = iter(holm([line.chance for line in tested if line.chance is not None]))
    return [line if line.chance is None else dataclasses.replace(line, chance=next(chances)) for line in found]


def holm(chances: Sequence[float]) -> list[float]:
    """P-values of several tests, so that below α one of all tests errs with a probability of at most α (Holm 1979).

    >>> holm([0.04, 0.01, 0.5])
    [0.08, 0.03, 0.5]
    """
    adjusted, largest = [0.0] * len(chances), 0.0
    for place, index in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        largest = max(largest, min(1.0, (len(chances) - place) * chances[index]))
        adjusted[index] = largest
    return adjusted


def frontier(found: Iterable[Line]) -> list[Line]:
    """Those lines of one task that no other beats with as few numbers, the fewest numbers first."""
    best, kept = math.inf, []
    for line in sorted(found, key=lambda line: (line.trained, line.order)):
        if line.order < best:
            best = line.order
            kept.append(line)
    return kept


def cells_of(line: Line) -> dict[str, str]:
    """A line's texts by column."""
    failed = f", {line.failed} failed" if line.failed else ""
    form = ".1%" if line.metric == "accuracy" else ".4g"
    told = lambda mark, form: "" if mark is None else format(mark, form)
    return {  # what is compared stands first, where a phone shows it
        "method": line.method,
        line.metric: told(line.mark, form),
        "difference": told(line.difference, f"+{form}"),
        "p": "" if line.chance is None else f"{probability(line.chance)}{' *' if line.beyond_noise else ''}",
        "runs": f"{line.mark.count if line.mark else 0}{failed}",
        "numbers trained": f"{line.trained:,}",
        "bytes": "" if line.bytes is None else f"{line.bytes:,}",
        "rate": f"{line.rate:g}",
        "forgetting": told(line.forgetting, "+.3f"),
        "CPU seconds": f"{line.cpu_seconds:.0f}",
    }


def probability(chance: float) -> str:
    """A chance with three digits behind the point.

    >>> probability(0.0214), probability(0.0004)
    ('0.021', '< 0.001')
    """
    return f"{chance:.3f}" if chance >= 0.001 else "< 0.001"


def rows_of(found: Sequence[Line]) -> tuple[list[str], list[list[str]]]:
    """Columns in which something stands, and the texts in them; of one task."""
    rows = [cells_of(line) for line in found]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    return columns, [[row[column] for column in columns] for row in rows]


def legend(comparison: CompareConfig) -> str:
    """What the columns mean."""
    return (
        f"Marks are of the held-out rows after the last step, mean ± standard error over runs. The difference is to "
        f"{comparison.baseline} with the same seed; p is of Student's paired t-test, by Holm's correction for all "
        f"methods of the task, and * says that it is below {1 - CONFIDENCE:.2f}: without one, a difference is within "
        f"noise. Numbers trained are without what every method of a task trains whole; bytes are those of all tensors "
        f"that a checkpoint keeps of an adapter, frozen ones too. Forgetting is by how much the loss on what the model "
        f"could do before rose. CPU seconds are the median of a run's, over all threads, with everything: reading, "
        f"compiling, training, evaluating."
    )


def about(section: TaskConfig, found: Sequence[Line]) -> str:
    """What one task is."""
    changes = " ".join(f"`{change}`" for change in section.set)
    parts = [
        (f"`{section.config}`" if section.config else "The embedded digits run") + (changes and f" with {changes}")
    ]
    if section.budget is not None:
        parts.append(f"Each method's size is the largest that trains at most {section.budget.numbers:,} numbers")
    if section.forget:
        parts.append(f"What it could do before is {' '.join(f'`{change}`' for change in section.forget)}")
    if found[0].whole:
        parts.append(f"Beside each method's numbers, {found[0].whole:,} are trained whole")
    return "".join(f"{part}. " for part in parts).strip()


def table(task: str, found: Sequence[Line]) -> Table:
    """One task's lines for a terminal."""
    shown = Table(title=escape(task), title_justify="left", box=None, padding=(0, 2, 0, 0))
    columns, rows = rows_of(found)
    for place, column in enumerate(columns):
        shown.add_column(column, justify="right" if place else "left", no_wrap=place == 0)
    for row in rows:
        shown.add_row(*map(Text, row))  # brackets are no markup
    return shown


def by_task(comparison: CompareConfig, found: Sequence[Line]) -> dict[str, list[Line]]:
    """Lines of the tasks that have some."""
    mine = {task: [line for line in found if line.task == task] for task in comparison.tasks}
    return {task: lines for task, lines in mine.items() if lines}


def markdown(comparison: CompareConfig, found: Sequence[Line]) -> str:
    """All tasks' lines as a page, which shows the pictures `picture(task)` beside it."""
    parts = ["# Comparison", legend(comparison)]
    for task, mine in by_task(comparison, found).items():
        columns, rows = rows_of(mine)
        head = [markdown_row(columns), "|---|" + "---:|" * (len(columns) - 1)]
        shown = f"![{task}: {mine[0].metric} against numbers trained]({picture(task)})"
        parts += [f"## {task}", about(comparison.tasks[task], mine)]
        parts += ["\n".join([*head, *map(markdown_row, rows)]), shown]
    return "\n\n".join(parts) + "\n"


def markdown_row(texts: Sequence[str]) -> str:
    """A line of a Markdown table.

    >>> print(markdown_row(["q|v", "0.5"]))
    | q\\|v | 0.5 |
    """
    return "| " + " | ".join(text.replace("|", r"\|") for text in texts) + " |"


def picture(task: str) -> str:
    """The file of a task's Pareto plot.

    >>> picture("sst2/16 shots")
    'pareto_sst2_16_shots.png'
    """
    return "pareto_" + re.sub(r"[^\w.-]", "_", task) + ".png"
