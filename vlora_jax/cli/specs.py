"""`vlora-jax inspect --specs`: where a run's tensors lie on a mesh that need not be here."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import typer
from rich.console import Console
from rich.table import Table

from vlora_jax.adapters.trees import matching
from vlora_jax.distributed.mesh import AXES, abstract_mesh
from vlora_jax.distributed.specs import undivided
from vlora_jax.errors import ConfigError
from vlora_jax.inspection.specs import SpecRow, spec_rows
from vlora_jax.training.places import places
from vlora_jax.training.runs import read_config


def show_specs(run: Path, sizes: str | None, where: str | None, top: int | None, as_json: bool) -> None:
    """Print where a run's tensors lie on its mesh, or on one of other sizes."""
    config = read_config(run)
    mesh = abstract_mesh(**config.mesh.sizes, devices=jax.device_count())
    if sizes is not None:
        parsed = [int(size) if size.strip().isdecimal() else 0 for size in sizes.split(",")]
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
