"""`vlora-jax sweep`: many adapters over one frozen base, trained together."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import jax
import typer
from rich.console import Console
from rich.live import Live

from vlora_jax.distributed.watch import STOPPED
from vlora_jax.experiments import outcomes, sweep_report
from vlora_jax.experiments.session import Standing
from vlora_jax.experiments.sweep import Program, load_sweep, members, open_sweep, programs
from vlora_jax.training.loop import signals
from vlora_jax.training.runs import lock


def command(
    config: Annotated[Path, typer.Argument(help="The sweep, a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes to all members, by dotted key.", show_default=False),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all members, show the programs, train nothing, write nothing.")
    ] = False,
    report_only: Annotated[bool, typer.Option("--report", help="Run nothing, show what is there.")] = False,
) -> None:
    """Train every combination of a grid's values, as many as possible together over one frozen base.

    Members that differ in numbers only (seed, the optimiser's numbers, steps, patience; of LoRA and its kin also rank,
    alpha and targets) are one program, and each comes out as if trained by itself. Others follow in further programs.
    The directory of the [bold]results[/bold] gets a page, a picture, and the winner as a run directory, which eval,
    inspect, merge and export take. Ctrl-C and SIGTERM save first and exit with code 75; the same command continues.

    [bold]Examples[/bold]

      vlora-jax sweep configs/sweeps/digits_lora.yaml --dry-run
      vlora-jax sweep configs/sweeps/digits_lora.yaml steps=200
      vlora-jax sweep configs/sweeps/digits_lora.yaml --report
    """
    sweep = load_sweep(config, overrides or ())
    console, devices, found = Console(), jax.devices(), members(sweep)
    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    plan = programs(found, devices, sweep.together)
    if dry_run:
        for line in [*sweep_report.plan_lines(plan, len(devices)), "dry run: nothing was trained or written"]:
            say(line)
        return
    results, metric = Path(sweep.results), found[0].config.evaluate.metric
    open_sweep(sweep, found[0], write=False)
    if not report_only:
        for line in sweep_report.plan_lines(plan, len(devices)):
            say(line)
        with lock(results, "results"):
            open_sweep(sweep, found[0])
            if train(plan, results, console, say):
                say(f"stopped and saved; the same command continues {results}")
                raise typer.Exit(STOPPED)
            settings = outcomes.ranked(outcomes.outcomes(plan, results), metric)
            sweep_report.write_report(sweep, settings, metric)
            winner = outcomes.write_runs(plan, results, settings, sweep.keep == "all")
    settings = outcomes.ranked(outcomes.outcomes(plan, results), metric)
    if not settings:
        say(f"no results in {results} yet; without --report they are made")
        return
    console.print(sweep_report.table(f"sweep of {len(found)}", settings))
    console.print(sweep_report.legend(metric, settings), style="dim", soft_wrap=True)
    if not report_only:
        say(f"winner   {winner.member.name}: {results / outcomes.WINNER}")
        say(f"picture  {results / sweep_report.PICTURE}")


def train(plan: Sequence[Program], results: Path, console: Console, say: Callable[[str], None]) -> bool:
    """Train what is missing, with a live table on a terminal; true if stopped."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(results.absolute() / "compile_cache"))
    seen = -1.0
    with signals() as asked, Live(console=console, auto_refresh=False, transient=True) as live:

        def watch(number: int, standings: Sequence[Standing], step: int) -> None:
            nonlocal seen
            if console.is_terminal and time.monotonic() - seen > 0.25:
                seen = time.monotonic()
                title = f"program {number + 1} of {len(plan)}, step {step}"
                live.update(sweep_report.live_table(plan[number], standings, title), refresh=True)

        return outcomes.sweep(plan, results, jax.devices(), say, watch, asked)
