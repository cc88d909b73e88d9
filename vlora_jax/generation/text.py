"""Prompts and answers as text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vlora_jax.data.chat import render
from vlora_jax.data.tokens import load_tokenizer, specials
from vlora_jax.errors import ConfigError, DataError

GENERATION_CONFIG = "generation_config.json"


@runtime_checkable
class Codec(Protocol):
    """Text as token ids and back."""

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...

    def encode(self, prompt: str, chat: bool = False, system: str | None = None) -> list[int]:
        """A prompt's tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """An answer's text."""
        ...


@dataclass(frozen=True)
class Bytes:
    """One token a byte, as the embedded text sets have it."""

    eos: tuple[int, ...] = (0,)

    def encode(self, prompt: str, chat: bool = False, system: str | None = None) -> list[int]:
        if chat or system:
            raise ConfigError("a model of bytes has no chat template; leave --chat and --system out")
        return list(prompt.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token not in self.eos).decode(errors="replace")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers.

    Attributes:
      inner: the tokenizer.
      eos: tokens that end an answer.
      whole: prompts get all special tokens that the tokenizer adds, as those of an encoder–decoder do.
    """

    inner: Any
    eos: tuple[int, ...]
    whole: bool = False

    def encode(self, prompt: str, chat: bool = False, system: str | None = None) -> list[int]:
        if chat or system:
            if not self.inner.chat_template:
                raise ConfigError("the tokenizer has no chat template; leave --chat and --system out")
            turns = [{"role": "system", "content": system}] if system else []
            turns.append({"role": "user", "content": prompt})
            text = render(self.inner, self.inner.get_chat_template(), turns, "the prompt", ask=True)
            return list(self.inner(text, add_special_tokens=False)["input_ids"])
        if self.whole:
            return list(self.inner(prompt)["input_ids"])
        return [*specials(self.inner).prefix, *self.inner(prompt, add_special_tokens=False)["input_ids"]]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.inner.decode(list(tokens), skip_special_tokens=True)


def codec_of(source: str | None, config: Any) -> Codec:
    """The codec of a model.

    Args:
      source: where its tokenizer is; None if it was not pretrained elsewhere.
      config: the model's.

    Raises:
      ConfigError: the model has no tokenizer, and its tokens are no bytes.
      DataError: the tokenizer cannot be read.
    """
    if source is None:
        if config.vocabulary != 256:
            raise ConfigError(
                f"a model of {config.vocabulary} tokens needs a tokenizer, and it has none; give --tokenizer"
            )
        return Bytes()
    inner = load_tokenizer(source)
    eos = [] if inner.eos_token_id is None else [int(inner.eos_token_id)]
    return Tokenizer(inner, tuple(dict.fromkeys([*eos, *more_ends(Path(source))])), config.family == "seq2seq")


def more_ends(directory: Path) -> list[int]:
    """Tokens that end an answer by the model's `generation_config.json`."""
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") or []
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    return [int(token) for token in (found if isinstance(found, list) else [found])]
