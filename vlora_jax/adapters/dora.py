"""DoRA: weight-decomposed low-rank adaptation (arXiv 2402.09353)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.method import Factors, Method
from vlora_jax.adapters.sites import Site
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """W' = m ⊙ V / ‖V‖ with V = W + s·A B: magnitude m and direction of each output's column are trained apart.

    ‖V‖ is taken over the inputs of each output (over the vocabulary for an embedding) and carries no gradient (section
    4.3). m starts as ‖W‖, so that the model is unchanged. Options are LoRA's; dropout acts on the inputs of the whole
    change W' - W, as in PEFT, which takes another product with the kernel in training.

    A step builds neither A B nor V: ‖V‖² = ‖W‖² + 2·Σ W ⊙ (s·A B) + ‖s·A B‖² needs the product Aᵀ W, r·in·out
    multiplications a layer and step, whatever the number of tokens.
    """

    name = "dora"
    paper = "2402.09353"
    formula = "W' = m ⊙ (W + s·A B) / ‖W + s·A B‖"
    trains = "r·(in + out) + out"
    vertical = False
    adds_up = False
    verified = "PEFT"
    peft = "LORA"
    reads_base = True
    reads_output = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start not in ("zero_b", "gaussian"):
            raise ConfigError(f"dora: start is {self.start!r}; it must be zero_b or gaussian, where A B is zero")
        if self.bias:
            raise ConfigError("dora: bias is true; only lora has a bias of B")

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        factors = super().init_site(key, site, kernel)
        zero = jnp.zeros_like(factors.trainable["b"])
        return Factors(factors.trainable | {"m": self.norm(kernel, {"a": factors.trainable["a"], "b": zero})})

    def norm(self, kernel: Array | None, factors: FactorDict) -> Float[Array, " out"]:
        """‖W + s·A B‖ of each column in float32, without gradient."""
        if kernel is None:
            raise ConfigError("dora: the start needs the base's values")
        a, b = jax.lax.stop_gradient(self.pair(factors))
        w = jax.lax.stop_gradient(kernel).astype(jnp.float32)
        square = (w * w).sum(0) + 2 * ((a.T @ w) * b).sum(0) + (b * ((a.T @ a) @ b)).sum(0)
        return jnp.sqrt(jnp.maximum(square, 0))

    def ratio(self, kernel: Array, factors: FactorDict) -> Float[Array, " out"]:
        """M / ‖V‖; 1 in a layer that is not adapted."""
        norm = self.norm(kernel, factors)
        ratio = factors["m"] / jnp.where(norm > 0, norm, 1)
        return jnp.where((factors["gain"] != 0).any(), ratio, 1) if "gain" in factors else ratio

    def up(self, xa: Float[Array, "tokens r"], x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        ratio = self.ratio(kernel, factors)
        low = super().up(xa, x, y, kernel, factors)
        return (ratio - 1).astype(y.dtype) * y + ratio.astype(y.dtype) * low

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        ratio = self.ratio(kernel, factors)
        return (ratio - 1) * kernel + ratio * super().delta(kernel, factors)

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> None:
        return None

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        return Method.sum_factors(self, factors, weights)
