"""`vlora-jax diff`: two adapters, checkpoints or models beside each other."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.cli.looks import about_of, title_of
from vlora_jax.cli.shown import AsCsv, AsJson, Layers, Top, Where, check_form, show
from vlora_jax.errors import ConfigError
from vlora_jax.inspection.kinds import sheet
from vlora_jax.inspection.report.charts import Heat
from vlora_jax.inspection.report.page import Report
from vlora_jax.inspection.report.views import grid_heat, heat_of
from vlora_jax.inspection.sheets import THREE, Sheet, arranged
from vlora_jax.inspection.similarity import DiffRow, ParameterDiff, diff_rows, parameter_diffs, subspace_grids
from vlora_jax.training.subjects import Subject, check_comparable, is_peft, open_subject


def command(
    one: Annotated[str, typer.Argument(help="As for inspect.", show_default=False)],
    other: Annotated[str, typer.Argument(help="Of the same base, or a model of the same shape.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="The model of both PEFT adapters. Without one: what they name.")
    ] = None,
    where: Where = None,
    sort: Annotated[
        str, typer.Option(help="path, or a column by its name in JSON (distance, cosine …), the largest first.")
    ] = "path",
    top: Top = None,
    layers: Layers = False,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write one page: heat maps and tables.")] = None,
) -> None:
    """Compare two adapters of one base, two checkpoints of a run, or two models: size, direction, subspaces.

    Distance is ‖ΔW' - ΔW‖ / ‖ΔW‖. φ says how much of the subspaces that two changes span is common (arXiv 2106.09685,
    equation 4): 1 if all, and beside it what independent ones have by chance. All from factors, no ΔW is built.

    [bold]Examples[/bold]

      vlora-jax diff runs/seed0 runs/seed1 --sort output
      vlora-jax diff runs/mine/checkpoints/100 runs/mine/checkpoints/400 --layers --where 'attn'
      vlora-jax diff path/to/peft runs/mine --html diff.html
    """
    check_form(as_json, as_csv)
    if base is not None and not (is_peft(one) or is_peft(other)):
        raise ConfigError(f"neither {one} nor {other} is an adapter of PEFT, so there is no use for --base")
    first, second = (open_subject(each, base=base if is_peft(each) else None) for each in (one, other))
    check_comparable(first, second)
    sheets = arranged(sheets_of(first, second, layers), where, sort, top)
    about = {"one": one, "other": other}
    report = lambda: report_of(first, second, sheets)
    title = f"{title_of(first)}  against  {title_of(second)}"
    show(title, [], about, sheets, report, as_json=as_json, as_csv=as_csv, page=html)


def sheets_of(first: Subject, second: Subject, layers: bool) -> list[Sheet]:
    """What separates two subjects."""
    one, other = first.adapter, second.adapter
    if one is None or other is None:
        return [sheet("parameter_diff", parameter_diffs(first.base, second.base))]
    rows = changes_beside(first, second, layers)
    return [sheet("diff", rows, layers), sheet("parameter_diff", whole_beside(one, other))]


def changes_beside(first: Subject, second: Subject, layers: bool) -> list[DiffRow]:
    """Rows of two adapters."""
    one, other = first.adapter, second.adapter
    assert one is not None and other is not None  # noqa: PT018  check_comparable
    return diff_rows(one, other, first.dense_base, second.dense_base, layers)


def whole_beside(one: Adapter, other: Adapter) -> list[ParameterDiff]:
    """What both adapters train whole."""
    common = one.trainable["full"].keys() & other.trainable["full"].keys()
    pick = lambda adapter: {path: adapter.trainable["full"][path] for path in sorted(common)}
    return parameter_diffs(pick(one), pick(other))


def report_of(first: Subject, second: Subject, sheets: list[Sheet]) -> Report:
    """Two subjects' page."""
    both = first.adapter is not None and second.adapter is not None
    rows = changes_beside(first, second, layers=True) if both else []
    sides = (("one", first), ("other", second))
    return Report(
        title="Two beside each other",
        lead=f"{title_of(first)}  against  {title_of(second)}",
        facts=facts_of(rows),
        heats=heats_of(first, second, rows) if both else (),
        charts=(),
        sheets=tuple(sheets),
        about=tuple((f"{side}: {name}", value) for side, each in sides for name, value in about_of(each)),
    )


def facts_of(rows: list[DiffRow]) -> tuple[tuple[str, str, str], ...]:
    """Means over layers and kernels."""
    mean = lambda field: (
        THREE(float(np.mean(known))) if (known := [v for row in rows if (v := getattr(row, field)) is not None]) else ""
    )
    chance = "independent ones: {}".format
    facts = (
        ("mean cosine", mean("cosine"), "of the changes"),
        ("mean distance", mean("distance"), "relative to the first"),
        ("mean φ, input side", mean("input"), chance(mean("chance_input"))),
        ("mean φ, output side", mean("output"), chance(mean("chance_output"))),
    )
    return tuple(fact for fact in facts if fact[1])


def heats_of(first: Subject, second: Subject, rows: list[DiffRow]) -> tuple[Heat, ...]:
    """Where two adapters are alike, and how alike their leading directions are."""
    one, other = first.adapter, second.adapter
    assert one is not None and other is not None  # noqa: PT018  both are adapters here
    found = [
        heat_of("Cosine of the changes", rows, "cosine", THREE, -1.0, 1.0),
        heat_of("φ of the input-side subspaces", rows, "input", THREE, 0.0, 1.0),
        heat_of("φ of the output-side subspaces", rows, "output", THREE, 0.0, 1.0),
    ]
    grids = list(subspace_grids(one, other, first.dense_base).values())
    if grids:
        sizes = [min(grid.shape[axis] for grid in grids) for axis in (0, 1)]
        mean = np.mean([grid[: sizes[0], : sizes[1]] for grid in grids], axis=0)
        found.append(grid_heat("φ(i, j) of the leading i and j output-side directions, mean of all kernels", mean))
    return tuple(heat for heat in found if heat is not None)
