"""`vlora-jax train`: start a run, or continue the one that is there."""

import json
from pathlib import Path
from typing import Annotated

import jax
import typer
import yaml
from rich.console import Console

from vlora_jax.distributed import processes
from vlora_jax.distributed.watch import STOPPED
from vlora_jax.training import screens
from vlora_jax.training.config import load_config
from vlora_jax.training.job import Job
from vlora_jax.training.loop import train


def command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Changes to the config, by dotted key: steps=500 optimizer.rate=1e-3 model.vertical.size=6",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="A YAML file from configs/. Without one: VLoRA on the embedded digits."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve and compile everything, show it, train nothing, write nothing.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every key with its effective value as YAML, and leave.")
    ] = False,
    profile_steps: Annotated[
        str | None,
        typer.Option(
            metavar="FIRST:LAST",
            help="Keep a profiler's trace of these steps, 10:12 for three, in the run directory; log.profile_steps.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a model or an adapter; an interrupted run is continued by the same command.

    The run directory ([bold]run_dir[/bold]) holds config.yaml, metrics.jsonl, TensorBoard events, checkpoints and
    a loss curve. Ctrl-C and SIGTERM save first and exit with code 75.

    [bold]Examples[/bold]

      vlora-jax train
      vlora-jax train steps=300 model.vertical.structure=chain run_dir=runs/chain
      vlora-jax train --config configs/stdlib_pretrain.yaml --dry-run
      vlora-jax train steps=30 run_dir=runs/profiled --profile-steps 20:22
    """
    chosen = [] if profile_steps is None else [f"log.profile_steps={json.dumps(profile_steps)}"]
    run = load_config(config, [*(overrides or ()), *chosen])
    if print_config:
        typer.echo(yaml.safe_dump(run.plain(), sort_keys=False), nl=False)
        return
    processes.start(**run.distributed.model_dump())
    console = Console() if processes.is_writer() else Console(quiet=True)
    if dry_run:
        job = Job.of(run)
        with jax.set_mesh(job.mesh):
            compiled = job.step().lower(job.state, job.base, job.batch).compile()
        console.print(screens.first_screen(job, compiled.memory_analysis()))
        if job.data.summary is not None:
            console.print(screens.data_screen(job.data.summary), soft_wrap=True)
        for choice in job.choices:
            console.print(f"  {choice}", highlight=False, markup=False, soft_wrap=True)
        console.print("dry run: nothing was trained or written")
        return
    if train(run, console).stopped:
        raise typer.Exit(STOPPED)
