"""Tokenizers, and texts as token ids."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlora_jax.data.network import hub
from vlora_jax.errors import DataError
from vlora_jax.hub.where import PACKAGE, of_package

CHUNK = 1000  # texts a call, which tokenises them on all cores


class Specials(NamedTuple):
    """Ids that a tokenizer puts before and after a text."""

    prefix: list[int]
    suffix: list[int]


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a directory, an installed package (`package:NAME`) or a hub name.

    Raises:
      DataError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if source.startswith(PACKAGE):
        source = str(of_package(source.removeprefix(PACKAGE)))
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return AutoTokenizer.from_pretrained(path, local_files_only=True)
        with hub():
            return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of many kinds: no network, no such name, damaged files
        reason = " ".join(str(error).split()).split(". ")[0][:200]
        where = "is a directory, but" if path.is_dir() else "is no directory here, and from the hub it"
        raise DataError(f"tokenizer {source!r} {where} cannot be loaded: {reason}") from None


def specials(tokenizer: Any) -> Specials:
    """What the tokenizer adds around a text.

    Raises:
      DataError: it changes the text's own ids as well.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return Specials(full[:start], full[start + len(bare) :])
    raise DataError(f"the tokenizer writes 'a' as {bare} without and {full} with its special tokens")


def eos_id(tokenizer: Any, eos: str | None) -> int:
    """The token that ends a text.

    Args:
      eos: its text; that of the tokenizer if not given.

    Raises:
      DataError: the tokenizer has none, or not that one.
    """
    if eos is None:
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos token, so a model would never stop; name one by data.eos")
        return int(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    if eos not in vocabulary:
        raise DataError(f"data.eos {eos!r} is no token of the tokenizer")
    return int(vocabulary[eos])


def pad_id(tokenizer: Any) -> int:
    """What fills rows up; any token will do, as rows are told from their padding by length."""
    found = tokenizer.pad_token_id
    return int(found if found is not None else 0)


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, nothing added."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def without(ids: list[int], end: int) -> list[int]:
    """Ids without an eos that the text itself ends with, so that there is one in the end."""
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return ids


def in_chunks(rows: Sequence[Any], what: str) -> Iterator[Sequence[Any]]:
    """Rows, `CHUNK` at a time, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    starts: Iterable[int] = range(0, len(rows), CHUNK)
    hidden = not sys.stderr.isatty() or len(rows) <= 5 * CHUNK
    for start in track(starts, what, console=Console(stderr=True), transient=True, disable=hidden):
        yield rows[start : start + CHUNK]


def decode(tokenizer: Any, ids: Any) -> str:
    """Text with its special tokens."""
    return tokenizer.decode(list(map(int, ids)), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def pieces(tokenizer: Any, ids: Any, supervised: Any) -> list[tuple[str, bool]]:
    """A text in runs of tokens that the loss counts and runs that it does not."""
    found: list[tuple[str, bool]] = []
    before = ""
    for place in range(1, len(ids) + 1):
        if place < len(ids) and bool(supervised[place]) == bool(supervised[place - 1]):
            continue
        so_far = decode(tokenizer, ids[:place])  # with what stands before: some tokenizers drop a leading space
        found.append((so_far[len(before) :], bool(supervised[place - 1])))
        before = so_far
    return found
