"""`vlora-jax methods`: the registry."""

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from vlora_jax.adapters.registry import METHODS


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


def command(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """List every adapter method: formula, paper, numbers trained at a kernel, and what verified it."""
    rows = records()
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table(box=None, padding=(0, 2, 0, 0), title="methods", title_justify="left")
    for name in ("name", "formula", "trains a kernel", "arXiv", "merges", "vertical", "verified by"):
        table.add_column(name, overflow="fold")
    for row in rows:
        yes = lambda value: "yes" if value else "no"
        table.add_row(
            row["name"], row["formula"], row["trains"], row["paper"],
            yes(row["mergeable"]), yes(row["vertical"]), row["verified"],
        )  # fmt: skip
    Console().print(table)
