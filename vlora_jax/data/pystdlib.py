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
    """Consecutive windows of `length` tokens of a text, each with the tokens one further as targets."""

    text: np.ndarray
    length: int

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> Example:
        window = self.text[index * self.length : (index + 1) * self.length + 1].astype(np.int32)
        mask = np.ones(self.length, bool)
        return {"tokens": window[:-1], "targets": window[1:], "mask": mask, "id": np.int32(index)}


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
    """
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    for name, text in sorted(documents(part).items()):
        texts[zlib.crc32(name.encode()) % 10 == 0].append(text + SEPARATOR)
    train, held_out = (np.frombuffer(b"".join(texts[side]), np.uint8) for side in (False, True))
    windows = Windows(held_out, length)
    if len(windows) > held_out_windows:
        starts = np.linspace(0, len(windows) - 1, held_out_windows).astype(int) * length
        held_out = np.concatenate([held_out[start : start + length] for start in starts] + [held_out[-1:]])
        windows = Windows(held_out, length)
    return DataSet(
        name=f"pystdlib/{part}",
        task="next_token",
        train=Windows(train, length),
        held_out=windows,
        fingerprint=fingerprint(train, held_out),
        facts={"vocabulary": VOCABULARY},
    )
