"""`vlora-jax compare`: methods beside each other."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlora_jax.checkpoint import make_directory
from vlora_jax.cli.train import STOPPED
from vlora_jax.experiments import report
from vlora_jax.experiments.compare import Record, cells, chosen, compare, done, load_comparison

REPORT = "README.md"


def command(
    config: Annotated[Path, typer.Argument(help="The comparison, a YAML file.", show_default=False)],
    task: Annotated[list[str] | None, typer.Option(help="Only this task; again for several.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; again for several.")] = None,
    report_only: Annotated[bool, typer.Option("--report", help="Run nothing, show what is there.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all configs, say what is missing, and leave.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="The table's lines for programs.")] = False,
) -> None:
    """Train methods on tasks with the same seeds, and compare: accuracy, differences seed by seed, numbers, seconds.

    Each run's result is one JSON file under the comparison's [bold]results[/bold]. What is there with the same config
    is not run again: the same command continues an interrupted comparison, and a new method costs only itself. The
    report goes to README.md beside the results.

    [bold]Examples[/bold]

      vlora-jax compare configs/compare_sst2.yaml --dry-run
      vlora-jax compare configs/compare_sst2.yaml --task sst2_16shot --method lora --method vera
      vlora-jax compare configs/compare_sst2.yaml --report
    """
    comparison = load_comparison(config)
    wanted, console = cells(comparison, task, method), Console(stderr=True)
    missing = [cell for cell in wanted if done(cell) is None]
    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    if dry_run:
        say(f"{len(wanted)} runs, {len(missing)} missing")
        for name in chosen(task, list(comparison.tasks), "task"):
            mine = [cell for cell in missing if cell.task == name]
            counts = {cell.method: sum(each.method == cell.method for each in mine) for cell in mine}
            say(f"  {name}: " + (", ".join(f"{key} × {n}" for key, n in counts.items()) or "none"))
        return
    if not report_only:
        say(f"{len(wanted)} runs, {len(missing)} missing; results in {comparison.results}")
        told = lambda place, record: say(f"[{place + 1}/{len(wanted)}] {sentence(record)}")
        if len(list(compare(wanted, told))) < len(wanted):
            say("stopped; the same command runs what is missing")
            raise typer.Exit(STOPPED)
    every = [record for cell in cells(comparison) if (record := done(cell)) is not None]
    if not every:
        say(f"no results in {comparison.results} yet; without --report they are made")
        return
    found = report.lines(comparison, every)
    make_directory(Path(comparison.results))
    Path(comparison.results, REPORT).write_text(report.markdown(comparison, found), encoding="utf-8")
    pairs = {(cell.task, cell.method) for cell in wanted}
    asked = [line for line in found if (line.task, line.method) in pairs]
    if as_json:
        plain = [dataclasses.asdict(line) | {"beyond_noise": line.beyond_noise} for line in asked]
        typer.echo(json.dumps(plain, indent=2))
        return
    for name in dict.fromkeys(line.task for line in asked):
        Console().print(report.table(name, [line for line in asked if line.task == name]))
    Console().print(report.legend(comparison), style="dim", soft_wrap=True)


def sentence(record: Record) -> str:
    """A result in half a line."""
    came = record.failure or f"{record.accuracy:.1%}"
    return f"{record.task}, {record.method}, seed {record.seed}: {came} ({record.seconds:.0f} s)"
