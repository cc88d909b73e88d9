"""The files of a PEFT adapter: JSON and safetensors, read with every check that the formats allow, and written."""

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vlora_jax.errors import AdapterFileError

Tensors = dict[str, np.ndarray]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
INTEGERS = {"U8": np.dtype(np.uint8), **{f"I{bits}": np.dtype(f"int{bits}") for bits in (16, 32, 64)}}
DTYPES = FLOATS | INTEGERS
HEADER_CAP = 100_000_000  # bytes, the format's own


def find(directory: Path) -> tuple[Path, Path]:
    """The config and the tensors of an adapter directory.

    Raises:
      AdapterFileError: one of them is missing, or the tensors are a pickle.
    """
    config, tensors = directory / CONFIG, directory / TENSORS
    if not config.is_file():
        inside = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
        hint = f"; adapters in it: {', '.join(inside)}" if inside else ""
        raise AdapterFileError(f"{config} does not exist{hint}")
    if not tensors.is_file():
        pickles = [name for name in PICKLES if (directory / name).exists()]
        why = f"; {pickles[0]} is a pickle and is never opened, convert it elsewhere" if pickles else ""
        raise AdapterFileError(f"{tensors} does not exist{why}")
    return config, tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      AdapterFileError: it is no JSON (line and column are given), no object, or has a key twice.
    """
    try:
        value = json.loads(path.read_bytes().decode(), object_pairs_hook=lambda pairs: unique(pairs, path))
    except json.JSONDecodeError as error:
        raise AdapterFileError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise AdapterFileError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not isinstance(value, dict):
        raise AdapterFileError(f"{path} must hold an object, not {type(value).__name__}")
    return value


def unique(pairs: list[tuple[str, Any]], path: Path) -> dict[str, Any]:
    """The pairs of a JSON object, each key once."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise AdapterFileError(f"{path} has the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return table


def read_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """Every tensor of a safetensors file by name, and the file's metadata.

    Raises:
      AdapterFileError: it is cut off or damaged, or a tensor has a dtype that no adapter has, or values that are not
        finite.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > HEADER_CAP or 8 + length > size:
            raise AdapterFileError(
                f"{path} is no whole safetensors file: {size} bytes, its header would have {length} "
                f"(2 to {HEADER_CAP} are possible)"
            )
        text, data = file.read(length), file.read()
    try:
        header = json.loads(text.decode(), object_pairs_hook=lambda pairs: unique(pairs, path))
        metadata = header.pop("__metadata__", None) or {}
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, AdapterFileError):
            raise
        raise AdapterFileError(f"{path}: its header is damaged: {error!r}") from None
    end, tensors = 0, {}
    for name, (dtype, shape, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        tensors[name] = _tensor(path, name, dtype, shape, data[first:last] if first == end else b"", last - first)
        end = last
    if end != len(data):
        raise AdapterFileError(f"{path} has {len(data)} bytes of values, its header says {end}")
    if "sha256" in metadata and metadata["sha256"] != digest(tensors):
        raise AdapterFileError(
            f"{path}: its tensors are not those that were written, the sha256 in its header differs: copy or export it "
            "again; if it was changed on purpose, save it without sha256 in its metadata"
        )
    return tensors, metadata


def _tensor(path: Path, name: str, dtype: str, shape: tuple, data: bytes, size: int) -> np.ndarray:
    if "\0" in name or not name:
        raise AdapterFileError(f"{path}: the name {name!r} is empty or has a null byte")
    if dtype not in DTYPES:
        raise AdapterFileError(f"{path}: {name} is {dtype}; {', '.join(DTYPES)} are possible")
    if not all(isinstance(side, int) and side >= 0 for side in shape):
        raise AdapterFileError(f"{path}: {name} has the shape {list(shape)}")
    if math.prod(shape) * DTYPES[dtype].itemsize != size or len(data) != size:
        raise AdapterFileError(
            f"{path}: {name} needs {math.prod(shape) * DTYPES[dtype].itemsize} bytes, the file has {len(data)} of them"
        )
    array = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
    if dtype in FLOATS and not np.isfinite(array.astype(np.float32)).all():
        raise AdapterFileError(f"{path}: {name} has values that are not finite")
    return array


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, dtypes, shapes and values, in the order of names."""
    total = hashlib.sha256()
    for name, array in sorted(tensors.items()):
        total.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A safetensors file, byte for byte the same for the same arguments."""
    header: dict[str, Any] = {"__metadata__": dict(sorted({**metadata, "sha256": digest(tensors)}.items()))}
    end = 0
    for name, array in sorted(tensors.items()):
        offsets = [end, end := end + array.nbytes]
        header[name] = {"dtype": code_of(array), "shape": list(array.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in sorted(tensors.items()):
            file.write(np.ascontiguousarray(array).tobytes())


def code_of(array: np.ndarray) -> str:
    """The name of an array's dtype in files."""
    return next(code for code, dtype in DTYPES.items() if dtype == array.dtype)
