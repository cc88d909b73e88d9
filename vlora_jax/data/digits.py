"""1,797 handwritten digits of 8 × 8 pixels, as they ship with scikit-learn (UCI, E. Alpaydin and C. Kaynak)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlora_jax.data.columns import few_shot
from vlora_jax.data.dataset import DataSet, Example, fingerprint

HELD_OUT = 360
SPLIT_KEY = 2406_09315  # fixed, so that every run is judged on the same images


@dataclass(frozen=True)
class Images:
    """Images `(n, height, width, channels)` with labels, by index."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index], "id": np.int32(index)}


def shift(example: Example, rng: np.random.Generator) -> Example:
    """Move the image by up to one pixel in each direction; what leaves comes back as background."""
    down, right = rng.integers(-1, 2, size=2)
    padded = np.pad(example["image"], ((1, 1), (1, 1), (0, 0)), constant_values=example["image"].min())
    height, width, _ = example["image"].shape
    return example | {"image": padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]}


def load(augment: bool = True, turns: int = 0, shots: int | None = None, shots_seed: int = 0) -> DataSet:
    """The digits, 1,437 to train on and 360 held out, both with all classes in even shares.

    Pixels are scaled from 0 … 16 to -1 … 1.

    Args:
      turns: quarter turns of all images to the left: another task on the same digits.
      shots: train on so many images of each class only, drawn by `shots_seed`.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    images = np.rot90((digits.images / 8.0 - 1.0).astype(np.float32)[..., None], turns, axes=(1, 2))
    labels = digits.target.astype(np.int32)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=SPLIT_KEY
    )
    if shots is not None:
        train = train[few_shot(labels[train], [str(digit) for digit in range(10)], shots, shots_seed)]
    return DataSet(
        name="digits",
        task="classification",
        train=Images(images[train], labels[train]),
        held_out=Images(images[held_out], labels[held_out]),
        fingerprint=fingerprint(images[train], labels[train], images[held_out], labels[held_out]),
        augment=shift if augment else None,
        facts={"classes": 10, "image": 8, "channels": 1},
    )
