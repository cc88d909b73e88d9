"""Every method by name. A new method is one file and one line here."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from vlora_jax.adapters.diagonal import Diagonal
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.method import Method
from vlora_jax.errors import ConfigError

METHODS: dict[str, type[Method]] = {method.name: method for method in (LoRA, Diagonal)}


def from_config(config: Any) -> Method:
    """A method from plain values, `{"method": "lora", "rank": 8}`; the inverse of `Method.config`.

    Raises:
      ConfigError: no mapping, or an unknown method or option; the nearest name is given.

    >>> from_config({"method": "lora", "rank": 4}).rank
    4
    """
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise ConfigError(f"a method is written {{method: lora, rank: 8}}, not {config!r}")
    options = dict(config)
    name = str(options.pop("method", "lora"))
    if name not in METHODS:
        hint = difflib.get_close_matches(name, METHODS, 1, 0)[0]
        raise ConfigError(f"unknown method {name!r}; nearest: {hint!r}")
    fields = [each.name for each in dataclasses.fields(METHODS[name])]
    for option in options:
        if option not in fields:
            hint = difflib.get_close_matches(option, fields, 1, 0)[0]
            raise ConfigError(f"{name} has no option {option!r}; nearest: {hint!r}")
    return METHODS[name](**options)
