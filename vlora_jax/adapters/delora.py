"""DeLoRA: angles and strength of a low-rank change apart (arXiv 2503.18225)."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.method import Factors, Product
from vlora_jax.adapters.ranked import Ranked, uniform
from vlora_jax.adapters.sites import Site
from vlora_jax.errors import ConfigError

Start = Literal["zero_b", "residual"]
SHORTEST = 1e-4  # shorter columns and rows count as this long, as in PEFT


@dataclass(frozen=True, kw_only=True)
class DeLoRA(Ranked, Product):
    """ΔW = diag(w)·Σₖ (λ/r)·(aₖ/‖aₖ‖)(bₖ/‖bₖ‖): r directions of unit length, one trained strength λ a layer.

    `aₖ` are the columns of `A (in, r)`, `bₖ` the rows of `B (r, out)`, `w (in,)` the lengths of the rows of W at the
    start, one an input: frozen. So ‖diag(w)⁻¹ ΔW‖ ≤ |λ| in the Frobenius norm, whatever A and B are. (The paper scales
    by one norm ‖W‖; w as a vector is the authors' code in PEFT, which we follow.)

    A starts uniform in ±1/√in. PEFT's B starts as zero, which counts as 1e-4 long, so that the model is unchanged and
    the first step brings the whole strength λ. The authors' first proposal to PEFT (pull request 2780) drew B too,
    uniform in ±1/√r here, and subtracted the change at the start from the base: `start="residual"` carries that change
    in the frozen `a0`, `b0`, and the base stays as it is. PEFT's files have no place for it.
    PEFT has linear layers only; embeddings are ours.

    Attributes:
      boundary: λ at the start. PEFT's is 15, of which the first steps bring so much that a small model loses what it
        knows: MiniLM stays at 51 % on SST-2 at rates from 2e-4 to 2e-3, and comes to 84 % with 1.
      boundary_pattern: other values for the sites that a pattern matches.
      dropout: share of the change's inputs that is dropped in training.
      start: see above.
    """

    name = "delora"
    paper = "2503.18225"
    formula = "ΔW = diag(w)·Σₖ (λ/r)·âₖ b̂ₖ"
    trains = "r·(in + out) + 1"
    vertical = False
    verified = "PEFT"
    peft = "DELORA"
    reads_base = True
    default_rate = 2e-3

    boundary: float = 1.0
    boundary_pattern: Any = ()
    dropout: float = 0.0
    start: Start = "zero_b"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start == "zero_b" and self.boundary == 0:
            raise ConfigError("delora: boundary is 0, at which nothing trains: B starts at zero as well")

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        if kernel is None:
            raise ConfigError("delora: the start needs the base's values")
        key_a, key_b = jax.random.split(key)
        a, b = uniform(key_a, (site.in_dim, self.rank), site.in_dim), jnp.zeros((self.rank, site.out_dim))
        frozen = {"w": jnp.linalg.norm(kernel.astype(jnp.float32), axis=1)}
        if self.start == "residual":
            b = uniform(key_b, b.shape, self.rank)
            frozen |= {"a0": a, "b0": self.strong(a, b, self.boundary)}
        return Factors({"a": a, "b": b, "boundary": jnp.full((), self.boundary, jnp.float32)}, frozen)

    def strong(self, a: Float[Array, "in r"], b: Float[Array, "r out"], boundary: Any) -> Float[Array, "r out"]:
        """B with the factors (λ/r) / (‖aₖ‖ ‖bₖ‖)."""
        return (boundary / (self.rank * lengths(a, 0) * lengths(b, 1)))[:, None] * b

    def pair(self, factors: FactorDict) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        left, right = factors["a"], self.strong(factors["a"], factors["b"], factors["boundary"])
        if "a0" in factors:
            left = jnp.concatenate([left - factors["a0"], factors["a0"]], axis=1)
            right = jnp.concatenate([right, right - factors["b0"]], axis=0)
        return factors["w"][:, None] * left, right


def lengths(vectors: Float[Array, "rows columns"], axis: int) -> Float[Array, " vectors"]:
    """Norms along an axis, at least `SHORTEST`, where they have no gradient."""
    return jnp.sqrt(jnp.maximum((vectors**2).sum(axis), SHORTEST**2))
