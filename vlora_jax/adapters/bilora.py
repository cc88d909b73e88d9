"""BiLoRA: the factors of a change and its singular values learn from different examples (arXiv 2403.13037)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors, Gradient, Slope
from vlora_jax.adapters.options import check_least, check_rank
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.adapters.triplets import Triplets, orthogonality
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BiLoRA(Triplets):
    """ΔW = s·A diag(e) B with s = alpha / rank: V = {A, B} learns from examples D1, E = {e} from the others, D2.

    V follows the slope of L1(V, E) + γ·R(V), R being AdaLoRA's penalty; E that of L2(V1(E), E) where
    V1(E) = V − η·∇_V (L1 + γ·R) is V after one step: the exact hypergradient of one unrolled step,
    ∇_E L2 − η·(∂²L1 / ∂E ∂V)·∇_V L2, each at its own point, for about three gradients a step. Both go through the
    run's optimiser in the same step. With η = 0 each level takes the other as given.

    An example's level follows from its number alone, so that it is the same in every epoch. What `full` trains belongs
    to V. The step's loss metric is the mean of L1 at (V, E) and L2 at (V1, E).

    There is no public code. The split 8:2, the value of e and all numbers here are second-hand or our reading.

    Attributes:
      rank: triplets of each layer.
      alpha: numerator of s.
      dropout: share of A's inputs that is dropped in training.
      values: `"real"`: e as it is, starting at zero; `"softmax"`: softmax(e) takes the place of e and B starts at zero.
      orthogonality: weight γ of the penalty.
      upper: share of the examples that are D2.
      inner_rate: η.
      value_rate: learning rate of e relative to that of A and B.
      joint: train all on all examples, the control to compare with.
    """

    name = "bilora"
    decays = frozenset({"a", "b"})
    paper = "2403.13037"
    formula = "ΔW = s·A diag(e) B, e learnt on other data"
    trains = "r·(in + out + 1)"
    vertical = False
    verified = "closed form"
    cost = "three gradients a step: of both levels, and through the inner step"
    default_rate = 1e-2
    aside = Triplets.aside | {"orthogonality", "upper", "inner_rate", "value_rate", "joint"}

    rank: int = 8
    alpha: float = 8.0
    dropout: float = 0.0
    values: Literal["real", "softmax"] = "real"
    orthogonality: float = 0.1
    upper: float = 0.2
    inner_rate: float = 1e-2
    value_rate: float = 1.0
    joint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in (("rank", 1), ("orthogonality", 0), ("inner_rate", 0)):
            check_least(f"bilora: {field}", getattr(self, field), least)
        if not 0.0 < self.upper < 1.0:
            raise ConfigError(f"bilora: upper is {self.upper}; it must be above 0 and below 1")
        if self.value_rate <= 0:
            raise ConfigError(f"bilora: value_rate is {self.value_rate}; it must be positive")

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        check_rank(self.name, self.rank, site)
        key_a, key_b = jax.random.split(key)
        a = 0.02 * jax.random.normal(key_a, (site.in_dim, self.rank))
        b = 0.02 * jax.random.normal(key_b, (self.rank, site.out_dim))
        return Factors({"a": a, "e": jnp.zeros(self.rank), "b": b if self.values == "real" else jnp.zeros_like(b)})

    def gain(self, factors: FactorDict) -> Float[Array, " r"]:
        e = factors["e"]
        return self.alpha / self.rank * (e if self.values == "real" else jax.nn.softmax(e))

    def groups(self, adapter: Adapter) -> Tree:
        groups = jax.tree.map(lambda _: "vectors", adapter.trainable)
        names = {
            path: {name: "values" if name == "e" else "vectors" for name in f} for path, f in groups["sites"].items()
        }
        return groups | {"sites": names}

    def rates(self) -> dict[str, float]:
        return {"values": self.value_rate}

    def penalty(self, adapter: Adapter) -> Array | float:
        return self.orthogonality * orthogonality(adapter, "norm")

    def in_upper(self, ids: Array) -> Float[Array, "..."]:
        """1 for the examples of D2, 0 for those of D1."""
        spread = ids.astype(jnp.uint32) * jnp.uint32(2654435769)  # 2³² over the golden ratio: neighbours part evenly
        return ((spread >> 8).astype(jnp.float32) / 2**24 < self.upper).astype(jnp.float32)

    def gradients(self, gradient: Gradient, adapter: Adapter, ids: Array) -> Slope:
        # What the inner gradient keeps, of all micro-batches, stays until the outer one is known.
        if self.joint:
            return gradient(adapter.trainable)
        groups, upper, eta = self.groups(adapter), self.in_upper(ids), self.inner_rate
        pick = lambda values, vectors: jax.tree.map(
            lambda group, e, v: e if group == "values" else v, groups, values, vectors
        )
        trained = adapter.trainable
        first, push = jax.linearize(lambda trained: gradient(trained, 1 - upper), trained)
        pull = jax.grad(lambda trained: jnp.asarray(self.penalty(adapter.with_trainable(trained))))(trained)
        ahead = jax.tree.map(lambda v, slope, tie: v - eta * (slope + tie), trained, first.grads, pull)
        second = gradient(pick(trained, ahead), upper)
        mixed = push(pick(jax.tree.map(jnp.zeros_like, trained), second.grads)).grads
        hyper = jax.tree.map(lambda direct, through: direct - eta * through, second.grads, mixed)
        sums = jax.tree.map(jnp.add, first.sums, second.sums)
        return Slope(pick(hyper, first.grads), sums, first.probe)
