"""A sweep to look at: the plan, a table while it runs, and in the end a table, a page and a picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vlora_jax.experiments.joint import is_whole
from vlora_jax.experiments.outcomes import WINNER, Outcome, Setting, folder_of, metrics_of
from vlora_jax.experiments.report import Mark, markdown_row
from vlora_jax.experiments.session import Standing
from vlora_jax.experiments.sweep import Program, SweepConfig
from vlora_jax.training.runs import read_metrics, write_whole

REPORT, PICTURE, RECORDS = "README.md", "sweep.png", "results.json"
COLUMNS = ("setting", "runs", "accuracy", "loss", "best run", "at step", "trains", "ended")
LIVE = ("member", "step", "held-out loss", "accuracy", "best", "at step", "state")
SHOWN = 24  # settings in the picture


def plan_lines(plan: Sequence[Program], devices: int) -> list[str]:
    """How many programs there are, and who is in them."""
    total = sum(len(program.members) for program in plan)
    made = [f"{counted(total, 'member')} in {counted(len(plan), 'program')}{', one after the other' * (len(plan) > 1)}"]
    for number, program in enumerate(plan):
        size = len(program.members)
        ways = min(size, devices) if is_whole(program.jobs[0].config.mesh) else 1
        over = f" over {ways} devices" if ways > 1 else ""
        names = "; ".join(member.name for member in program.members[:4])
        made.append(f"  program {number}: {counted(size, 'member')}{over}: {names}{'; …' * (size > 4)}")
    return made


def counted(number: int, noun: str) -> str:
    """A number with its noun.

    >>> counted(1, "member"), counted(2, "member")
    ('1 member', '2 members')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def live_table(program: Program, standings: Sequence[Standing], title: str) -> Table:
    """How the members of a program stand while it runs."""
    table = plain_table(title, LIVE)
    for member, standing in zip(program.members, standings, strict=True):
        last, best = standing.progress.last or {}, standing.progress.best or {}
        table.add_row(
            Text(member.name), str(standing.step),
            text_of(last.get("loss"), ".4f"), text_of(last.get("accuracy"), ".2%"),
            text_of(best.get("accuracy"), ".2%"), text_of(best.get("step"), "d"), state_of(standing),
        )  # fmt: skip
    return table


def plain_table(title: str, columns: Sequence[str]) -> Table:
    """A table without lines, numbers to the right."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        outer = place in (0, len(columns) - 1)
        table.add_column(column, justify="left" if outer else "right", no_wrap=place < len(columns) - 1)
    return table


def text_of(value: float | Mark | None, form: str) -> str:
    """A number or a mean in its form; nothing if there is none."""
    return "" if value is None else format(value, form)


def state_of(standing: Standing) -> str:
    """Whether a member is still training, or how it ended, in a word or two."""
    if standing.active:
        return "training"
    return "failed" if standing.fault else "stopped early" if standing.progress.early else "done"


def cells_of(setting: Setting) -> tuple[str, ...]:
    """A setting's texts, in the order of `COLUMNS`."""
    best = setting.best
    mark = (best and best.standing.progress.best) or {}
    ends = [state_of(outcome.standing) for outcome in setting.outcomes]
    return (
        setting.name, str(len(ends)), text_of(setting.accuracy, ".2%"),
        text_of(setting.loss and setting.loss.mean, ".4f"), text_of(mark.get("accuracy"), ".2%"),
        text_of(mark.get("step"), "d"), f"{setting.outcomes[0].trained:,}",
        ", ".join(f"{ends.count(end)} {end}" if len(ends) > 1 else end for end in dict.fromkeys(ends)),
    )  # fmt: skip


def legend(metric: str, settings: Sequence[Setting]) -> str:
    """What the columns mean, and what a winner is worth."""
    seeds = "mean ± standard error over seeds, " if any(len(setting.outcomes) > 1 for setting in settings) else ""
    return (
        f"Held-out accuracy and loss at each member's best evaluation by {metric}, {seeds}the best setting first. It "
        f"was picked out of {len(settings)} on the same held-out rows: on others expect less of it."
    )


def table(title: str, settings: Sequence[Setting]) -> Table:
    """Settings for a terminal."""
    made = plain_table(title, COLUMNS)
    for setting in settings:
        made.add_row(*map(Text, cells_of(setting)))  # brackets are no markup
    return made


