"""Rotary position embeddings (arXiv 2104.09864) and the ways they are stretched to longer contexts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class RotaryScaling(BaseModel):
    """How frequencies are changed for contexts beyond those of pretraining.

    `"linear"` divides all by `factor`. `"llama3"` divides those with few turns within `original` positions, keeps those
    with many, and blends between (Llama 3.1). `"yarn"` does so along a ramp over the dimensions and scales the
    rotated values (arXiv 2309.00071, section 3).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kind: Literal["linear", "llama3", "yarn"] = "linear"
    factor: PositiveFloat = 1.0
    original: PositiveInt | None = Field(default=None, description="positions of pretraining; llama3 and yarn")
    low_frequency: PositiveFloat = Field(default=1.0, description="llama3: turns below which a frequency is divided")
    high_frequency: PositiveFloat = Field(default=4.0, description="llama3: turns above which it is kept")
    beta_fast: PositiveFloat = Field(default=32.0, description="yarn: turns above which a frequency is kept")
    beta_slow: PositiveFloat = Field(default=1.0, description="yarn: turns below which it is divided")
    truncate: bool = Field(default=True, description="yarn: the ramp's ends are whole dimensions")
    attention: PositiveFloat | None = Field(default=None, description="yarn: factor of rotated values; None: its own")

    def values(self) -> float:
        """Factor of the rotated values."""
        if self.kind != "yarn":
            return 1.0
        return self.attention or (0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0)


def frequencies(head_dim: int, theta: float, scaling: RotaryScaling | None = None) -> tuple[float, ...]:
    """Radians a position of each pair of dimensions, θ^(-2i/head_dim) before scaling."""
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return tuple(plain)
    if scaling.kind == "linear":
        return tuple(f / scaling.factor for f in plain)
    original = scaling.original or 1
    if scaling.kind == "llama3":
        low, high = scaling.low_frequency, scaling.high_frequency
        kept = [min(1.0, max(0.0, (f * original / (2 * math.pi) - low) / (high - low))) for f in plain]
    else:
        place = lambda turns: head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        start, end = place(scaling.beta_fast), place(scaling.beta_slow)
        if scaling.truncate:
            start, end = math.floor(start), math.ceil(end)
        start, end = max(start, 0), min(end, head_dim - 1)
        width = max(end - start, 0.001)
        kept = [1.0 - min(1.0, max(0.0, (i - start) / width)) for i in range(head_dim // 2)]
    return tuple(f * (k + (1 - k) / scaling.factor) for f, k in zip(plain, kept, strict=True))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotary:
    """Cosines and sines at the positions of a batch, `(batch or 1, length, head_dim / 2)` in float32."""

    cos: Array
    sin: Array

    @classmethod
    def at(cls, positions: Int[Array, "batch length"], radians: Sequence[float], values: float = 1.0) -> "Rotary":
        """Tables for tokens at these positions.

        Args:
          radians: a position, of each pair of dimensions; from `frequencies`.
          values: factor of the rotated values.
        """
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(radians, jnp.float32)
        return cls(values * jnp.cos(angles), values * jnp.sin(angles))

    def __call__(self, x: Float[Array, "batch length heads head_dim"]) -> Float[Array, "batch length heads head_dim"]:
        """`x` rotated; the first half of each head is paired with the second, as in Llama's files."""
        cos, sin = self.cos[:, :, None, :], self.sin[:, :, None, :]
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)

    def where(self, condition: Bool[Array, ""], other: "Rotary") -> "Rotary":
        """These tables where `condition` holds, else `other`."""
        return jax.tree.map(lambda mine, theirs: jnp.where(condition, mine, theirs), self, other)
