"""What one training example looks like, from the config alone: for planning without data."""

from typing import Any

import numpy as np

from vlora_jax.data.config import DatasetConfig
from vlora_jax.errors import ConfigError

Shapes = dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype by name


def example_shapes(config: DatasetConfig, model: Any) -> tuple[str, Shapes]:
    """The task of a set and the arrays of one example, as `text.load` would give them.

    Args:
      model: the config of the model that will read it.

    Raises:
      ConfigError: a row's length is left to the data.
    """
    if config.format == "images":
        return "classification", {"image": ((model.image, model.image, model.channels), np.float32), **_labelled()}
    rows = lambda length, *names: dict.fromkeys(names, ((length,), np.int32))
    length = _length(config, "length")
    if config.format == "classification":
        typed = ("types",) if getattr(model, "token_types", 0) > 1 else ()
        return "text_classification", rows(length, "tokens", "segments", *typed) | _labelled()
    if getattr(model, "family", None) == "seq2seq":
        answer = _length(config, "target_length")
        decoder = rows(answer, "decoder_tokens", "decoder_segments", "targets") | {"mask": ((answer,), np.bool_)}
        return "seq2seq", rows(length, "tokens", "segments") | decoder | {"id": ((), np.int32)}
    packed = ("positions", "segments") if config.packing else ()
    learnt = rows(length, "tokens", "targets", *packed) | {"mask": ((length,), np.bool_)}
    return "next_token", learnt | {"id": ((), np.int32)}


def _labelled() -> Shapes:
    return {"label": ((), np.int32), "id": ((), np.int32)}


def _length(config: DatasetConfig, key: str) -> int:
    length = getattr(config, key)
    if length is None:
        raise ConfigError(f"data.{key} is null, which leaves it to the data; a plan needs it: data.{key}=1024")
    return length
