"""Documents as rows of one length: one a row, or several, packed once by best fit.

A packed row is an example like any other, so the order of a run and its exact continuation stay grain's constant-time
random access: nothing is packed again when a run goes on.
"""

from dataclasses import dataclass

import numpy as np

from vlora_jax.data.dataset import Example
from vlora_jax.data.documents import Documents


@dataclass(frozen=True)
class Padded:
    """One document a row, `(length,)`, filled up at the end, where `mask` is false."""

    documents: Documents
    length: int
    pad: int

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Example:
        tokens, supervised = self.documents[index]
        size = len(tokens) - 1
        row = {
            "tokens": np.full(self.length, self.pad, np.int32),
            "targets": np.full(self.length, self.pad, np.int32),
            "mask": np.zeros(self.length, bool),
        }
        row["tokens"][:size], row["targets"][:size], row["mask"][:size] = tokens[:-1], tokens[1:], supervised[1:]
        return row | {"id": np.int32(index)}


@dataclass(frozen=True)
class Packed:
    """Several documents a row, `(length,)`, told apart by `segments` 1, 2, …; 0 is padding. `positions` restart.

    Attributes:
      bins: the documents of each row.
    """

    documents: Documents
    bins: list[list[int]]
    length: int
    pad: int

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Example:
        row = {
            "tokens": np.full(self.length, self.pad, np.int32),
            "targets": np.full(self.length, self.pad, np.int32),
            "mask": np.zeros(self.length, bool),
            "positions": np.zeros(self.length, np.int32),
            "segments": np.zeros(self.length, np.int32),
        }
        start = 0
        for segment, document in enumerate(self.bins[index], 1):
            tokens, supervised = self.documents[document]
            part = slice(start, start := start + len(tokens) - 1)
            row["tokens"][part], row["targets"][part], row["mask"][part] = tokens[:-1], tokens[1:], supervised[1:]
            row["positions"][part], row["segments"][part] = np.arange(len(tokens) - 1), segment
        return row | {"id": np.int32(index)}


def best_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
    """Documents by row: the longest first, each into the fullest row that has room for it.

    >>> best_fit(np.array([3, 5, 2, 6]), 8)
    [[3, 2], [1, 0]]

    Args:
      sizes: places that each document takes, at most `length`.
      length: places a row has.
    """
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room that is left
    rooms = 0  # bit r is set while a row with room r exists
    for document in np.argsort(-sizes, kind="stable"):
        size = int(sizes[document])
        fitting = rooms >> size << size
        if fitting:
            room = (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, len(bins)
            bins.append([])
        bins[row].append(int(document))
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return bins
