"""`vlora-jax merge`: a run's model as ordinary dense parameters."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlora_jax.training.config import PretrainedConfig
from vlora_jax.training.exchange import write_merged
from vlora_jax.training.results import read_run, write_ordinary
from vlora_jax.training.screens import plain_table


def command(
    run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new directory for the merged model.")],
    step: Annotated[
        int | None, typer.Option(help="A checkpoint's step. Without one: the best by held-out metric.")
    ] = None,
) -> None:
    """Merge an adapter into its base, and expand a vertical model, into ordinary dense parameters.

    The output directory works as [bold]init_from[/bold] of another run; of a run on a model of transformers it is a
    model of transformers again, and works as [bold]model.source[/bold]. Prints how far the merged model's logits are
    from those of the model as it was trained: on held-out examples, of a model of transformers on random inputs.

    [bold]Example[/bold]

      vlora-jax merge runs/stdlib_lora --out runs/stdlib_merged
    """
    trained = read_run(run, step)
    if isinstance(trained.config.model, PretrainedConfig):
        merged = write_merged(trained, out)
        table = plain_table(f"merged {run} at step {trained.step}")
        table.add_row("files", f"{', '.join(merged.written.files)}: {merged.written.tensors} tensors, read back")
        table.add_row("largest logit gap", f"{merged.gap:.2g} on random inputs (logits up to {merged.largest:.3g})")
        table.add_row("written to", f"{out}, for transformers")
        Console().print(table)
        return
    written = write_ordinary(trained, out)
    table = plain_table(f"merged {run} at step {trained.step}")
    table.add_row("parameters", f"{written.parameters:,}, dense")
    table.add_row(
        "largest logit gap",
        f"{written.gap:.2g} on {written.examples} held-out examples (logits up to {written.largest:.3g})",
    )
    table.add_row("written to", str(written.out))
    Console().print(table)
