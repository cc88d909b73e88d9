"""Sheets in the terminal, as JSON, as CSV, and pages written: what `inspect` and `diff` have in common."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlora_jax.errors import ConfigError
from vlora_jax.inspection.report.page import Report, render
from vlora_jax.inspection.sheets import Sheet, flat, plain
from vlora_jax.training.runs import write_whole

Where = Annotated[
    str | None, typer.Option(help="Only paths in which this expression matches whole components: 'attn/(q|v)'")
]
Top = Annotated[int | None, typer.Option(min=1, help="Only so many rows of a table.")]
Layers = Annotated[bool, typer.Option("--layers", help="A row for each layer instead of one for each stack.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
AsCsv = Annotated[bool, typer.Option("--csv", help="For spreadsheets.")]


def show(
    title: str,
    notes: Sequence[str],
    about: dict[str, Any],
    sheets: Sequence[Sheet],
    report: Callable[[], Report],
    *,
    as_json: bool,
    as_csv: bool,
    page: Path | None,
) -> None:
    """Print sheets in the form that was asked for, and write the page.

    Args:
      title, notes: above the tables, for people.
      about: beside the records, in JSON.
      report: makes the page's contents, if it is wanted.
      page: where to write it; no page without one.

    Raises:
      ConfigError: CSV of several sheets is wanted.
      ResourceError: the page cannot be written.
    """
    if page is not None:
        write_whole(page, render(report()))
    if as_json:
        typer.echo(json.dumps(about | {sheet.key: plain(sheet.rows) for sheet in sheets}, indent=2, ensure_ascii=False))
    elif as_csv:
        write_csv([sheet for sheet in sheets if sheet.rows])
    elif page is not None:
        typer.echo(f"written to {page}")
    else:
        console = Console()
        console.print(title, highlight=False, markup=False, soft_wrap=True)
        for note in notes:
            console.print(note, style="yellow", highlight=False, markup=False, soft_wrap=True)
        filled = [sheet for sheet in sheets if sheet.rows]
        for sheet in filled:
            console.print(table(sheet, len(filled) > 1))
        if not filled:
            console.print(f"nothing in {', '.join(sheet.key for sheet in sheets)}", style="yellow")


def refuse(options: dict[str, Any], without: str) -> None:
    """Raises ConfigError if one of the options is given, which need something else to be given as well."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given is not None:
        raise ConfigError(f"{given} is for {without}")


def check_form(as_json: bool, as_csv: bool) -> None:
    """Raises ConfigError if both JSON and CSV are wanted."""
    if as_json and as_csv:
        raise ConfigError("--json and --csv both print; choose one")


def table(sheet: Sheet, titled: bool) -> Table:
    """A sheet, in columns that fit a terminal."""
    shown = Table(title=sheet.title if titled else None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for place, column in enumerate(sheet.columns):
        side = "right" if column.numeric else "left"
        shown.add_column(column.heading, justify=side, no_wrap=place == 0, overflow="fold")
    for row in sheet.rows:
        shown.add_row(*(Text(column.text(row)) for column in sheet.columns))  # brackets are no markup
    if sheet.total:
        sums = {sheet.columns[0].key: "together", sheet.total: f"{sheet.sum():,}"}
        shown.add_row(*(f"[bold]{sums.get(column.key, '')}" for column in sheet.columns))
    return shown


def write_csv(sheets: Sequence[Sheet]) -> None:
    """One sheet on standard output, every field of its records a column.

    Raises:
      ConfigError: there are several.
    """
    if len(sheets) > 1:
        names = " and ".join(sheet.key for sheet in sheets)
        raise ConfigError(f"--csv holds one table, here are {names}; take --json, or --only one of them")
    for sheet in sheets:
        lines = [flat(row) for row in sheet.rows]
        every = dict.fromkeys(name for line in lines for name in line)
        # Of `rank`, empty in rows that lack it, and `rank.mean` of the others, the latter is the column.
        columns = [name for name in every if not any(other.startswith(f"{name}.") for other in every)]
        writer = csv.DictWriter(sys.stdout, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
