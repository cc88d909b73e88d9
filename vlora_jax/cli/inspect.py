"""`vlora-jax inspect`: what a run has learnt, as a table."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import typer
from rich.console import Console
from rich.table import Table

from vlora_jax.adapters.trees import matching
from vlora_jax.distributed.mesh import AXES, abstract_mesh
from vlora_jax.distributed.specs import undivided
from vlora_jax.errors import ConfigError
from vlora_jax.inspection.specs import SpecRow, spec_rows
from vlora_jax.inspection.tables import ChangeRow, ParameterRow, adapter_rows, increment_rows, parameter_rows
from vlora_jax.training.places import places
from vlora_jax.training.results import Trained, read_run
from vlora_jax.training.runs import read_config
from vlora_jax.vertical.expand import expand

Sort = Literal["path", "numbers", "relative", "rank"]


def command(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(help="A checkpoint's step. Without one: the best by held-out metric.")
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="Only paths in which this expression matches whole components: 'attn/(q|v)'")
    ] = None,
    sort: Annotated[
        Sort, typer.Option(help="Order of the rows; numbers, relative and rank put the largest first.")
    ] = "path",
    top: Annotated[int | None, typer.Option(min=1, help="Only so many rows.")] = None,
    specs: Annotated[
        bool, typer.Option("--specs", help="Instead: where each tensor lies on the mesh, and bytes per device.")
    ] = False,
    mesh: Annotated[
        str | None,
        typer.Option(help="With --specs: this mesh, DATA,FSDP,TENSOR; need not be here.", show_default="the run's"),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="A row for each layer instead of one for each stack.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show what an adapter or a vertical model changes: path, shapes, numbers, ‖ΔW‖/‖W‖ and effective rank.

    Rank is the exponential of the entropy of ΔW's singular values (Roy and Vetterli 2007): 1 for one direction, r for r
    equal ones. Parameters of a run that trained a model follow with their root mean square.

    [bold]Examples[/bold]

      vlora-jax inspect runs/digits --layers --where 'attn'
      vlora-jax inspect runs/stdlib_lora --sort relative --top 5
      vlora-jax inspect runs/stdlib_lora --specs --mesh 2,8,4
    """
    if specs:
        show_specs(run, mesh, where, top, as_json)
        return
    if mesh is not None:
        raise ConfigError("--mesh is for --specs")
    trained = read_run(run, step)
    changes, parameters = rows(trained, layers)
    if where is not None:
        paths = set(matching(where, {row.path for row in (*changes, *parameters)}, "--where"))
        changes = [row for row in changes if row.path in paths]
        parameters = [row for row in parameters if row.path in paths]
    changes, parameters = ordered(changes, sort)[:top], ordered(parameters, sort)[:top]
    if as_json:
        about = {"run": str(run), "step": trained.step, "base": trained.missing or "found"}
        records = {"changes": changes, "parameters": parameters}
        typer.echo(
            json.dumps(about | {k: [dataclasses.asdict(row) for row in v] for k, v in records.items()}, indent=2)
        )
        return
    console = Console()
    kind = "adapter" if trained.adapter is not None else "model"
    console.print(f"{run}: {kind} at step {trained.step}", highlight=False, markup=False, soft_wrap=True)
    if trained.missing:
        console.print(
            f"‖ΔW‖/‖W‖ is unknown without the base: {trained.missing}", style="yellow", highlight=False, markup=False
        )
    if changes:
        console.print(change_table(changes, layers))
    if parameters:
        console.print(parameter_table(parameters))


