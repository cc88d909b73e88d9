"""HiRA: Hadamard high-rank adaptation (ICLR 2025, OpenReview TwJrTz9cRS)."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.kept import times_built
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.ranked import Ranked, uniform
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.view import Lookup, thin

Start = Literal["zero_b", "gaussian"]


@dataclass(frozen=True, kw_only=True)
class HiRA(Ranked):
    """ΔW = W ⊙ (A B): as many numbers as LoRA, a change of rank up to r·rank(W). There is no scale.

    `A (in, r)` starts uniform in ±1/√in and `B (r, out)` as zero, so that the model is unchanged; on an embedding A is
    zero and B standard normal, as in PEFT.

    A forward pass builds ΔW, at 2·r·in·out FLOPs a call and one array of the kernel's size, which the backward pass
    builds again, and multiplies by it for 2·in·out a token: the factored form Σₖ ((x ⊙ Aₖ) W) ⊙ Bₖ takes r dense
    products. An embedding needs neither, its change is y ⊙ (A[ids] B).

    Attributes:
      dropout: share of the change's inputs that is dropped in training.
      start: of A on kernels, `"zero_b"` as above or `"gaussian"`: normal with deviation 1/r.
    """

    name = "hira"
    decays = frozenset({"a", "b"})
    paper = "OpenReview TwJrTz9cRS"
    formula = "ΔW = W ⊙ (A B)"
    trains = "r·(in + out)"
    vertical = False
    verified = "PEFT"
    cost = "builds ΔW, forward and backward, and takes the slope of all its entries"
    peft = "HIRA"
    default_rate = 5e-3

    rank: int = 32
    dropout: float = 0.0
    start: Start = "zero_b"

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        down, up = (site.in_dim, self.rank), (self.rank, site.out_dim)
        if site.kind == "embed":
            return Factors({"a": jnp.zeros(down), "b": jax.random.normal(key, up)})
        gaussian = self.start == "gaussian"
        a = jax.random.normal(key, down) / self.rank if gaussian else uniform(key, down, site.in_dim)
        return Factors({"a": a, "b": jnp.zeros(up)})

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        if isinstance(x, Lookup):
            return y * (thin(x, factors["a"]) @ factors["b"].astype(y.dtype))
        return times_built(self.delta, x, kernel, factors)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        return kernel * (factors["a"] @ factors["b"])
