"""Write a model as transformers keeps it: sharded safetensors with an index, config.json, and the tokenizer's files."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import safe_open

from vlora_jax.adapters.quantized import whole
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.checkpoint import refuse_used
from vlora_jax.errors import ConfigError, ConversionError, ResourceError
from vlora_jax.hub.configs import (
    ModelConfig,
    classes_of,
    differing,
    family_of,
    labels,
    model_type_of,
    read_config,
    unnamed,
    write_config,
)
from vlora_jax.hub.files import CONFIG, FLOATS, INDEX, SINGLE, read_json
from vlora_jax.hub.names import Names, names_of
from vlora_jax.hub.plan import in_file
from vlora_jax.hub.reader import WITHOUT_EFFECT
from vlora_jax.hub.where import locate
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.seq2seq import Seq2SeqConfig

BESIDE_MODEL = """
    tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json vocab.txt vocab.json
    merges.txt spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json preprocessor_config.json
    generation_config.json
""".split()  # noqa: SIM905  a list literal would take a line a word
STORED = {dtype: name for name, dtype in FLOATS.items() if name != "F64"}  # our dtype to safetensors' name
SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Fields that the head, the classes or a kernel of the head's own change; config.json is mended, not written anew.
OF_HEAD = ("head", "classes", "pooler", "tied_head")


@dataclass(frozen=True)
class Written:
    """What `save` wrote: the files with tensors, and how many tensors and bytes are in them."""

    directory: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Piece:
    """One tensor to be written: a parameter, or one layer of it."""

    tensor: str
    path: str
    layer: int | None
    shape: tuple[int, ...]
    nbytes: int


def save(
    directory: str | os.PathLike,
    graphdef: nnx.GraphDef,
    base: Tree,
    like: str | os.PathLike | None = None,
    max_shard: str | int = "5GB",
    dtype: str | None = None,
    class_names: Sequence[str] | None = None,
) -> Written:
    """Write a model so that transformers loads it. What was written is read back and compared before it is done.

    Args:
      directory: to be made; it may exist if it is empty. It appears as a whole or not at all.
      graphdef, base: a model as `split` gives it, without adapters: `merge` them first. Of a quantised base the
        values are written.
      like: where the model was loaded from; its `config.json` is kept but for what has changed, and its tokenizer's
        files and `generation_config.json` are copied. Without it a `config.json` is written from ours.
      max_shard: the largest file, `"5GB"` or bytes.
      dtype: of the tensors, `"float32"`, `"bfloat16"` or `"float16"`; the model's if not given.
      class_names: of a classifier's classes, for `config.json`.

    Raises:
      ConversionError: transformers has no such model, it is vertical, or a value is not finite in `dtype`.
      ResourceError: the directory is not empty or cannot be written, the disk is too small, or what was read back
        differs.
    """
    directory = Path(directory)
    config = nnx.merge(graphdef, base).config
    if getattr(config, "vertical", None) is not None:
        raise ConversionError("the model is vertical, which transformers has not; vlora_jax.expand makes it dense")
    dtype = dtype or config.param_dtype
    if dtype not in STORED:
        raise ConfigError(f"dtype {dtype!r} must be one of {', '.join(map(repr, STORED))}")
    source = None if like is None else locate(like)
    about = describe(config, None if source is None else read_json(source / CONFIG), dtype)
    if class_names is not None:
        if len(class_names) != getattr(config, "classes", None):
            raise ConfigError(f"{len(class_names)} names of classes for a model of {getattr(config, 'classes', None)}")
        about |= labels(class_names)
    names = names_of(config, about["architectures"][0])
    flat = flatten(base)
    shards = plan_shards(pieces(names, flat, np.dtype(jax.numpy.dtype(dtype)).itemsize), bytes_of(max_shard))
    total = sum(piece.nbytes for shard in shards for piece in shard)
    partial = start(directory, total)
    try:
        fetch = Fetch(names, flat, dtype)
        files = [SINGLE] if len(shards) == 1 else [shard_name(i, len(shards)) for i in range(len(shards))]
        for name, shard in zip(files, shards, strict=True):
            write_shard(partial / name, shard, fetch, STORED[dtype])
            compare(partial / name, shard, fetch)
        if len(shards) > 1:
            places = {piece.tensor: name for name, shard in zip(files, shards, strict=True) for piece in shard}
            write_json(partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
        write_json(partial / CONFIG, about)
        for name in BESIDE_MODEL:
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        partial.rename(directory)  # replaces an empty directory
    except OSError as error:
        raise ResourceError(f"{directory} could not be written: {error.strerror or error}", exit_code=1) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Written(directory, tuple(files), sum(map(len, shards)), total)


def describe(config: ModelConfig, given: dict[str, Any] | None, dtype: str) -> dict[str, Any]:
    """The `config.json` of a model; `given`, the one it was loaded with, is kept but for what has changed.

    Raises:
      ConversionError: transformers has no such model.
    """
    if given is None:
        return {**write_config(config, model_type_of(config)), "dtype": dtype}
    model_type, _ = family_of(given)
    written = write_config(config, model_type)
    head, classes = getattr(config, "head", None), getattr(config, "classes", None)
    try:
        changed = [name for name in differing(config, read_config(given, head, classes)) if name not in OF_HEAD]
    except ConfigError:  # keys that were ignored when the model was loaded
        changed = [*written]
    about = dict(given)
    if changed:
        about = {key: value for key, value in given.items() if key in WITHOUT_EFFECT} | written
        again = [name for name in differing(config, read_config(about, head, classes)) if name not in OF_HEAD]
        if again:
            raise ConversionError(f"transformers' {model_type} has no way to say this model's {', '.join(again)}")
    if classes is not None and classes != classes_of(given):
        about |= labels(unnamed(classes))
    if isinstance(config, DecoderConfig | Seq2SeqConfig) and config.head == "lm":
        about |= {key: written[key] for key in ("tie_word_embeddings", "scale_decoder_outputs") if key in written}
    about.pop("torch_dtype", None)
    return about | {"architectures": written["architectures"], "dtype": dtype}


def pieces(names: Names, flat: dict[str, Any], itemsize: int) -> list[Piece]:
    """Every tensor to be written, in the order of their names, layers by number."""
    found = []
    for path, leaf in flat.items():
        layers = names.layers(path)
        shape = in_file(names, path, leaf.shape if layers is None else leaf.shape[1:])
        for layer in range(layers) if layers else (None,):
            found.append(Piece(names.tensor(path, layer), path, layer, shape, math.prod(shape) * itemsize))
    natural = lambda piece: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", piece.tensor)]
    return sorted(found, key=natural)


def plan_shards(found: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """Tensors in files of at most `limit` bytes; a larger tensor has a file of its own."""
    shards, size = [[]], 0
    for piece in found:
        if shards[-1] and size + piece.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def bytes_of(size: str | int) -> int:
    """Bytes of `"5GB"` and the like.

    >>> bytes_of("5GB"), bytes_of("1 MiB"), bytes_of(7)
    (5000000000, 1048576, 7)

    Raises:
      ConfigError: it is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)?\s*", str(size).upper())
    number = float(match[1]) * SIZES.get(match[2] or "B", 0) if match else 0
    if number < 1:
        raise ConfigError(f"max_shard {size!r} is no size like '5GB', '500MB' or 1000000")
    return int(number)


