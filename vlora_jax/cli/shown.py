"""Sheets in the terminal, as JSON, as CSV, and pages written: what `inspect` and `diff` have in common."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from vlora_jax.errors import ConfigError, ResourceError
from vlora_jax.inspection.report.page import Report, render
from vlora_jax.inspection.sheets import Sheet, flat, plain


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
        write_page(report(), page)
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
        several = sum(bool(sheet.rows) for sheet in sheets) > 1
        for sheet in sheets:
            if sheet.rows:
                console.print(table(sheet, several))


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
        shown.add_row(*(column.text(row) for column in sheet.columns))
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
        names = list(dict.fromkeys(name for line in lines for name in line))
        writer = csv.DictWriter(sys.stdout, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def write_page(report: Report, page: Path) -> None:
    """Write a page, whole or not at all.

    Raises:
      ResourceError: it cannot be written.
    """
    partial = page.with_name(f".{page.name}.partial")
    try:
        partial.write_text(render(report), encoding="utf-8")
        partial.rename(page)
    except OSError as error:
        raise ResourceError(f"{page} cannot be written: {error.strerror or error}") from None
