"""`vlora-jax generate`: continue prompts."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from rich.console import Console

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.errors import ConfigError, DataError
from vlora_jax.generation.generate import generate
from vlora_jax.generation.sampling import Sampling
from vlora_jax.generation.text import codec_of
from vlora_jax.training.opened import Opened, open_adapter, open_model


def command(
    model: Annotated[
        str, typer.Argument(help="A run, a directory of model files, a hub name, or package:NAME.", show_default=False)
    ],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Texts to continue; - reads one from standard input.", show_default=False)
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="A run's or PEFT's adapter; again for several. A run brings its own, as the first."),
    ] = None,
    rows: Annotated[
        str | None,
        typer.Option(help="Which adapter serves each prompt, '0,1,-1'; -1 none. Without: all adapters add up."),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='Prompts, one a line; of a .jsonl file {"prompt": …} and, if wanted, {"adapter": 0}.'),
    ] = None,
    new: Annotated[int, typer.Option(min=1, help="New tokens a prompt at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from the likeliest tokens with this probability.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Prompts are turns of a chat: use the chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="A system turn before each prompt; implies --chat.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 8,
    tokenizer: Annotated[str | None, typer.Option(help="A tokenizer, if the model brings none.")] = None,
    step: Annotated[int | None, typer.Option(help="A run's checkpoint. Without: the best.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16. Without: as stored.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt.")] = False,
) -> None:
    """Continue prompts with a model, with adapters if wanted, each prompt with its own if wanted.

    [bold]Examples[/bold]

      vlora-jax generate runs/stdlib_pretrain "def main(" --new 64
      vlora-jax generate Qwen/Qwen3-0.6B "Why is the sky blue?" --chat --temperature 0.7 --top-p 0.9
      vlora-jax generate Qwen/Qwen3-0.6B "first" "second" --adapter runs/a --adapter peft_dir --rows 0,1
    """
    texts, chosen = gather(prompts or [], rows, file)
    sampling = Sampling(temperature, top_k, top_p)
    opened = open_model(model, step, dtype)
    adapters = [*opened.adapters, *(each for where in adapter or () for each in open_adapter(where, opened))]
    codec = codec_of(tokenizer or opened.tokenizer, opened.config)
    tokens = [codec.encode(text, chat, system) for text in texts]
    began, count = time.monotonic(), 0
    for start in range(0, len(texts), batch):
        some = slice(start, start + batch)
        key = jax.random.fold_in(jax.random.key(seed), start)
        own = None if chosen is None else chosen[some]
        out = answer(opened, adapters, tokens[some], rows=own, most=new, eos=codec.eos, sampling=sampling, key=key)
        for text, each, ended in zip(texts[some], out.tokens, out.finished, strict=True):
            count += len(each)
            said = codec.decode(each)
            if as_json:
                record = {"prompt": text, "answer": said, "tokens": len(each), "finished": ended}
                typer.echo(json.dumps(record, ensure_ascii=False))
            else:
                typer.echo(f"{typer.style(text, dim=True)}{said}" + ("\n" if len(texts) > 1 else ""))
    seconds = time.monotonic() - began
    line = f"{count} new tokens in {seconds:.1f} s, compilation included"
    Console(stderr=True).print(line, style="dim", highlight=False)


def answer(opened: Opened, adapters: list[Adapter], tokens: list[list[int]], **options: Any) -> Any:
    """`generate` for a model that was opened."""
    return generate(opened.graphdef, opened.base, tokens, adapters, **options)


def gather(prompts: list[str], rows: str | None, file: Path | None) -> tuple[list[str], list[int] | None]:
    """Prompts from the command line, standard input and a file, and the adapter of each if any is given.

    Raises:
      DataError: there are none, or the file cannot be read.
      ConfigError: rows are no numbers, or not as many as prompts.
    """
    texts: list[str] = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
    own: list[int | None] = [None] * len(texts)
    if file is not None:
        try:
            lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file} cannot be read: {error}") from None
        for number, line in enumerate(lines, 1):
            text, index = parsed(line, f"{file}, line {number}") if file.suffix == ".jsonl" else (line, None)
            texts.append(text)
            own.append(index)
    if not texts:
        raise DataError("no prompt: give some after the model, or --file")
    if rows is not None:
        try:
            return texts, [int(row) for row in rows.split(",")]
        except ValueError:
            raise ConfigError(f"--rows {rows!r} must be numbers, such as 0,1,-1") from None
    return texts, None if all(index is None for index in own) else [-1 if index is None else index for index in own]


def parsed(line: str, where: str) -> tuple[str, int | None]:
    """Prompt and adapter of a line of JSON."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(f'{where} must hold {{"prompt": "…"}}')
    index = record.get("adapter")
    if index is not None and not isinstance(index, int):
        raise DataError(f"{where}: adapter is {index!r}; it must be a number, from 0, or -1 for none")
    return record["prompt"], index
