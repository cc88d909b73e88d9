"""PiSSA: principal singular values and vectors adaptation (arXiv 2404.02948)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.kernel_start import KernelStart
from vlora_jax.adapters.options import check_least
from vlora_jax.adapters.svd import leading, principal


@dataclass(frozen=True, kw_only=True)
class PiSSA(KernelStart):
    """ΔW = s·(A B - A₀ B₀) with s·A₀ B₀ = P_r diag(σ_r) Q_rᵀ, the best approximation of W of rank r.

    A₀ = P_r diag(√(σ_r / s)), B₀ = diag(√(σ_r / s)) Q_rᵀ.

    Attributes:
      niter: 0 for the exact SVD; else the iterations of a randomised one (PEFT's `pissa_niter_16`), which is made of
        products with r + 10 columns. A₀ and B₀ then depend on the draw.
    """

    name = "pissa"
    paper = "2404.02948"
    formula = "ΔW = s·(A B - A₀ B₀), s·A₀ B₀ = [W]_r"

    niter: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("pissa: niter", self.niter, 0)

    def part(self, key: PRNGKeyArray, kernel: Float[Array, "in out"]) -> tuple[Array, Array]:
        return balanced(*leading(key, kernel, self.rank, self.niter))

    def rescaled(self, a: Array, b: Array, gain: Float[Array, "*stack r"]) -> tuple[Array, Array]:
        root = jnp.sqrt(jnp.where(gain > 0, gain, 1))
        return a / root[..., None, :], b / root[..., :, None]


def pissa_start(kernel: Any, rank: int) -> tuple[Any, Any]:
    """A₀ `(in, r)` and B₀ `(r, out)` of a kernel `(in, out)` for s = 1; NumPy's or JAX's."""
    return balanced(*principal(kernel, rank))


def balanced(p: Any, sigma: Any, q: Any) -> tuple[Any, Any]:
    """P diag(√σ) and diag(√σ) Qᵀ."""
    return p * sigma**0.5, sigma[:, None] ** 0.5 * q
