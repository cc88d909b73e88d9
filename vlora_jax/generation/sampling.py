"""The next token from scores."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from vlora_jax.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the most likely one unless `temperature` is positive.

    Attributes:
      temperature: scores are divided by it; 0 is greedy.
      top_k: only so many tokens with the highest scores.
      top_p: only the fewest likeliest tokens whose probabilities add up to this (arXiv 1904.09751).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError("top_k and top_p choose what is sampled from; give a temperature above 0 with them")


def allowed(scores: Float[Array, "batch vocabulary"], sampling: Sampling) -> Float[Array, "batch vocabulary"]:
    """Scores at the temperature, those that are not to be drawn at -inf: temperature first, then top_k, then top_p."""
    scores = scores / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        lowest = jax.lax.top_k(scores, sampling.top_k)[0][:, -1:]
        scores = jnp.where(scores < lowest, -jnp.inf, scores)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered = jnp.sort(scores, axis=-1, descending=True)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares  # the likeliest token has nothing before it, so one always stays
        lowest = jnp.where(before < sampling.top_p, ordered, jnp.inf).min(axis=-1, keepdims=True)
        scores = jnp.where(scores < lowest, -jnp.inf, scores)
    return scores


def next_tokens(
    scores: Float[Array, "batch vocabulary"], sampling: Sampling, keys: Key[Array, "batch"]
) -> Int[Array, "batch"]:
    """One token a row.

    Args:
      keys: one a row, `(batch,)`.
    """
    if sampling.temperature == 0:
        return scores.argmax(axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, allowed(scores, sampling)).astype(jnp.int32)
