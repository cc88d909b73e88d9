"""`vlora-jax eval`: a model's marks on held-out data."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.errors import ConfigError
from vlora_jax.generation.text import codec_of
from vlora_jax.training.config import RunConfig, load_config
from vlora_jax.training.evaluate import Answer, Marks, answers, held_out_marks
from vlora_jax.training.job import check_fit, load_data
from vlora_jax.training.opened import Opened, open_adapter, open_model, open_start
from vlora_jax.training.runs import CHECKPOINTS, CONFIG, best_step, read_config
from vlora_jax.training.screens import plain_table

SHOWN = 3  # wrong answers that are shown


def command(
    run: Annotated[
        Path | None, typer.Argument(help="A run. Without one: the model of --config as it starts.", show_default=False)
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Changes: data.held_out=test.jsonl", show_default=False),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Of a run that has not been started.")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="A run's or PEFT's adapter; again for several.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Also without the adapters, to compare.")] = False,
    count: Annotated[
        int, typer.Option("--answers", min=0, help="Answer so many held-out prompts and compare with the completions.")
    ] = 0,
    after: Annotated[str | None, typer.Option(help="Compare only what stands after this, as '####' in GSM8K.")] = None,
    new: Annotated[int, typer.Option(min=1, help="New tokens an answer at most.")] = 256,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples at a time. Without: evaluate.batch.")] = None,
    step: Annotated[int | None, typer.Option(help="A run's checkpoint. Without: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Measure a model on held-out data: loss, accuracy and, if wanted, answers that it generates.

    [bold]Examples[/bold]

      vlora-jax eval runs/minilm_sst2_lora data.held_out=test.tsv
      vlora-jax eval runs/llama_gsm8k_lora --answers 200 --after '####' --base
      vlora-jax eval --config configs/minilm_sst2_lora.yaml --adapter peft_dir
    """
    settings, opened = resolve(run, overrides or [], config, step)
    adapters = [*opened.adapters, *(each for where in adapter or () for each in open_adapter(where, opened))]
    data = load_data(settings)
    check_fit(opened.config, data, None)
    arms: dict[str, list[Adapter]] = {"base": [], "adapted": adapters} if base and adapters else {"": adapters}
    records = {}
    for name, used in arms.items():
        marks = held_out_marks(opened, used, data, batch or settings.evaluate.batch)
        said: list[Answer] = []
        if count:
            codec = codec_of(settings_tokenizer(settings) or opened.tokenizer, opened.config)
            progress = lambda done: Console(stderr=True).print(f"{done} answers", style="dim", end="\r")
            said = answers(opened, used, data, codec, count=count, new=new, after=after, notify=progress)
        records[name] = (marks, said)
    if as_json:
        typer.echo(
            json.dumps({name or "marks": plain(*record) for name, record in records.items()}, ensure_ascii=False)
        )
        return
    for name, (marks, said) in records.items():
        table = plain_table(f"{run or config}{f', {name}' if name else ''}")
        table.add_row("held-out data", data.name)
        for key, value in lines(marks, data.task):
            table.add_row(key, value)
        if said:
            right = sum(each.right for each in said)
            spread = math.sqrt(right / len(said) * (1 - right / len(said)) / len(said))
            table.add_row("answers right", f"{right} of {len(said)}, {right / len(said):.1%} ± {spread:.1%}")
            for each in [each for each in said if not each.right][:SHOWN]:
                table.add_row("wrong", f"{each.said.strip()[-200:]!r} instead of {each.expected.strip()[-200:]!r}")
        Console().print(table)


def resolve(run: Path | None, overrides: list[str], config: Path | None, step: int | None) -> tuple[RunConfig, Opened]:
    """The settings and the model."""
    if run is not None and "=" in run.name and not run.exists():  # the first override, where no run is given
        run, overrides = None, [str(run), *overrides]
    if (run is None) == (config is None):
        raise ConfigError("give a run, or --config with the config of one that has not been started")
    if run is not None:
        read_config(run)  # says what is missing
        changed = [each.partition("=")[0] for each in overrides]
        foreign = next((key for key in changed if key.split(".")[0] not in ("data", "evaluate")), None)
        if foreign:
            raise ConfigError(f"{foreign} belongs to the run; only data and evaluate can be changed here")
        about = checkpoint.metadata(run / CHECKPOINTS, best_step(run) if step is None else step)
        if about["data_fingerprint"] is None and not changed:
            raise ConfigError(
                f"{run} was imported and has no data of its own; say what to measure it on: "
                f"data.name=dataset data.path=FILE data.format=completion, or the like"
            )
        return load_config(run / CONFIG, overrides), open_model(str(run), step)
    settings = load_config(config, overrides)
    return settings, open_start(settings)


def settings_tokenizer(settings: RunConfig) -> str | None:
    """The tokenizer that the data section names."""
    return getattr(settings.data, "tokenizer", None)


def lines(marks: Marks, task: str) -> list[tuple[str, str]]:
    """What to show of a table's marks."""
    unit = "tokens" if task in ("next_token", "seq2seq") else "examples"
    spread = math.sqrt(marks.accuracy * (1 - marks.accuracy) / max(marks.weight, 1))
    accuracy = f"{marks.accuracy:.2%}" + (f" ± {spread:.2%}" if unit == "examples" else "")
    perplexity = f", perplexity {math.exp(marks.loss):.2f}" if unit == "tokens" else ""
    return [("loss", f"{marks.loss:.4f}{perplexity}"), ("accuracy", accuracy), (unit, f"{marks.weight:,.0f}")]


def plain(marks: Marks, said: list[Answer]) -> dict:
    """For programs."""
    record = dataclasses.asdict(marks)
    if said:
        record |= {"answers_right": sum(each.right for each in said), "answers": [dataclasses.asdict(e) for e in said]}
    return record
