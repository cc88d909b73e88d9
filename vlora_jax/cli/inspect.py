"""`vlora-jax inspect`: what a run has learnt, what an adapter changes, what a model holds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vlora_jax.cli.looks import ALSO, known_tables, notes_of, report_of, sheets_of, title_of
from vlora_jax.cli.shown import AsCsv, AsJson, Layers, Top, Where, check_form, refuse, show
from vlora_jax.cli.specs import show_specs
from vlora_jax.inspection.sheets import arranged
from vlora_jax.inspection.tables import LEADING
from vlora_jax.training.subjects import open_subject


def command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="WHAT",
            help="A run, RUN/checkpoints/STEP, a directory of PEFT, a model's directory or name.",
            show_default=False,
        ),
    ],
    step: Annotated[
        int | None, typer.Option(help="A run's checkpoint. Without one: the best by held-out metric.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model of a PEFT adapter. Without one: what the adapter names.")
    ] = None,
    where: Where = None,
    sort: Annotated[
        str, typer.Option(help="path, or a column by its name in JSON (relative, rank, numbers …), the largest first.")
    ] = "path",
    top: Top = None,
    layers: Layers = False,
    also: Annotated[
        list[str] | None, typer.Option(help=f"A further table: {', '.join(ALSO)}; again for several.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="The same, without the first tables.")] = None,
    leading: Annotated[
        int, typer.Option(min=1, help="How many of ΔW's leading directions energy counts, and of W's alignment.")
    ] = LEADING,
    specs: Annotated[
        bool, typer.Option("--specs", help="Instead: where each tensor lies on the mesh, and bytes per device.")
    ] = False,
    mesh: Annotated[
        str | None,
        typer.Option(help="With --specs: this mesh, DATA,FSDP,TENSOR; need not be here.", show_default="the run's"),
    ] = None,
    as_json: AsJson = False,
    as_csv: AsCsv = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write one page: heat maps, spectra, curves, tables.")
    ] = None,
) -> None:
    """Show what an adapter or a vertical model changes: path, shapes, numbers, ‖ΔW‖/‖W‖ and effective rank.

    Rank is the exponential of the entropy of ΔW's singular values (Roy and Vetterli 2007): 1 for one direction, r for r
    equal ones. Parameters of a model follow with their root mean square. Further tables: [bold]alignment[/bold] of ΔW
    with W's leading subspaces, [bold]intruders[/bold] (needs W's whole SVD: minutes for large kernels; merge
    --keep-intruders scales them down), what a [bold]merge[/bold] to bfloat16 loses, trained [bold]vectors[/bold], and
    the [bold]drift[/bold] over a run's checkpoints.

    [bold]Examples[/bold]

      vlora-jax inspect runs/digits --layers --where 'attn'
      vlora-jax inspect runs/stdlib_lora --sort relative --top 5 --also alignment
      vlora-jax inspect runs/stdlib_lora --html report.html
      vlora-jax inspect runs/stdlib_lora --specs --mesh 2,8,4
    """
    if specs:
        tables: dict[str, Any] = {"--step": step, "--base": base, "--also": also, "--only": only, "--html": html}
        tables |= {"--sort": None if sort == "path" else sort, "--leading": None if leading == LEADING else leading}
        refuse(tables | {"--layers": layers or None, "--csv": as_csv or None}, "other tables, not for --specs")
        show_specs(Path(what), mesh, where, top, as_json)
        return
    refuse({"--mesh": mesh}, "--specs")
    check_form(as_json, as_csv)
    further, first = known_tables([*(also or ()), *(only or ())]), not only
    subject = open_subject(what, step, base)
    everything = sheets_of(subject, layers, further, leading, first)
    sheets = arranged(everything, where, sort, top)
    about = {"run": what, "step": subject.about.get("step"), "base": subject.missing or "found"}
    show(
        title_of(subject),
        notes_of(subject),
        about,
        sheets,
        lambda: report_of(subject, sheets, everything),
        as_json=as_json,
        as_csv=as_csv,
        page=html,
    )
