"""Pictures with classes, from files' bytes, arrays or PIL images, scaled as the model was trained."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlora_jax.data.dataset import Example
from vlora_jax.data.table import Table
from vlora_jax.errors import DataError


@dataclass(frozen=True)
class Scaling:
    """How pixels of 0 … 255 become numbers, per channel: (pixel · factor - mean) / deviation."""

    mean: tuple[float, ...] = (0.5,)
    deviation: tuple[float, ...] = (0.5,)
    factor: float = 1 / 255
    resample: int = 2  # PIL's number of bilinear

    @classmethod
    def of(cls, source: str | None) -> "Scaling":
        """That of a model directory's `preprocessor_config.json`; to -1 … 1 without one.

        Raises:
          DataError: the file is damaged.
        """
        path = Path(source) / "preprocessor_config.json" if source is not None else None
        if path is None or not path.exists():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            mean, deviation = ([float(x) for x in found.get(key, [0.5])] for key in ("image_mean", "image_std"))
            factor = float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0
            if not found.get("do_normalize", True):
                mean, deviation = [0.0], [1.0]
            return cls(tuple(mean), tuple(deviation), factor, int(found.get("resample", 2)))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged: {error}") from None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        scaled = (pixels.astype(np.float32) * self.factor - np.array(self.mean, np.float32)) / np.array(
            self.deviation, np.float32
        )
        return scaled.astype(np.float32)


@dataclass(frozen=True)
class Pictures:
    """`image` `(size, size, channels)` and `label`; a picture is decoded when it is asked for."""

    table: Table
    values: Sequence[Any]
    labels: np.ndarray
    size: int
    channels: int
    scaling: Scaling

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        where = self.table.where(index)
        picture = opened(self.values[int(self.table.rows[index])], where)
        try:
            picture = picture.convert("L" if self.channels == 1 else "RGB")
            picture = picture.resize((self.size, self.size), self.scaling.resample)
        except (OSError, ValueError, SyntaxError) as error:  # of a file that ends too early
            raise DataError(f"{where}: the image cannot be decoded: {error}") from None
        pixels = np.asarray(picture).reshape(self.size, self.size, self.channels)
        return {"image": self.scaling(pixels), "label": self.labels[index], "id": np.int32(index)}


def opened(value: Any, where: str) -> Any:
    """A cell as a PIL image whose pixels may not be read yet.

    Args:
      value: a PIL image, a file's bytes, `{"bytes": …, "path": …}`, a path, or pixels 0 … 255 as array or lists.

    Raises:
      DataError: it is none of these.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    try:
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value))
        if isinstance(value, str):
            return Image.open(value)
        pixels = np.asarray(value)
        if pixels.dtype.kind in "iu" and pixels.ndim in (2, 3) and pixels.min() >= 0 and pixels.max() <= 255:
            pixels = pixels.astype(np.uint8)
            return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels)
    except (OSError, UnidentifiedImageError, ValueError, TypeError) as error:
        raise DataError(f"{where}: no image: {str(error)[:120]}") from None
    raise DataError(f"{where}: {type(value).__name__} is no image (PIL, a file's bytes or path, pixels from 0 to 255)")


def contents(value: Any, where: str) -> bytes:
    """What a picture is told from others by."""
    picture = opened(value, where)
    if isinstance(value, dict) and value.get("bytes"):
        return value["bytes"]
    return value if isinstance(value, bytes) else picture.tobytes()
