"""`vlora-jax merge`: a run's model as ordinary dense parameters, and several adapters of one base as one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from vlora_jax.adapters.adapter import count
from vlora_jax.cli.export import residual_table
from vlora_jax.cli.shown import refuse
from vlora_jax.errors import ConfigError
from vlora_jax.inspection.intruders import ReducedRow
from vlora_jax.training.config import PretrainedConfig
from vlora_jax.training.exchange import write_merged
from vlora_jax.training.merging import Kind, Recipe, blend_runs, is_run, write_as_lora
from vlora_jax.training.results import Trained, read_run, write_ordinary
from vlora_jax.training.screens import plain_table


def command(
    members: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="A run; several, or PEFT's directories.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new directory for the merged model.")],
    step: Annotated[
        int | None, typer.Option(help="A run's checkpoint. Without one: the best by held-out metric.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="One for each, 0.5,0.5; may be negative. Without: equal shares of 1.")
    ] = None,
    kind: Annotated[Kind, typer.Option("--method", help="How changes become one.")] = "linear",
    density: Annotated[
        float | None, typer.Option(help="With ties: share of each change's entries that is kept.", show_default="0.2")
    ] = None,
    drop: Annotated[
        float | None, typer.Option(help="With dare and dare_ties: share that is dropped.", show_default="0.9")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="With dare and dare_ties: of what is dropped.", show_default="0")
    ] = None,
    form: Annotated[
        Literal["lora"] | None, typer.Option("--as", help="Keep an adapter of this form instead of the model.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="With --as lora: its largest rank.")] = None,
    limit: Annotated[
        float | None, typer.Option(min=0, help="With --as lora: fail above this share of a change left out.")
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep-intruders", min=0, max=1, help="With --as lora: scale its intruder dimensions down to this share."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Of PEFT's directories without any run: directory or hub name of the base.")
    ] = None,
) -> None:
    """Merge an adapter into its base, and expand a vertical model, into ordinary dense parameters.

    The output directory works as [bold]init_from[/bold] of another run; of a run on a model of transformers it is a
    model of transformers again, and works as [bold]model.source[/bold]. Prints how far the merged model's logits are
    from those of the model as it was trained: on held-out examples, of a model of transformers on random inputs.

    Several adapters of one base are blended first: their changes ΔW added up, by TIES (arXiv 2306.01708) or after DARE
    (2311.03099), whatever their methods. With --as lora the change, of one adapter as well, is written as a run with a
    LoRA of at most a rank, which the other verbs read; what the rank leaves out of it is printed.

    With --keep-intruders its intruder dimensions, strong singular directions of W + ΔW that W does not have (arXiv
    2410.21228), are scaled down: 0.75 is PEFT's default, 0 takes them out. Less of what the model could do before is
    forgotten, at some cost for what the adapter learnt. Takes the whole SVD of each kernel: minutes for large ones;
    [bold]inspect --also intruders[/bold] counts them.

    [bold]Examples[/bold]

      vlora-jax merge runs/stdlib_lora --out runs/stdlib_merged

      vlora-jax merge runs/a peft_dir --weights 0.7,0.3 --as lora --rank 16 --out runs/both

      vlora-jax merge runs/a runs/b runs/c --method ties --density 0.2 --out runs/all

      vlora-jax merge runs/a --as lora --rank 8 --keep-intruders 0.75 --out runs/mended
    """
    if form is None:
        refuse({"--rank": rank, "--limit": limit, "--keep-intruders": keep}, "--as lora")
    elif rank is None:
        raise ConfigError("--as lora needs --rank: the largest rank that the LoRA may have")
    recipe = recipe_of(kind, weights, density, drop, seed)
    console, names, runs = Console(), ", ".join(map(str, members)), sum(map(is_run, members))
    if step is not None and (len(members), runs) != (1, 1):
        raise ConfigError("--step is for one run; of several, the best checkpoints are merged")
    if base is not None and runs:
        raise ConfigError("--base is for PEFT's directories without any run; a run names its own")
    if len(members) == runs == 1 and form is None and recipe == Recipe():
        trained = read_run(members[0], step)
        console.print(write_model(trained, out, f"{names} at step {trained.step}"))
        return
    blended = blend_runs(members, recipe, base, step)
    if rank is None:
        console.print(write_model(blended, out, names))
        return
    run, residuals, reduced = write_as_lora(blended, out, rank, 1.0 if limit is None else limit, members, keep)
    assert run.adapter is not None  # write_as_lora made it
    console.print(residual_table(residuals))
    table = plain_table(f"merged {names}")
    table.add_row("method", f"lora of rank {run.adapter.method.rank} on {len(run.adapter.sites)} sites")
    table.add_row("numbers", f"{count(run.adapter):,}")
    if run.adapter.trainable["full"]:
        table.add_row("kept whole", ", ".join(run.adapter.trainable["full"]))
    if keep is not None:
        table.add_row("intruders", sentence(reduced, keep))
    table.add_row("written to", f"{out}, a run")
    console.print(table)


def recipe_of(kind: Kind, weights: str | None, density: float | None, drop: float | None, seed: int | None) -> Recipe:
    """The recipe of the options.

    Raises:
      ConfigError: weights are no numbers, or an option is of another method.
    """
    if kind != "ties":
        refuse({"--density": density}, "--method ties")
    if not kind.startswith("dare"):
        refuse({"--drop": drop, "--seed": seed}, "--method dare and dare_ties")
    given: dict[str, Any] = {"density": density, "drop": drop, "seed": seed}
    try:
        numbers = None if weights is None else tuple(float(each) for each in weights.split(","))
    except ValueError:
        raise ConfigError(f"--weights {weights!r} must be numbers with commas between, 0.5,0.5") from None
    return Recipe(kind, numbers, **{key: value for key, value in given.items() if value is not None})


def sentence(rows: Sequence[ReducedRow], keep: float) -> str:
    """What became of a LoRA's intruders."""
    some = [row for row in rows if row.intruders]
    if not some:
        return f"none in {len(rows)} kernels"
    count, worst = sum(row.intruders for row in some), max(row.left_out for row in some)
    return (
        f"{count:,} in {len(some)} of {len(rows)} kernels, scaled to {keep:.0%}; cut back to the rank, a change loses "
        f"{worst:.2g} of its norm at most"
    )


def write_model(trained: Trained, out: Path, what: str) -> Table:
    """Write a run's model, its adapter merged; what there is to say of it."""
    table = plain_table(f"merged {what}")
    if isinstance(trained.config.model, PretrainedConfig):
        merged = write_merged(trained, out)
        table.add_row("files", f"{', '.join(merged.written.files)}: {merged.written.tensors} tensors, read back")
        table.add_row("largest logit gap", f"{merged.gap:.2g} on random inputs (logits up to {merged.largest:.3g})")
        table.add_row("written to", f"{out}, for transformers")
        return table
    written = write_ordinary(trained, out)
    table.add_row("parameters", f"{written.parameters:,}, dense")
    table.add_row(
        "largest logit gap",
        f"{written.gap:.2g} on {written.examples} held-out examples (logits up to {written.largest:.3g})",
    )
    table.add_row("written to", str(written.out))
    return table
