"""Rows with two sides: a text, or a pair of them, and its class; a prompt and its answer for two stacks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlora_jax.data.columns import class_names, classes, columns_of, prompts_and_completions, texts
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.dataset import Example
from vlora_jax.data.documents import overlong_rows, row_length
from vlora_jax.data.table import Table
from vlora_jax.data.tokens import encode, eos_id, in_chunks, pad_id, specials, without
from vlora_jax.errors import DataError


@dataclass(frozen=True)
class Encoded:
    """Token ids of texts, each with the tokenizer's special tokens around it.

    Attributes:
      tokens: ids of each text.
      types: which text of a pair each token belongs to; None where the model does not ask.
    """

    tokens: list[np.ndarray]
    types: list[np.ndarray] | None = None

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(each) for each in self.tokens])

    def select(self, chosen: np.ndarray) -> "Encoded":
        """Some of the texts."""
        types = None if self.types is None else [self.types[index] for index in chosen]
        return Encoded([self.tokens[index] for index in chosen], types)

    def replace(self, places: np.ndarray, others: "Encoded") -> "Encoded":
        """Other texts in these places."""

        def put(mine: list[np.ndarray], theirs: list[np.ndarray]) -> list[np.ndarray]:
            new = dict(zip(places.tolist(), theirs, strict=True))
            return [new.get(place, row) for place, row in enumerate(mine)]

        both = self.types is not None and others.types is not None
        return Encoded(put(self.tokens, others.tokens), put(self.types, others.types) if both else None)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Labelled:
    """Texts with classes: `tokens`, `segments` (0 is padding) and perhaps `types`, `(length,)`, and `label`."""

    encoded: Encoded
    labels: np.ndarray
    length: int
    pad: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        row = padded("", self.encoded.tokens[index], self.length, self.pad)
        if self.encoded.types is not None:
            types = np.zeros(self.length, np.int32)
            types[: len(self.encoded.types[index])] = self.encoded.types[index]
            row["types"] = types
        return row | {"label": self.labels[index], "id": np.int32(index)}


@dataclass(frozen=True)
class Answers:
    """Prompts with answers, for an encoder–decoder.

    `tokens`, `segments` `(length,)`; `decoder_tokens`, `decoder_segments`, `targets`, `mask` `(target_length,)`, the
    targets one further than the decoder's tokens, which begin with `start`.
    """

    prompts: Encoded
    answers: Encoded
    length: int
    target_length: int
    pad: int
    start: int

    def __len__(self) -> int:
        return len(self.prompts.tokens)

    def __getitem__(self, index: int) -> Example:
        answer = self.answers.tokens[index]
        shifted = np.concatenate([[self.start], answer[:-1]]).astype(np.int32)
        targets = padded("", answer, self.target_length, self.pad)
        return {
            **padded("", self.prompts.tokens[index], self.length, self.pad),
            **padded("decoder_", shifted, self.target_length, self.pad),
            "targets": targets["tokens"],
            "mask": targets["segments"] > 0,
            "id": np.int32(index),
        }


def padded(prefix: str, tokens: np.ndarray, length: int, pad: int) -> Example:
    """A row of tokens, filled up, with its segments."""
    row = np.full(length, pad, np.int32)
    row[: len(tokens)] = tokens
    return {f"{prefix}tokens": row, f"{prefix}segments": (np.arange(length) < len(tokens)).astype(np.int32)}


def labelled(
    config: DatasetConfig, tables: Sequence[Table], tokenizer: Any, cap: int, typed: bool
) -> tuple[list[Labelled], list[str], list[str]]:
    """The tables' texts with their classes; the names of the classes, those of the first table; notes.

    Args:
      cap: tokens that the model can read.
      typed: the model tells the texts of a pair by their types.

    Raises:
      DataError: a value is no text or no class, or a row too long.
    """
    columns = columns_of(config, tables[0])
    names = class_names(tables[0], columns["label"])
    encoded = [encode_pairs(table, columns, tokenizer, typed) for table in tables]
    length = row_length(max(int(each.sizes.max()) for each in encoded), config.length, cap)
    found, notes = [], []
    for table, each in zip(tables, encoded, strict=True):
        labels = classes(table, columns["label"], names)
        long, about = overlong_rows(each.sizes, length, config.overlong, table, np.arange(len(table)))
        if long.any() and config.overlong == "drop":
            each, labels = each.select(np.flatnonzero(~long)), labels[~long]
        elif long.any():
            short = encode_pairs(table.select(np.flatnonzero(long)), columns, tokenizer, typed, length)
            each = each.replace(np.flatnonzero(long), short)
        notes += [f"{about}: {'left out' if config.overlong == 'drop' else 'cut off'}"] if long.any() else []
        found.append(Labelled(each, labels, length, pad_id(tokenizer)))
    return found, names, notes


def encode_pairs(
    table: Table, columns: dict[str, str], tokenizer: Any, typed: bool, length: int | None = None
) -> Encoded:
    """The text, or both texts, of each row with the special tokens that the tokenizer puts around and between.

    Args:
      length: cut texts so that no row has more tokens; of a pair, the longer one first.
    """
    first = texts(table, columns["text"])
    second = texts(table, columns["pair"]) if "pair" in columns else None
    rows = first if second is None else list(zip(first, second, strict=True))
    found, types = [], []
    for chunk in in_chunks(rows, "tokenising"):
        sides = (list(chunk),) if second is None else tuple(map(list, zip(*chunk, strict=True)))
        cut = {"truncation": True, "max_length": length} if length else {}
        encoded = tokenizer(*sides, return_token_type_ids=typed, return_attention_mask=False, verbose=False, **cut)
        found += [np.array(ids, np.int32) for ids in encoded["input_ids"]]
        types += [np.array(ids, np.int32) for ids in encoded["token_type_ids"]] if typed else []
    return Encoded(found, types if typed else None)


def answers(
    config: DatasetConfig, tables: Sequence[Table], tokenizer: Any, cap: int, start: int
) -> tuple[list[Answers], list[str]]:
    """The tables' prompts and completions, each with one eos in the end; notes.

    Args:
      cap: tokens that the model can read.
      start: the decoder's first token.

    Raises:
      DataError: a value is no text, or a row too long.
    """
    prefix, end = specials(tokenizer).prefix, eos_id(tokenizer, config.eos)
    sides = [prompts_and_completions(config, table) for table in tables]
    prompts = [encode_ending(prompt, tokenizer, prefix, end) for prompt, _ in sides]
    replies = [encode_ending(completion, tokenizer, [], end) for _, completion in sides]
    length = row_length(max(int(each.sizes.max()) for each in prompts), config.length, cap)
    target_length = row_length(max(int(each.sizes.max()) for each in replies), config.target_length, cap)
    found, notes = [], []
    for table, prompt, reply in zip(tables, prompts, replies, strict=True):
        rows = np.arange(len(table))
        long, about = overlong_rows(prompt.sizes, length, config.overlong, table, rows)
        if long.any():
            notes.append(f"{about}: {'left out' if config.overlong == 'drop' else 'cut off'}")
        far, about = overlong_rows(reply.sizes, target_length, config.overlong, table, rows, "data.target_length")
        if far.any():
            notes.append(f"{about} to learn: {'left out' if config.overlong == 'drop' else 'cut off, without eos'}")
        if config.overlong == "drop":
            kept = np.flatnonzero(~(long | far))
            if not len(kept):
                raise DataError(f"{table.name}: no row is short enough; raise data.length or data.target_length")
            prompt, reply = prompt.select(kept), reply.select(kept)
        prompt = Encoded(
            [ids if len(ids) <= length else np.append(ids[: length - 1], ids[-1:]) for ids in prompt.tokens]
        )
        reply = Encoded([ids[:target_length] for ids in reply.tokens])
        found.append(Answers(prompt, reply, length, target_length, pad_id(tokenizer), start))
    return found, notes


def encode_ending(values: Sequence[str], tokenizer: Any, prefix: list[int], end: int) -> Encoded:
    """Texts between `prefix` and one eos."""
    found = [
        np.array([*prefix, *without(ids, end), end], np.int32)
        for chunk in in_chunks(values, "tokenising")
        for ids in encode(tokenizer, chunk)
    ]
    return Encoded(found)
