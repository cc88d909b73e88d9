"""SVFit: the largest singular values trained (arXiv 2409.05926)."""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.svd import Principal


@dataclass(frozen=True, kw_only=True)
class SVFit(Principal):
    """W' = P diag(σ + δ) Qᵀ with W = P diag(σ) Qᵀ: ΔW = P_r diag(δ) Q_rᵀ; only δ `(r,)` trains, from zero.

    The paper trains the r largest σ themselves; their change δ is the same function, and exact at the start (our
    reading). There is no public code: default rank and rate are ours. With r = min(in, out) all of W's singular values
    train.
    """

    name = "svfit"
    paper = "2409.05926"
    formula = "ΔW = P_r diag(δ) Q_rᵀ"
    trains = "r"
    default_rate = 1e-1

    def start(
        self, key: PRNGKeyArray, p: Float[Array, "in r"], sigma: Float[Array, " r"], q: Float[Array, "r out"]
    ) -> Factors:
        return Factors({"delta": jnp.zeros_like(sigma)}, {"a": p, "b": q})

    def right(self, factors: FactorDict) -> Float[Array, "r out"]:
        return factors["delta"][:, None] * factors["b"]
