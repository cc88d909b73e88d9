"""`vlora-jax plan`: what a run takes on a topology, before anything is paid for."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlora_jax.distributed.chips import CHIPS, Topology
from vlora_jax.distributed.chips import topology as topology_of
from vlora_jax.errors import ConfigError, VloraError
from vlora_jax.planning.compiler import Compiler
from vlora_jax.planning.plan import Plan, check, model_file, plan
from vlora_jax.planning.screen import screen, verdict
from vlora_jax.planning.search import search
from vlora_jax.training.config import RunConfig, load_config

TOO_LARGE = 1


def command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to the config, by dotted key: data.batch=64 model.remat=dots mesh.fsdp=8 mesh.tensor=2",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML file from configs/, as for train.")
    ] = None,
    topology: Annotated[
        str | None,
        typer.Option("--topology", "-t", help="A TPU slice: v5e:4x4, v5p:4x4x4, v6e:16x16, …; or GPUs: h100:8"),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="A config.json, or a directory that holds one. Without it: the model's own, if it is here."),
    ] = None,
    search_changes: Annotated[
        bool, typer.Option("--search", help="If it does not fit, try one change after the other until it does.")
    ] = False,
    save_text: Annotated[
        Path | None, typer.Option("--hlo", help="Write the compiled program's text to this file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Compile the train step of a config for a TPU topology, on this machine, with the real TPU compiler.

    Needs neither a TPU nor weights nor data nor a tokenizer; only the model's config.json and the extra
    [bold]plan[/bold]. Shows, for one chip, the bytes of base, adapter, optimizer, batch and temporaries and their
    peak, the collectives of a step with loop bodies counted as often as they run, and how fast a step can be at most by
    the chip's own figures. Meshes of GPUs are worked out by formulas. Exit code 1: it does not fit.

    [bold]Examples[/bold]

      vlora-jax plan --config configs/llama2_7b_vera.yaml --topology v5e:4x4
      vlora-jax plan --config configs/llama3_70b_lora.yaml --topology v5e:16x16 data.batch=256 mesh.data=1 mesh.fsdp=256
      vlora-jax plan --config configs/llama3_8b_lora.yaml --topology v5e:4x4 model.remat=none --search
      vlora-jax plan --config my.yaml --topology v6e:4x8 --model ~/models/Qwen3-32B --json > plan.json
    """
    if topology is None:
        raise ConfigError(f"a plan is for a topology: --topology v5e:4x4, or another of {', '.join(CHIPS)}")
    run, slice_ = load_config(config, overrides or ()), topology_of(topology)
    check(run, slice_)
    if save_text is not None:
        check_text(save_text, slice_)
    file, console, progress = model_file(run, model, config), Console(), Console(stderr=True)
    notice = lambda line: progress.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    doing = {"tracing": "tracing the step", "compiling": f"compiling it for {slice_.name}: a minute or more"}
    with Compiler(slice_, lambda stage: notice(doing[stage])) as compiler:

        def attempt(config: RunConfig, change: tuple[str, ...]) -> Plan | None:
            notice(f"trying {' '.join(change)}")
            try:
                result = plan(config, slice_, compiler, file, change)
            except VloraError as error:
                notice(f"  impossible: {error}")
                return None
            notice(f"  {verdict(result)}")
            return result

        found, better, tried = plan(run, slice_, compiler, file, text=save_text), None, 0
        if not found.fits and search_changes:
            notice(verdict(found))
            better, tried = search(run, slice_.devices, attempt)
    if as_json:
        answer = found.plain() | {"searched": tried, "with_change": None if better is None else better.plain()}
        typer.echo(json.dumps(answer, indent=2))
    else:
        title = f"plan of {config or 'the embedded run'}"
        console.print(screen(found, slice_, title), highlight=False)
        if better is not None:
            console.print(f"\none change makes it fit: {' '.join(better.changes)}", highlight=False, markup=False)
            console.print(screen(better, slice_, f"{title}, changed"), highlight=False)
        elif not found.fits:
            hint = (
                f"none of {tried} single changes makes it fit; take more chips"
                if search_changes
                else "--search tries changes"
            )
            console.print(hint, highlight=False, markup=False)
    if not found.fits:
        raise typer.Exit(TOO_LARGE)


def check_text(file: Path, topology: Topology) -> None:
    """Raises ConfigError if a program's text cannot be written to a file, before minutes are spent on it."""
    if topology.chip.kind == "gpu":
        raise ConfigError(f"--hlo {file}: GPUs are worked out by formulas, there is no program; leave it out")
    if file.is_dir() or not file.parent.is_dir():
        raise ConfigError(f"--hlo {file} must be a file in a directory that exists")
