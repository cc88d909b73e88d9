"""LoRA: low-rank adaptation (arXiv 2106.09685), rank-stabilised LoRA (2312.03732), LoRA+ (2402.12354)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors, LowRank, by_pattern, check_patterns, check_type
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError

Start = Literal["zero_b", "gaussian", "kaiming_both", "xavier_both"]


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """ΔW = s·A B with s = alpha / rank, or alpha / √rank if `rank_stabilised`.

    Attributes:
      rank: inner size r of `A (in, r)` and `B (r, out)`.
      alpha: numerator of the scale s.
      rank_stabilised: divide alpha by √rank (rsLoRA).
      dropout: share of A's inputs that is dropped in training; the frozen path never sees it.
      rank_pattern, alpha_pattern: other values for the sites that a pattern matches, `{"mlp": 4}`.
      start: `"zero_b"`: A uniform in ±1/√in, B zero, so that the model is unchanged (on an embedding A is zero
        and B standard normal); `"gaussian"`: A normal with deviation 1/r, B zero; `"kaiming_both"`: A as above,
        B uniform in ±1/√out; `"xavier_both"`: A uniform in ±√(6/(r + in)), B in ±√(6/(r + out)). The last two
        are the starts of vertical increments (arXiv 2406.09315) and change the model at once.
      b_rate: learning rate of B relative to A's (LoRA+); 1 is plain LoRA.
    """

    name = "lora"
    paper = "2106.09685"
    formula = "ΔW = s·A B"
    trains = "r·(in + out)"
    adds_up = True
    verified = "PEFT"

    rank: int = 8
    alpha: float = 16.0
    rank_stabilised: bool = False
    dropout: float = 0.0
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    start: Start = "zero_b"
    b_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, rank in (("rank", self.rank), *_named("rank_pattern", self.rank_pattern)):
            check_type(f"lora: {where}", rank, int)
            if rank < 1:
                raise ConfigError(f"lora: {where} is {rank}; it must be at least 1")
        for where, alpha in _named("alpha_pattern", self.alpha_pattern):
            check_type(f"lora: {where}", alpha, float)
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"lora: dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.b_rate <= 0:
            raise ConfigError(f"lora: b_rate is {self.b_rate}; it must be positive")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        check_patterns("lora: rank_pattern", self.rank_pattern, sites)
        check_patterns("lora: alpha_pattern", self.alpha_pattern, sites)
        return super().init(key, sites, base)

    def for_site(self, site: Site) -> "LoRA":
        rank = by_pattern("lora: rank_pattern", self.rank_pattern, site, self.rank)
        alpha = by_pattern("lora: alpha_pattern", self.alpha_pattern, site, self.alpha)
        smaller = min(site.in_dim, site.out_dim)
        if rank > smaller:
            raise ConfigError(
                f"lora: rank {rank} is above the smaller side, {smaller}, of {site.path} {site.shape}; "
                f"lower it there with rank_pattern, or exclude the site"
            )
        return dataclasses.replace(self, rank=rank, alpha=alpha, rank_pattern=(), alpha_pattern=())

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        key_a, key_b = jax.random.split(key)
        shape_a, shape_b = (site.in_dim, self.rank), (self.rank, site.out_dim)
        if self.start == "zero_b" and site.kind == "embed":
            return Factors({"a": jnp.zeros(shape_a), "b": jax.random.normal(key_b, shape_b)})
        if self.start == "gaussian":
            return Factors({"a": jax.random.normal(key_a, shape_a) / self.rank, "b": jnp.zeros(shape_b)})
        xavier = self.start == "xavier_both"
        bound_a = math.sqrt(6 / (self.rank + site.in_dim)) if xavier else site.in_dim**-0.5
        bound_b = math.sqrt(6 / (self.rank + site.out_dim)) if xavier else site.out_dim**-0.5
        if self.start == "zero_b":
            bound_b = 0.0
        a = jax.random.uniform(key_a, shape_a, minval=-bound_a, maxval=bound_a)
        b = jax.random.uniform(key_b, shape_b, minval=-bound_b, maxval=bound_b) if bound_b else jnp.zeros(shape_b)
        return Factors({"a": a, "b": b})

    def down(self, factors: FactorDict) -> Float[Array, "in r"]:
        return factors["a"]

    def up(self, xa: Float[Array, "tokens r"], x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        return self.scale * (xa @ factors["b"].astype(xa.dtype))

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        return self.scale * (factors["a"] @ factors["b"])

    def low_rank(self, factors: FactorDict) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        return self.scale * factors["a"], factors["b"]

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        a, b = factors["a"], factors["b"] * weights[:, None, None]
        return {"a": a.transpose(1, 0, 2).reshape(a.shape[1], -1), "b": b.reshape(-1, b.shape[2])}

    def groups(self, adapter: Adapter) -> Tree:
        groups = jax.tree.map(lambda _: "adapter", adapter.trainable)
        groups["sites"] = {path: {"a": "a", "b": "b"} for path in groups["sites"]}
        return groups

    def rates(self) -> dict[str, float]:
        return {"b": self.b_rate}


def _named(field: str, table: Any) -> list[tuple[str, Any]]:
    return [(f"{field}[{pattern!r}]", value) for pattern, value in table]
