"""Safetensors files of a model: which there are, what is in them, and ranged reads straight onto devices."""

import json
import math
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp
from safetensors import SafetensorError, safe_open

from vlora_jax.errors import ModelFileError

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
# Bytes read at once beside their destination. Pieces of this size come from the kernel and go back to it; those of a
# few MiB stay in the allocator, up to half of the model.
IN_FLIGHT = CHUNK = 64 << 20
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `dtype` as safetensors writes it, `"BF16"`."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES.get(self.dtype, 1)


@dataclass(frozen=True)
class Store:
    """The tensors of a directory by name."""

    directory: Path
    entries: dict[str, Entry]

    @classmethod
    def open(cls, directory: Path) -> "Store":
        """Read the index, if there is one, and the headers. No values.

        Raises:
          ModelFileError: no safetensors, a damaged header or index, an index that names files elsewhere, or tensors
            that are not where the index says.
        """
        if (directory / SINGLE).exists():
            return cls(directory, header(directory / SINGLE))
        if not (directory / INDEX).exists():
            raise ModelFileError(absent(directory))
        places = weight_map(directory / INDEX)
        entries: dict[str, Entry] = {}
        for name in sorted(set(places.values())):
            if not (directory / name).exists():
                raise ModelFileError(f"{directory}: {INDEX} names {name}, which is missing; fetch it again")
            entries |= {key: entry for key, entry in header(directory / name).items() if key not in entries}
        wrong = [key for key, file in places.items() if key not in entries or entries[key].file != file]
        wrong += [key for key in entries if key not in places]
        if wrong:
            raise ModelFileError(
                f"{directory}: {INDEX} and its files disagree on {len(wrong)} tensors {wrong[:3]}; fetch them again"
            )
        return cls(directory, entries)

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Tensors, cast and placed as asked; each process reads only what its devices hold."""
        context = ocp.Context()
        context.checkpoint_layout = "safetensors"  # type: ignore[assignment]
        context.memory.read_concurrent_bytes = IN_FLIGHT
        context.safetensors.read_chunk_bytes = CHUNK
        with self._folder({self.entries[name].file for name in wanted}) as folder, context:
            return ocp.load(str(folder), dict(wanted))

    @contextmanager
    def _folder(self, files: set[str]) -> Any:
        """A directory with nothing but these files: Orbax reads all that it finds."""
        with tempfile.TemporaryDirectory() as temporary:
            for name in files:
                (Path(temporary) / name).symlink_to((self.directory / name).resolve())
            yield Path(temporary)


def header(path: Path) -> dict[str, Entry]:
    """What a safetensors file says it holds, checked against its size.

    Raises:
      ModelFileError: it is no safetensors file, or is cut off.
    """
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            return {name: Entry(path.name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise ModelFileError(
            f"{path} is no whole safetensors file ({size:,} bytes; {str(error)[:120]}); fetch it again"
        ) from None


def weight_map(path: Path) -> dict[str, str]:
    """Tensor to file, from an index.

    Raises:
      ModelFileError: it is damaged, or names a file that is not beside it.
    """
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise ModelFileError(f"{path} has no weight_map from tensors to files; fetch it again")
    for tensor, file in places.items():
        if Path(file).name != file or "\\" in file or "\0" in file or not file.endswith(".safetensors"):
            way = "a pickle, never opened" if file.endswith(PICKLES) else "not a safetensors file beside it"
            raise ModelFileError(f"{path} puts {tensor} into {file!r}, which is {way}; refused")
    return places


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ModelFileError: it is missing, or no JSON object; the place of the fault is named.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(f"{path} is missing; a model needs its {path.name}") from None
    except json.JSONDecodeError as error:
        raise ModelFileError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{path} must be a JSON object, not {type(value).__name__}")
    return value


def absent(directory: Path) -> str:
    """Why there are no tensors in a directory, and what to do."""
    names = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return (
            f"{directory}: {pickles[0]} is a pickle or another format that is never opened, and there is no {SINGLE}; "
            f"convert it where you trust it: AutoModel.from_pretrained(…).save_pretrained(…) writes safetensors"
        )
    if "adapter_model.safetensors" in names:
        return f"{directory} holds an adapter, not a model; load its base model and import the adapter"
    others = [name for name in names if name.endswith(".safetensors")]
    return f"{directory}: {SINGLE} and {INDEX} are missing{f'; there is {others[:3]}' if others else ''}"
