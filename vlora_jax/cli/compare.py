"""`vlora-jax compare`: methods beside each other."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlora_jax.checkpoint import make_directory
from vlora_jax.distributed.watch import STOPPED
from vlora_jax.errors import ConfigError
from vlora_jax.experiments import page, report
from vlora_jax.experiments.compare import (
    CompareConfig,
    Record,
    cells,
    chosen,
    compare,
    compiled_once,
    done,
    load_comparison,
    prepare,
)
from vlora_jax.inspection.sheets import plain
from vlora_jax.training.runs import write_whole

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
    markdown: Annotated[
        Path | None, typer.Option(help="The report as Markdown, its plots beside it.", show_default="README.md there")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="The report as one page with everything in it.")] = None,
) -> None:
    """Train methods on tasks with the same seeds, and compare: accuracy, differences seed by seed, numbers, seconds.

    Each run's result is one JSON file under the comparison's [bold]results[/bold]. What is there with the same config
    is not run again: the same command continues an interrupted comparison, and a new method costs only itself. Runs
    that a task starts from are trained first. The report goes to README.md beside the results.

    [bold]Examples[/bold]

      vlora-jax compare configs/compare/sst2.yaml --dry-run

      vlora-jax compare configs/compare/sst2.yaml --task sst2_16shot --method lora --method vera

      vlora-jax compare configs/compare/digits.yaml --report --html digits.html
    """
    if report_only and dry_run:
        raise ConfigError("--report runs nothing, and --dry-run says what would be run; ask for one of them")
    comparison, console = load_comparison(config), Console(stderr=True)
    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    chosen(method, list(comparison.arms()), "method")  # before anything is trained
    if not (dry_run or report_only) and not prepare(comparison, task, say):
        say("stopped; the same command goes on")
        raise typer.Exit(STOPPED)
    wanted = cells(comparison, task, method)
    missing = [cell for cell in wanted if done(cell) is None]
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
        with compiled_once():
            records = list(compare(wanted, told))
        if len(records) < len(wanted):
            say("stopped; the same command runs what is missing")
            raise typer.Exit(STOPPED)
    every = [record for cell in cells(comparison) if (record := done(cell)) is not None]
    if not every:
        say(f"no results in {comparison.results} yet; without --report they are made")
        return
    found = report.lines(comparison, every)
    write_reports(comparison, found, markdown or Path(comparison.results, REPORT), html)
    pairs = {(cell.task, cell.method) for cell in wanted}
    asked = [line for line in found if (line.task, line.method) in pairs]
    if as_json:
        typer.echo(json.dumps([plain(line) | {"beyond_noise": line.beyond_noise} for line in asked], indent=2))
        return
    for name in dict.fromkeys(line.task for line in asked):
        Console().print(report.table(name, [line for line in asked if line.task == name]))
    Console().print(report.legend(comparison), style="dim", soft_wrap=True)


def write_reports(comparison: CompareConfig, found: list[report.Line], markdown: Path, html: Path | None) -> None:
    """The report as Markdown with its plots, and as a page if one is wanted."""
    pictures = {task: page.draw_pareto(lines) for task, lines in report.by_task(comparison, found).items()}
    make_directory(markdown.parent)
    for task, picture in pictures.items():
        write_whole(markdown.parent / report.picture(task), picture)
    write_whole(markdown, report.markdown(comparison, found))
    if html is not None:
        make_directory(html.parent)
        write_whole(html, page.page(comparison, found, pictures))


def sentence(record: Record) -> str:
    """A result in half a line."""
    came = record.failure or f"accuracy {record.accuracy:.1%}, loss {record.loss:.4g}"
    return f"{record.task}, {record.method}, seed {record.seed}: {came} ({record.seconds:.0f} s)"
