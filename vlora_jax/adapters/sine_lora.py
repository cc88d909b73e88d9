"""Sine-activated low-rank adaptation (arXiv 2403.19243)."""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.kept import times_built
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.ranked import Ranked, uniform
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SineLoRA(Ranked):
    """ΔW = alpha / r · sin(ω A B) / √in, the sine of each entry: as few numbers as LoRA, but a change of high rank.

    A `(in, r)` is uniform in ±1/√in, B `(r, out)` zero, so that the model is unchanged at the start; a step there is
    ω / √in times LoRA's. ΔW is built in every forward and again in the backward pass, which costs r·in·out
    multiplications and in·out sines a layer; on an embedding only the rows that are looked up.

    Attributes:
      frequency: ω. The paper's for language models is not known to us (unverified); the larger, the higher the rank.
    """

    name = "sine_lora"
    decays = frozenset({"a", "b"})
    paper = "2403.19243"
    formula = "ΔW = alpha / r · sin(ω A B) / √in"
    trains = "r·(in + out)"
    verified = "NumPy"
    cost = "builds ΔW, with a sine for each entry, forward and backward"
    default_rate = 3e-4

    alpha: float = 16.0
    frequency: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frequency <= 0:
            raise ConfigError(
                f"sine_lora: frequency is {self.frequency}; it must be positive, as sin(0) trains nothing"
            )

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        a = uniform(key, (site.in_dim, self.rank), site.in_dim)
        return Factors({"a": a, "b": jnp.zeros((self.rank, site.out_dim))})

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        if isinstance(x, Lookup):
            return self.wave(x @ factors["a"], factors).astype(y.dtype)
        return times_built(self.delta, x, kernel, factors)

    def wave(self, rows: Float[Array, "rows r"], factors: FactorDict) -> Float[Array, "rows out"]:
        """Rows of ΔW from rows of A."""
        scale = self.alpha / self.rank / math.sqrt(factors["a"].shape[0])
        return scale * jnp.sin(self.frequency * (rows @ factors["b"]))

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        return self.wave(factors["a"], factors)

    def flops(self, site: Site) -> tuple[float, float]:
        kernel = site.in_dim * site.out_dim
        return 2.0 * kernel, 2.0 * self.rank * kernel