def shard_name(index: int, count: int) -> str:
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def start(directory: Path, total: int) -> Path:
    """A new directory beside the one that is to appear.

    Raises:
      ResourceError: that one is not empty, or there is no room.
    """
    refuse_used(directory)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise ResourceError(f"{directory} cannot be made: {error.strerror or error}") from None
    free = shutil.disk_usage(partial).free
    if free < 1.01 * total:
        partial.rmdir()
        raise ResourceError(f"{directory} needs {total / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    return partial


class Fetch:
    """Brings one tensor at a time to the host, as files have it."""

    def __init__(self, names: Names, flat: dict[str, Any], dtype: str):
        self._names, self._flat, self._dtype = names, flat, dtype
        self._turn: dict[str, Callable] = {}

    def __call__(self, piece: Piece) -> np.ndarray:
        """
        Raises:
          ConversionError: a value is not finite.
        """
        if piece.path not in self._turn:  # one program for all layers
            self._turn[piece.path] = jax.jit(lambda leaf, layer: self._as_stored(piece.path, leaf, layer))
        # NumPy writes a transposed view in its old order without saying so.
        array = np.ascontiguousarray(self._turn[piece.path](self._flat[piece.path], piece.layer))
        if not np.isfinite(array).all():
            raise ConversionError(f"{piece.tensor} has values that are not finite in {self._dtype}")
        return array

    def _as_stored(self, path: str, leaf: Any, layer: Any) -> Any:
        cut = lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False)
        one = whole(leaf if layer is None else jax.tree.map(cut, leaf))
        return self._names.to_file(path, one).astype(self._dtype)


def write_shard(path: Path, shard: Sequence[Piece], fetch: Fetch, dtype: str) -> None:
    """A safetensors file, written tensor by tensor: the header's length, the header in JSON, the values."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in shard:
        header[piece.tensor] = {"dtype": dtype, "shape": piece.shape, "data_offsets": (end, end + piece.nbytes)}
        end += piece.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in shard:
            file.write(fetch(piece).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def compare(path: Path, shard: Sequence[Piece], fetch: Fetch) -> None:
    """Raises ResourceError unless a file, read by safetensors, holds what it should."""
    with safe_open(path, "np") as file:
        if set(file.keys()) != {piece.tensor for piece in shard}:
            raise ResourceError(f"{path.name} does not hold the tensors that were written", exit_code=1)
        for piece in shard:
            if file.get_tensor(piece.tensor).tobytes() != fetch(piece).tobytes():
                raise ResourceError(f"{path.name}: {piece.tensor} was read back with other values", exit_code=1)


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
