"""`vlora-jax export`: a run's adapter as PEFT's files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from vlora_jax.training.exchange import export_adapter
from vlora_jax.training.results import read_run
from vlora_jax.training.screens import plain_table


def command(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new directory for adapter_config.json and tensors.")],
    step: Annotated[
        int | None, typer.Option(help="A checkpoint's step. Without one: the best by held-out metric.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--as-lora", help="As one plain LoRA, which vLLM and other servers take.")
    ] = False,
    max_rank: Annotated[int, typer.Option(min=1, help="With --as-lora: the largest rank the server takes.")] = 16,
    limit: Annotated[
        float, typer.Option(min=0, help="With --as-lora: fail above this share of a change left out.")
    ] = 1.0,
) -> None:
    """Write an adapter so that PEFT reads it with no tensor missing or unexpected. What was written is read back.

    With --as-lora any adapter that can be merged becomes plain LoRA of one rank and one scale, exactly where its rank
    allows, else by SVD; the share of each change that is left out is printed.

    [bold]Examples[/bold]

      vlora-jax export runs/lora --out adapters/lora

      vlora-jax export runs/dora --out adapters/served --as-lora --max-rank 32 --limit 0.1
    """
    trained = read_run(run, step)
    exported, residuals = export_adapter(trained, out, plain=plain, max_rank=max_rank, limit=limit)
    console = Console()
    if residuals:
        console.print(residual_table(residuals))
    table = plain_table(f"exported {run} at step {trained.step}")
    table.add_row("tensors", f"{exported.tensors}, {exported.numbers:,} numbers, read back")
    table.add_row("method", exported.about)
    table.add_row("written to", str(out))
    table.add_row("load it", f'peft.PeftModel.from_pretrained(base, "{out}")')
    console.print(table)


def residual_table(residuals: Mapping[str, np.ndarray]) -> Table:
    """What a LoRA leaves out of each site's change."""
    table = Table(box=None, padding=(0, 2, 0, 0), title="‖ΔW - A B‖ / ‖ΔW‖ over layers", title_justify="left")
    for name in ("site", "largest", "mean"):
        table.add_column(name, justify="left" if name == "site" else "right", overflow="fold")
    for path, values in residuals.items():
        table.add_row(path, f"{values.max():.3g}", f"{values.mean():.3g}")
    return table
