"""What every data set offers, whatever it holds."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from vlora_jax.data.summary import Summary

Example = dict[str, Any]  # arrays by name
Task = Literal["classification", "next_token", "text_classification", "seq2seq", "matrix_completion"]


@runtime_checkable
class Source(Protocol):
    """Examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class DataSet:
    """Two random-access sources of examples.

    Attributes:
      task: `"classification"`: examples have `image` and `label`; `"next_token"`: `tokens`, `targets` and `mask`,
        all `(length,)`, and `positions` and `segments` where several documents share a row;
        `"text_classification"`: `tokens`, `segments` and perhaps `types`, `(length,)`, and `label`; `"seq2seq"`:
        `tokens` and `segments`, `(length,)`, and `decoder_tokens`, `decoder_segments`, `targets` and `mask`,
        `(target length,)`; `"matrix_completion"`: `tokens`, rows' numbers `(rows,)`, and `targets` and `mask`,
        `(rows, columns)`.
        Segments are 0 in padding. Every example has its number in its source as `id`.
      augment: changes a training example with a NumPy generator that depends on the run's seed and the place of
        the example in the data order alone.
      facts: what a model must fit: `classes` and `image`, or `vocabulary`; the classes' names as `labels`.
      summary: what to show of a set of texts before it is learnt.
    """

    name: str
    task: Task
    train: Source
    held_out: Source
    fingerprint: str
    augment: Callable[[Example, np.random.Generator], Example] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    summary: Summary | None = None


def fingerprint(*arrays: np.ndarray) -> str:
    """A short hash of the exact contents of a data set."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(str((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