def page(sweep: SweepConfig, settings: Sequence[Setting], metric: str) -> str:
    """All of a sweep as Markdown."""
    changes = " ".join(f"`{change}`" for change in sweep.set)
    config = f"`{sweep.config}`" if sweep.config else "The embedded digits run"
    head = [markdown_row(COLUMNS), "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"]
    rows = [markdown_row(cells_of(setting)) for setting in settings]
    faults = [
        f"- {outcome.member.name}: {outcome.standing.fault}"
        for setting in settings
        for outcome in setting.outcomes
        if outcome.standing.fault
    ]
    parts = ["# Sweep", f"{config}{f' with {changes}' if changes else ''}.", legend(metric, settings)]
    parts += ["\n".join([*head, *rows]), f"![Curves and settings]({PICTURE})"]
    winner = settings[0].best
    if winner is not None:
        parts.append(f"The winner, {winner.member.name}, is the run directory [{WINNER}]({WINNER}).")
    return "\n\n".join([*parts, *(["Failed:\n\n" + "\n".join(faults)] if faults else [])]) + "\n"


def records(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Every member's result as JSON values."""
    outcomes = sorted((o for setting in settings for o in setting.outcomes), key=lambda each: each.member.number)
    return [
        {"number": o.member.number, "values": o.member.values, "trained": o.trained, "step": o.standing.step}
        | {"fault": o.standing.fault, "progress": asdict(o.standing.progress), "program": o.program}
        for o in outcomes
    ]


def write_report(sweep: SweepConfig, settings: Sequence[Setting], metric: str) -> None:
    """Write page, picture and records beside the results."""
    results = Path(sweep.results)
    write_whole(results / REPORT, page(sweep, settings, metric))
    write_whole(results / RECORDS, json.dumps(records(settings), indent=1) + "\n")
    curves = {outcome.member.name: held_out(results, outcome) for setting in settings for outcome in setting.outcomes}
    draw(results / PICTURE, settings, curves, metric)


def held_out(results: Path, outcome: Outcome) -> list[Mapping[str, Any]]:
    """A member's evaluations, in order."""
    own = metrics_of(read_metrics(folder_of(results, outcome.program)), outcome.place)
    return [record for record in own if record["kind"] == "held_out"]


def draw(
    file: Path, settings: Sequence[Setting], curves: Mapping[str, Sequence[Mapping[str, Any]]], metric: str
) -> None:
    """Members' held-out curves, the winner's in colour, and beside them the settings with each member as a dot."""
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    factor, unit = (100, "accuracy (%)") if metric == "accuracy" else (1, "loss (nats)")
    best_first = [setting for setting in settings if setting.best is not None][:SHOWN]
    figure = Figure(figsize=(10, max(4.0, 1.5 + 0.28 * len(best_first))), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    winner = settings[0].best and settings[0].best.member.name
    for name, records in sorted(curves.items(), key=lambda item: item[0] == winner):  # the winner above all
        style = {"color": "#c4722b", "linewidth": 2.2, "marker": "o", "markersize": 4} if name == winner else {}
        values = [factor * record[metric] for record in records]
        left.plot([r["step"] for r in records], values, **({"color": "#9bbcd9", "linewidth": 1} | style))
    left.set_xlabel("step")
    left.set_ylabel(f"held-out {unit}")
    left.set_title("every member, the winner in orange")
    left.grid(alpha=0.25)
    for place, setting in enumerate(best_first):
        bests = [o.standing.progress.best or {} for o in setting.outcomes if o.good]
        mark = setting.accuracy if metric == "accuracy" else setting.loss
        right.plot([factor * best[metric] for best in bests], [place] * len(bests), "o", color="#9bbcd9", markersize=5)
        if mark is not None:
            right.plot([factor * mark.mean], [place], "|", color="#c4722b" if place == 0 else "#1f5f99", markersize=14)
    right.set_yticks(range(len(best_first)), [setting.name for setting in best_first])
    right.invert_yaxis()
    right.set_xlabel(f"best held-out {unit}")
    left_out = len(settings) - len(best_first)
    right.set_title("settings, the best first" + (f" ({left_out} more not shown)" if left_out else ""))
    right.grid(alpha=0.25)
    figure.savefig(file)
