"""LoHa: a Hadamard product of two low-rank products (FedPara, arXiv 2108.06098; LyCORIS, 2309.14859)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.kept import times_built
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.ranked import Ranked, uniform
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.view import Lookup, thin


@dataclass(frozen=True, kw_only=True)
class LoHa(Ranked):
    """ΔW = s·(A₁ B₁) ⊙ (A₂ B₂) with s = alpha / rank: as many numbers as LoRA of rank 2r, a change of rank up to r².

    A₁, A₂ `(in, r)`, B₁, B₂ `(r, out)`. As in PEFT, A₁ starts uniform in ±1/√in, B₁ and B₂ in ±1/√r, and A₂ as zero,
    so that the model is unchanged. PEFT has it on linear layers and convolutions;
    embeddings are ours.

    ΔW is also a thin product with r² inner places: left the products of a column of A₁ with one of A₂, right those of a
    row of B₁ with one of B₂ (hence proposition 1 of arXiv 2108.06098, rank at most r²). A forward pass costs
    2·r²·(in + out) FLOPs a token in that form; where r²·(in + out) is not below in·out (from r = 20 on for 768 × 768),
    it builds ΔW for 4·r·in·out a call and multiplies by it for 2·in·out a token.

    Attributes:
      alpha: numerator of the scale s.
      alpha_pattern: other values for the sites that a pattern matches.
    """

    name = "loha"
    decays = frozenset({"a1", "b1", "a2", "b2"})
    paper = "2108.06098"
    formula = "ΔW = s·(A₁ B₁) ⊙ (A₂ B₂)"
    trains = "2·r·(in + out)"
    verified = "PEFT"
    peft = "LOHA"
    default_rate = 5e-3

    alpha: float = 8.0
    alpha_pattern: Any = ()

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        key_a1, key_b1, key_b2 = jax.random.split(key, 3)
        down, up = (site.in_dim, self.rank), (self.rank, site.out_dim)
        return Factors(
            {
                "a1": uniform(key_a1, down, site.in_dim),
                "b1": uniform(key_b1, up, self.rank),
                "a2": jnp.zeros(down),
                "b2": uniform(key_b2, up, self.rank),
            }
        )

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        if isinstance(x, Lookup):
            first, second = (thin(x, factors[f"a{i}"]) @ factors[f"b{i}"].astype(y.dtype) for i in "12")
            return self.scale * first * second
        pair = self.low_rank(kernel.shape, factors)
        if pair is None:
            return times_built(self.delta, x, kernel, factors)
        return thin(x, pair[0]) @ pair[1].astype(x.dtype)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        return self.scale * (factors["a1"] @ factors["b1"]) * (factors["a2"] @ factors["b2"])

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array] | None:
        if not self.is_thin(*shape):
            return None
        left = factors["a1"][:, :, None] * factors["a2"][:, None, :]
        right = factors["b1"][:, None, :] * factors["b2"][None, :, :]
        return left.reshape(shape[0], -1), self.scale * right.reshape(-1, shape[1])

    def is_thin(self, in_dim: int, out_dim: int) -> bool:
        """Whether two products with r² columns and rows between them cost less than one with ΔW."""
        return self.rank**2 * (in_dim + out_dim) < in_dim * out_dim

    def flops(self, site: Site) -> tuple[float, float]:
        return 2.0 * self.rank**2 * (site.in_dim + site.out_dim), 4.0 * self.rank * site.in_dim * site.out_dim
