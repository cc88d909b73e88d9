"""Causal language modelling on the running Python's own standard library, one token a byte.

Two parts with nothing in common but the language: the library's source files, to train on from scratch, and the
prose of its reference manual (`pydoc_data.topics`), as the domain to adapt to. Whole files and whole topics are
held out.
"""

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from vlora_jax.data.dataset import DataSet, Example, fingerprint
from vlora_jax.errors import DataError

VOCABULARY = 256
SEPARATOR = b"\0"  # between documents
SKIPPED = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "encodings",
    "__pycache__",
}


@dataclass(frozen=True)
class Windows:
    """Windows of `length` tokens of a text, each with the tokens one further as targets."""

    text: np.ndarray
    length: int
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Example:
        start = self.starts[index]
        window = self.text[start : start + self.length + 1].astype(np.int32)
        mask = np.ones(self.length, bool)
        return {"tokens": window[:-1], "targets": window[1:], "mask": mask, "id": np.int32(index)}


def windows(text: np.ndarray, length: int, at_most: int | None = None) -> Windows:
    """All consecutive windows of a text, or `at_most` of them, evenly spread."""
    count = (len(text) - 1) // length
    chosen = np.arange(count) if at_most is None or count <= at_most else np.linspace(0, count - 1, at_most).astype(int)
    return Windows(text, length, chosen * length)


def documents(part: Literal["code", "prose"]) -> dict[str, bytes]:
    """Text by name: source files by their path, or topics of the reference manual.

    Raises:
      DataError: this Python ships without them.
    """
    if part == "prose":
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise DataError("this Python has no pydoc_data.topics, the prose of pystdlib; use part=code") from None
        return {name: text.encode() for name, text in topics.items()}
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    if not files:
        raise DataError(f"no Python source files below {root}; pystdlib needs a Python with its library's sources")
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def load(part: Literal["code", "prose"] = "code", length: int = 256, held_out_windows: int = 256) -> DataSet:
    """The standard library in windows of `length` bytes.

    Args:
      part: source code or the manual's prose.
      length: tokens a window.
      held_out_windows: at most so many windows of the held-out documents, evenly spread.

    Raises:
      DataError: there are no documents, or not one window of them to train on or to hold out.
    """
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    sides: dict[bytes, bool] = {}  # a copy of a document is on the document's side
    for name, text in sorted(documents(part).items()):
        side = sides.setdefault(text, zlib.crc32(name.encode()) % 10 == 0)
        texts[side].append(text + SEPARATOR)
    train, held_out = (np.frombuffer(b"".join(texts[side]), np.uint8) for side in (False, True))
    for what, text in (("training", train), ("held-out", held_out)):
        if len(text) <= length:
            raise DataError(f"pystdlib/{part} has {len(text)} {what} tokens, too few for one window of {length}")
    return DataSet(
        name=f"pystdlib/{part}",
        task="next_token",
        train=windows(train, length),
        held_out=windows(held_out, length, held_out_windows),
        fingerprint=fingerprint(train, held_out),
        facts={"vocabulary": VOCABULARY},
    )