def show_specs(run: Path, sizes: str | None, where: str | None, top: int | None, as_json: bool) -> None:
    """Print where a run's tensors lie on its mesh, or on one of other sizes."""
    config = read_config(run)
    mesh = abstract_mesh(**config.mesh.sizes, devices=jax.device_count())
    if sizes is not None:
        parsed = [int(size) if size.strip().isdigit() else 0 for size in sizes.split(",")]
        if len(parsed) != len(AXES) or 0 in parsed:
            raise ConfigError(f"--mesh {sizes!r} must be three sizes of at least 1: DATA,FSDP,TENSOR")
        mesh = abstract_mesh(*parsed, devices=math.prod(parsed))
    parts = places(config, mesh)
    found = spec_rows(parts, mesh)
    if where is not None:
        paths = set(matching(where, {row.path for row in found}, "--where"))
        found = [row for row in found if row.path in paths]
    notes = undivided(parts["base" if config.adapter is not None else "trainable"][0], mesh)
    if as_json:
        records = [dataclasses.asdict(row) for row in found[:top]]
        typer.echo(json.dumps({"mesh": dict(mesh.shape), "replicated": notes, "tensors": records}, indent=2))
        return
    console = Console()
    print_line = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    print_line(f"{run} on a mesh of {' × '.join(f'{name} {size}' for name, size in mesh.shape.items())}")
    console.print(spec_table(found[:top], sum(row.bytes for row in found)))
    for note in notes:
        print_line(note)


def spec_table(rows: list[SpecRow], total: int) -> Table:
    """Places, in columns that fit a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("path", overflow="fold")
    for name in ("shape", "spec"):
        table.add_column(name)
    table.add_column("bytes a device", justify="right")
    for row in rows:
        shape = "×".join(map(str, row.shape)) or "scalar"
        spec = ", ".join(str(axis or "–") for axis in row.spec) or "replicated"
        table.add_row(f"{row.part}/{row.path}", f"{shape} {row.dtype}", spec, f"{row.bytes:,}")
    table.add_row("[bold]together", "", "", f"[bold]{total:,}")
    return table


def rows(trained: Trained, layers: bool) -> tuple[list[ChangeRow], list[ParameterRow]]:
    """What was changed, and, of a run that trained a model, every parameter."""
    if trained.adapter is not None:
        base = None if trained.base is None else expand(trained.graphdef, trained.base)[1]
        return adapter_rows(base, trained.adapter, layers), []
    return increment_rows(trained.graphdef, trained.base, layers), parameter_rows(trained.base)


def ordered(rows: list, sort: Sort) -> list:
    """Rows by path, or the largest of a quantity first; what is not known comes last."""

    def size(row: Any) -> float:
        value = getattr(row, sort, None)
        value = getattr(value, "mean", value)
        return float("-inf") if value is None else float(value)

    return rows if sort == "path" else sorted(rows, key=size, reverse=True)


def change_table(rows: list[ChangeRow], layers: bool) -> Table:
    """Changes, in columns that fit a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("path", no_wrap=True)
    if layers:
        table.add_column("layer", justify="right")
    table.add_column("shapes", overflow="fold")
    for name in ("numbers", "‖ΔW‖/‖W‖", "rank (low–high)"):
        table.add_column(name, justify="right")
    for row in rows:
        shapes = " ".join(f"{name}{list(shape)}".replace(", ", "×") for name, shape in row.shapes.items())
        relative = "" if row.relative is None else f"{row.relative:.4f}"
        rank = "" if row.rank is None else f"{row.rank.mean:.2f}"
        if row.rank is not None and row.rank.low != row.rank.high:
            rank += f" ({row.rank.low:.2f}–{row.rank.high:.2f})"
        number = ["" if row.layer is None else str(row.layer)] if layers else []
        table.add_row(row.path, *number, shapes, f"{row.numbers:,}", relative, rank)
    total = sum(row.numbers for row in rows)
    table.add_row("[bold]together", *([""] if layers else []), "", f"[bold]{total:,}", "", "")
    return table


def parameter_table(rows: list[ParameterRow]) -> Table:
    """Parameters, in columns that fit a terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("parameter", overflow="fold")
    table.add_column("shape")
    for name in ("numbers", "rms"):
        table.add_column(name, justify="right")
    for row in rows:
        shape = "×".join(map(str, row.shape)) or "scalar"
        table.add_row(row.path, f"{shape} {row.dtype}", f"{row.numbers:,}", "" if row.rms is None else f"{row.rms:.4f}")
    table.add_row("[bold]together", "", f"[bold]{sum(row.numbers for row in rows):,}", "")
    return table
