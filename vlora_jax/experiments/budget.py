"""A method's size for a budget of numbers: counted from shapes, nothing is trained or drawn."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from vlora_jax.adapters.adapter import count
from vlora_jax.adapters.init import adapter_shapes
from vlora_jax.adapters.method import Method
from vlora_jax.errors import ConfigError
from vlora_jax.models.build import ModelConfig, abstract_model
from vlora_jax.training.config import RunConfig
from vlora_jax.training.job import model_config_of

LARGEST = 2**16  # of any size that is tried


def fitted(config: RunConfig, numbers: int) -> RunConfig:
    """A run whose adapter trains at most so many numbers beside what it trains whole, at the largest size that does.

    Its other options stay, alpha as well.

    Raises:
      ConfigError: the run trains its model, the method has no size, or its smallest trains more.
    """
    if config.adapter is None:
        raise ConfigError(f"a budget of {numbers:,} numbers is for adapters; this trains the whole model")
    model: Any = model_config_of(config)  # frozen: pydantic makes it hashable
    method = fitted_method(config.adapter, config.steps, model, numbers)
    return config.model_copy(update={"adapter": method})


@functools.lru_cache(maxsize=256)
def fitted_method(method: Method, steps: int, model: ModelConfig, numbers: int) -> Method:
    """`fitted` of a method on a model."""
    if method.size not in {each.name for each in dataclasses.fields(method)}:
        raise ConfigError(f"{method.name} has no option that sets how many numbers it trains; leave it out of a budget")
    tried: dict[int, int] = {}
    refused: list[ConfigError] = []

    def trained(size: int) -> int | None:
        """How many numbers train at a size; None if the method refuses it."""
        try:
            tried[size] = trained_numbers(dataclasses.replace(method, **{method.size: size}).for_run(steps), model)
        except ConfigError as error:
            refused.append(error)
        return tried.get(size)

    size = largest(trained, numbers)
    if size is None:
        least = min(tried, default=None)
        why = str(refused[0]) if least is None else f"at {method.size} {least} it trains {tried[least]:,}"
        raise ConfigError(f"{method.name} does not fit {numbers:,} numbers: {why}")
    return dataclasses.replace(method, **{method.size: size})


def trained_numbers(method: Method, model: ModelConfig) -> int:
    """What a method trains on a model, beside what it trains whole."""
    trainable = adapter_shapes(method, abstract_model(model)[1]).trainable
    return count(trainable) - count(trainable["full"])


def largest(trained: Callable[[int], int | None], numbers: int) -> int | None:
    """The largest size that trains at most so many numbers; None if there is none.

    More is trained at a larger size. A method may refuse small sizes as well as large ones, but takes a power of two.

    >>> largest(lambda size: 10 * size if 5 <= size <= 8 else None, 75)
    7
    """
    best, low, size = None, 0, 1
    while size <= LARGEST:
        found = trained(size)
        if (found or 0) > numbers or (found is None and best is not None):  # too much, or above what is possible
            break
        best = best if found is None else size
        low, size = size, 2 * size
    while size - low > 1:
        middle = (low + size) // 2
        found = trained(middle)
        fits = found is not None and found <= numbers
        below = found is None and best is None  # what is refused is too small, until something fits
        best = middle if fits else best
        low, size = (middle, size) if fits or below else (low, middle)
    return best
