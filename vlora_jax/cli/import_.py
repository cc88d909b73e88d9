"""`vlora-jax import`: a PEFT adapter as a run directory."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlora_jax.adapters.adapter import count
from vlora_jax.training.exchange import head_of, import_adapter, source_of
from vlora_jax.training.screens import plain_table


def command(
    adapter: Annotated[Path, typer.Argument(help="A directory with adapter_config.json.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new run directory.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]…", help="Other sections of the run's config.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Directory or hub name of the base. Without one: what the adapter names.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="Of the base: lm, sequence, token, masked_lm, image, none. Without one: the adapter's task."),
    ] = None,
    classes: Annotated[
        int | None, typer.Option(help="Of a sequence, token or image head. Without: the adapter's.")
    ] = None,
    untie: Annotated[bool, typer.Option("--untie", help="Give a tied head a kernel of its own.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Without one: as stored.")] = None,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Allow a file that vlora_jax wrote for a base with other values.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Allow an adapter that changes nothing yet.")] = False,
) -> None:
    """Read an adapter that PEFT wrote, and keep it as a run that the other verbs take.

    Every tensor must be accounted for: what PEFT passes over in silence is an error here.

    [bold]Examples[/bold]

      vlora-jax import path/to/adapter --base path/to/model --out runs/imported

      vlora-jax inspect runs/imported
    """
    told = head_of(adapter, head)
    model = {"source": base or source_of(adapter), "untie": untie, "dtype": dtype, **told}
    model["classes"] = told.get("classes") if classes is None else classes
    trained = import_adapter(adapter, out, model, tuple(overrides or ()), fresh=fresh, any_base=any_base)
    method = trained.config.adapter
    assert method is not None and trained.adapter is not None  # noqa: PT018  import_adapter makes an adapter run
    table = plain_table(f"imported {adapter}")
    table.add_row("base", model["source"])
    table.add_row("method", f"{method.name} on {len(trained.adapter.sites)} sites")
    table.add_row("numbers", f"{count(trained.adapter):,}")
    if trained.adapter.trainable["full"]:
        table.add_row("trained whole", ", ".join(trained.adapter.trainable["full"]))
    table.add_row("written to", str(out))
    table.add_row("look into it", f"vlora-jax inspect {out}")
    Console().print(table)
