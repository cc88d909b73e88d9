"""The page itself: from a plain record of what to show to one string of HTML."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vlora_jax.inspection.report.charts import Heat, heat_map
from vlora_jax.inspection.sheets import Column, Sheet


@dataclass(frozen=True)
class Report:
    """What a page shows, from top to bottom.

    Attributes:
      lead: what it is about, a sentence.
      facts: the figures to see first, each with its name and a detail.
      heats: heat maps.
      charts: for each heading a note and drawings, as `charts.line_chart` returns them.
      sheets: tables.
      about: metadata, each with its name.
      config: the run's, as YAML; empty without one.
    """

    title: str
    lead: str
    facts: tuple[tuple[str, str, str], ...]
    heats: tuple[Heat, ...]
    charts: tuple[tuple[str, str, tuple[str, ...]], ...]
    sheets: tuple[Sheet, ...]
    about: tuple[tuple[str, str], ...]
    config: str = ""


def render(report: Report) -> str:
    """One page of HTML that needs nothing beside itself."""
    part = lambda name: files("vlora_jax.inspection.report").joinpath(name).read_text(encoding="utf-8")
    facts = [(name, value, f"<small>{html.escape(detail)}</small>") for name, value, detail in report.facts]
    sections = [f'<dl class="facts">{_pairs(facts)}</dl>']
    if report.heats:
        sections.append(_section("Where", f'<div class="heats">{"".join(map(heat_map, report.heats))}</div>'))
    for name, note, drawings in report.charts:
        if drawings:
            sections.append(_section(name, f'{_note(note)}<div class="charts">{"".join(drawings)}</div>'))
    sections += [_section(sheet.title, table(sheet)) for sheet in report.sheets if sheet.rows]
    about = f'<dl class="about">{_pairs([(*pair, "") for pair in report.about])}</dl>'
    if report.config:
        about += f"<details><summary>Configuration</summary><pre>{html.escape(report.config)}</pre></details>"
    sections.append(_section("Metadata", about))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{html.escape(report.title)}</title>'
        f"<style>{part('style.css')}</style></head><body><main>\n"
        f"<h1>{html.escape(report.title)}</h1><p>{html.escape(report.lead)}</p>\n"
        f"{chr(10).join(sections)}\n</main><script>{part('page.js')}</script></body></html>\n"
    )


def table(sheet: Sheet) -> str:
    """A sheet as a table whose headings sort it; numbers stand in `data-value` as they are."""
    head = "".join(
        f'<th{_kind(column)}><button type="button">{html.escape(column.heading)}</button></th>'
        for column in sheet.columns
    )
    body = "".join(f"<tr>{''.join(_data(column, row) for column in sheet.columns)}</tr>" for row in sheet.rows)
    total = "".join(
        f"<td{_kind(column)}>{_total(sheet, column, place)}</td>" for place, column in enumerate(sheet.columns)
    )
    foot = f"<tfoot><tr>{total}</tr></tfoot>" if sheet.total else ""
    return (
        f'{_note(sheet.legend)}<div class="scroll"><table id="{sheet.key}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div>"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def _pairs(pairs: Sequence[tuple[str, str, str]]) -> str:
    """Names and values as text, each with a piece of HTML behind it."""
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}{more}</dd></div>" for name, value, more in pairs
    )


def _kind(column: Column) -> str:
    return f' class="number {column.key}"' if column.numeric else f' class="{column.key}"'


def _data(column: Column, row: Any) -> str:
    number = column.number(row) if column.numeric else None
    value = f' data-value="{number:.6g}"' if number is not None and math.isfinite(number) else ""
    return f"<td{_kind(column)}{value}>{html.escape(column.text(row))}</td>"


def _total(sheet: Sheet, column: Column, place: int) -> str:
    return f"{sheet.sum():,}" if column.key == sheet.total else "together" if place == 0 else ""
