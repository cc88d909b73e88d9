"""LoRA-XS: a small matrix between frozen singular vectors (arXiv 2405.17604)."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.options import check_least
from vlora_jax.adapters.svd import Principal


@dataclass(frozen=True, kw_only=True)
class LoRAXS(Principal):
    """ΔW = alpha / r · A R B with A = P_r diag(σ_r) and B = Q_rᵀ frozen, W = P diag(σ) Qᵀ; only R `(r, r)` trains.

    R starts normal with a small deviation, not zero: the model changes slightly at once. The authors' code takes
    a randomised SVD with niter = 10.

    Attributes:
      deviation: of R's start.
    """

    name = "lora_xs"
    paper = "2405.17604"
    formula = "ΔW = alpha / r · P_r diag(σ_r) R Q_rᵀ"
    trains = "r²"
    default_rate = 1e-2
    aside = Principal.aside | {"deviation"}

    alpha: float = 16.0
    deviation: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("lora_xs: deviation", self.deviation, 0)

    def start(
        self, key: PRNGKeyArray, p: Float[Array, "in r"], sigma: Float[Array, " r"], q: Float[Array, "r out"]
    ) -> Factors:
        r = self.deviation * jax.random.normal(key, (self.rank, self.rank))
        return Factors({"r": r}, {"a": p * sigma, "b": q})

    def right(self, factors: FactorDict) -> Float[Array, "r out"]:
        return self.alpha / self.rank * factors["r"] @ factors["b"]
