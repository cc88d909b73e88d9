"""`vlora-jax methods`: the registry."""

import dataclasses
import json
import os
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlora_jax.adapters.registry import METHODS
from vlora_jax.errors import ConfigError

COLUMNS = {  # of the tables: what a heading shows of a record
    "name": "name",
    "paper": "paper",
    "change": "formula",
    "trains at a kernel": "trains",
    "merges": "mergeable",
    "vertical": "vertical",
    "PEFT": "peft",
    "rate": "default_rate",
    "verified by": "verified",
}
WIDE, LONG = 180, ("paper", "change", "trains at a kernel")


def records() -> list[dict]:
    """One record a method, for programs and tables."""
    return [
        {
            "name": method.name,
            "paper": method.paper,
            "formula": method.formula,
            "trains": method.trains,
            "mergeable": method.mergeable,
            "vertical": method.vertical,
            "peft": method.peft,
            "default_rate": method.default_rate,
            "verified": method.verified,
            "about": (method.__doc__ or "").strip().splitlines()[0],
            "options": {
                each.name: each.default
                for each in dataclasses.fields(method)
                if each.default is not dataclasses.MISSING
            },
        }
        for method in METHODS.values()
    ]


def shown(value: Any) -> str:
    """A value of a record in a table; `none` and the lack of a name are left blank."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value == "none" else str(value)


def markdown() -> str:
    """The registry as the README shows it, papers as links."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for record in records():
        cells = [shown(record[key]).replace("|", r"\|") for key in COLUMNS.values()]
        cells[0] = f"`{cells[0]}`"
        cells[1] = linked(cells[1])
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def linked(paper: str) -> str:
    """An arXiv or OpenReview id as a link.

    >>> linked("2106.09685"), linked("OpenReview abc")
    ('[2106.09685](https://arxiv.org/abs/2106.09685)', '[OpenReview](https://openreview.net/forum?id=abc)')
    """
    if re.fullmatch(r"\d{4}\.\d{4,5}", paper):
        return f"[{paper}](https://arxiv.org/abs/{paper})"
    host, _, key = paper.partition(" ")
    return f"[{host}](https://openreview.net/forum?id={key})" if host == "OpenReview" else paper


def command(
    as_json: Annotated[bool, typer.Option("--json", help="For programs, with every option and its default.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The table of the README.")] = False,
) -> None:
    """List every adapter method: paper, formula, numbers trained at a kernel, what it can do, and what verified it.

    PEFT is the peft_type of files that PEFT has for it; rate is AdamW's learning rate at which its defaults train.
    """
    if as_json and as_markdown:
        raise ConfigError("--json and --markdown are two forms of the same table; ask for one of them")
    if as_json:
        typer.echo(json.dumps(records(), indent=2))
        return
    if as_markdown:
        typer.echo(markdown())
        return
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=WIDE)  # what is written to files and pipes is not cut for a screen
    columns = COLUMNS if console.width >= WIDE else {k: v for k, v in COLUMNS.items() if k not in LONG}
    table = Table(box=None, padding=(0, 2, 0, 0), title="methods", title_justify="left")
    for heading in columns:
        table.add_column(heading, overflow="fold", no_wrap=heading != "verified by" and heading not in LONG)
    for record in records():
        table.add_row(*(Text(shown(record[key])) for key in columns.values()))  # brackets are no markup
    console.print(table)
    if columns is not COLUMNS:
        console.print(f"{', '.join(LONG)}: in {WIDE} columns, or with --json or --markdown", style="dim")
