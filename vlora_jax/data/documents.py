"""Tokenised documents with what the loss counts in them, and how they are made to fit a row."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vlora_jax.data.dataset import fingerprint
from vlora_jax.data.table import Table
from vlora_jax.errors import DataError

ROUND = 64  # lengths are multiples of it


@dataclass(frozen=True)
class Documents:
    """Token ids one after the other.

    A document of n tokens takes n - 1 places in a row: all but its last are read, all but its first are predicted.

    Attributes:
      tokens: `(total,)`.
      supervised: `(total,)`, whether the loss counts the prediction of this token.
      starts: `(documents + 1,)`, where each begins and the last ends.
      rows: `(documents,)`, the place in the table that each came from.
      notes: what was left out or cut, for the report.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    rows: np.ndarray
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and which of them are supervised."""
        part = slice(self.starts[index], self.starts[index + 1])
        return self.tokens[part], self.supervised[part]

    @property
    def sizes(self) -> np.ndarray:
        """Places that each document takes."""
        return np.diff(self.starts) - 1

    @property
    def learnt(self) -> np.ndarray:
        """Supervised predictions of each document."""
        counts = np.concatenate([[0], np.cumsum(self.supervised)])
        return counts[self.starts[1:]] - counts[self.starts[:-1]] - self.supervised[self.starts[:-1]]

    def select(self, chosen: np.ndarray, note: str) -> "Documents":
        """Some of the documents."""
        pieces = [self[int(index)] for index in chosen]
        return gather(pieces, self.rows[chosen], (*self.notes, note))

    def fingerprint(self) -> str:
        return fingerprint(self.tokens, self.supervised, self.starts)


def gather(pieces: Iterable[tuple[np.ndarray, np.ndarray]], rows: Any, notes: tuple[str, ...] = ()) -> Documents:
    """Documents from tokens and masks."""
    pieces = list(pieces)
    tokens = [np.asarray(tokens, np.int32) for tokens, _ in pieces]
    masks = [np.asarray(mask, bool) for _, mask in pieces]
    starts = np.concatenate([[0], np.cumsum([len(each) for each in tokens])]).astype(np.int64)
    rows = np.asarray(rows, np.int64)
    flat = np.concatenate(tokens) if tokens else np.zeros(0, np.int32)
    return Documents(flat, np.concatenate(masks) if masks else np.zeros(0, bool), starts, rows, notes)


@dataclass
class Gathered:
    """Documents as they come, row by row of a table."""

    pieces: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)

    def add(self, row: int, tokens: Iterable[int], supervised: Iterable[bool]) -> None:
        self.pieces.append((np.fromiter(tokens, np.int32), np.fromiter(supervised, bool)))
        self.rows.append(row)

    def documents(self, notes: tuple[str, ...] = ()) -> Documents:
        return gather(self.pieces, self.rows, notes)


def usable(documents: Documents, table: Table, hint: str) -> Documents:
    """The documents that teach something: with at least one supervised prediction.

    Raises:
      DataError: none does.
    """
    good = documents.learnt > 0
    if not good.any():
        raise DataError(
            f"{table.name}: 0 of {len(documents.tokens):,} tokens are supervised: nothing to learn from; {hint}"
        )
    if good.all():
        return documents
    return documents.select(np.flatnonzero(good), f"{(~good).sum():,} rows without a supervised token left out")


def row_length(longest: int, asked: int | None, cap: int) -> int:
    """Tokens a row: what was asked for, or the longest row's, rounded up, at most `cap`."""
    return asked if asked is not None else min(cap, -(-longest // ROUND) * ROUND)


def overlong_rows(
    sizes: np.ndarray, length: int, overlong: str, table: Table, rows: np.ndarray, key: str = "data.length"
) -> tuple[np.ndarray, str]:
    """Which rows have more than `length` tokens, and a word about them.

    Args:
      sizes: tokens of each row.
      overlong: what is to happen to them.
      rows: the place of each in the table.
      key: that sets the length, for messages.

    Raises:
      DataError: there are some and `overlong` forbids it, or nothing would be left.
    """
    long = sizes > length
    about = (
        f"{table.name}: {long.sum():,} of {len(long):,} rows have more than {length} tokens (longest {sizes.max():,})"
    )
    if long.any() and overlong == "error":
        first = table.where(int(rows[np.flatnonzero(long)[0]]))
        raise DataError(f"{about}, the first is {first}; raise {key}, or set data.overlong to truncate or drop")
    if long.all() and overlong == "drop":
        raise DataError(f"{about}, so that none is left; raise {key}")
    return long, about


def fit(
    documents: Documents, length: int, overlong: Literal["truncate", "drop", "error", "split"], table: Table
) -> Documents:
    """Documents that take at most `length` places each.

    Raises:
      DataError: one is longer and must not be; nothing is left; or all of one's completion would be cut off.
    """
    long, about = overlong_rows(documents.sizes, length, overlong, table, documents.rows)
    if not long.any():
        return documents
    if overlong == "drop":
        return documents.select(np.flatnonzero(~long), f"{about}: left out")
    if overlong == "split":
        return split(documents, length, f"{about}: split")
    pieces = (documents[index] for index in range(len(documents)))
    note = f"{about}: cut off, without eos"
    cut = gather(
        ((tokens[: length + 1], mask[: length + 1]) for tokens, mask in pieces),
        documents.rows,
        (*documents.notes, note),
    )
    lost = np.flatnonzero(cut.learnt == 0)
    if len(lost):
        raise DataError(
            f"{table.where(int(cut.rows[lost[0]]))}: all of its {documents.learnt[lost[0]]:,} supervised tokens stand "
            f"behind the first {length}, as in {len(lost):,} of {len(documents):,} rows; raise data.length or set "
            "data.overlong=drop"
        )
    return cut


def split(documents: Documents, length: int, note: str) -> Documents:
    """Documents in parts of `length` places; a part begins with the token that the one before it ended with."""
    pieces, rows = [], []
    for index in range(len(documents)):
        tokens, mask = documents[index]
        for start in range(0, len(tokens) - 1, length):
            pieces.append((tokens[start : start + length + 1], mask[start : start + length + 1]))
            rows.append(documents.rows[index])
    return gather(pieces, rows, (*documents.notes, note))
