"""Rows as token ids with a mask of what the loss counts: text and completions."""

from typing import Any

from vlora_jax.data.columns import columns_of, prompts_and_completions, texts
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.documents import Documents, Gathered
from vlora_jax.data.table import Table
from vlora_jax.data.tokens import encode, eos_id, in_chunks, specials, without


def text_documents(config: DatasetConfig, table: Table, tokenizer: Any) -> Documents:
    """Each text between the tokenizer's start tokens and one eos; empty texts are left out."""
    prefix, end = specials(tokenizer).prefix, eos_id(tokenizer, config.eos)
    gathered, empty = Gathered(), 0
    values = texts(table, columns_of(config, table)["text"])
    row = 0
    for chunk in in_chunks(values, "tokenising"):
        for text, ids in zip(chunk, encode(tokenizer, chunk), strict=True):
            if text.strip():
                ids = [*prefix, *without(ids, end), end]
                gathered.add(row, ids, [False] * len(prefix) + [True] * (len(ids) - len(prefix)))
            empty += not text.strip()
            row += 1
    return gathered.documents((f"{empty:,} empty rows left out",) if empty else ())


def completion_documents(config: DatasetConfig, table: Table, tokenizer: Any) -> Documents:
    """Prompt, completion and one eos, the last two supervised.

    The prompt's ids are those of the prompt alone, as a model will be asked later, even where the tokenizer would
    join the last letters of the prompt and the first of the completion in one token.
    """
    prefix, end = specials(tokenizer).prefix, eos_id(tokenizer, config.eos)
    gathered = Gathered()
    row = 0
    pairs = list(zip(*prompts_and_completions(config, table), strict=True))
    for chunk in in_chunks(pairs, "tokenising"):
        prompts = encode(tokenizer, [prompt for prompt, _ in chunk])
        both = encode(tokenizer, [prompt + completion for prompt, completion in chunk])
        joined = [
            place for place, (start, ids) in enumerate(zip(prompts, both, strict=True)) if ids[: len(start)] != start
        ]
        alone = dict(zip(joined, encode(tokenizer, [chunk[place][1] for place in joined]), strict=True))
        for place, (start, ids) in enumerate(zip(prompts, both, strict=True)):
            rest = [*without(alone[place] if place in alone else ids[len(start) :], end), end]
            asked = [*prefix, *start]
            known = [False] * len(prefix) + [config.loss == "all"] * len(start)
            gathered.add(row, asked + rest, known + [True] * len(rest))
            row += 1
    return gathered.documents()
