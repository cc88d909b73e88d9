"""A trained diagonal on the kernel, the per-layer term of ResidualTransformer (arXiv 2310.02489)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.method import Factors, SiteMethod
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.view import Lookup


@dataclass(frozen=True, kw_only=True)
class Diagonal(SiteMethod):
    """ΔW = diag(d), starting at zero; of a kernel that is not square, the main diagonal of min(in, out) entries.

    The paper has square kernels only; the rectangular form is ours.
    """

    name = "diagonal"
    paper = "2310.02489"
    formula = "ΔW = diag(d)"
    trains = "min(in, out)"
    adds_up = True
    verified = "NumPy"
    default_rate = 3e-2

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        return Factors({"d": jnp.zeros(min(site.in_dim, site.out_dim))})

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        d = factors["d"]
        if isinstance(x, Lookup):  # an embedding lookup: rows of diag(d)
            return x @ self.delta(kernel, factors).astype(y.dtype)
        change = x[:, : d.size] * d.astype(x.dtype)
        return jnp.pad(change, ((0, 0), (0, y.shape[-1] - d.size)))

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        return jnp.eye(kernel.shape[-2], kernel.shape[-1]) * jnp.pad(
            factors["d"], (0, kernel.shape[-1] - factors["d"].size)
        )

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        return {"d": weights @ factors["d"]}
