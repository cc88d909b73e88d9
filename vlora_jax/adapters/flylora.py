"""FlyLoRA: a frozen sparse projection that routes itself (arXiv 2510.08396)."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors, LowRank
from vlora_jax.adapters.options import check_least, check_rank
from vlora_jax.adapters.probe import measured
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FlyLoRA(LowRank):
    """Δy = s·((x A) ∘ 1_I) B with s = alpha / rank and I the top `active` entries of x A + d, for each token.

    A `(in, r)` is frozen: each column has max(1, ⌊in·active/rank⌋) nonzeros at random places, of deviation 1/r.
    B starts at zero. d `(r,)` balances the load: after a step `d_i += balance_rate · sign(c̄ − c_i)`, where c_i tokens
    of the step's batch went through rank i. Every token counts, padding too.

    The change depends on the input and cannot be merged. The paper merges s·A B as an approximation, which this
    library does not do; with `active = rank` the method is LoRA with that frozen A.

    Attributes:
      rank: number of rank-wise experts r.
      active: how many of them a token uses.
      alpha: numerator of s.
      select: `"signed"` takes the largest x A + d (the paper's equation 10), `"magnitude"` the largest |x A| + d (its
        equation 8); which of them the paper's results are of is not said, the default is our reading.
      balance_rate: step of d (the paper's u; the authors' fork of PEFT has 0.01).
    """

    name = "flylora"
    decays = frozenset({"b"})
    paper = "2510.08396"
    formula = "Δy = s·top_k(x A) B"
    trains = "r·out"
    mergeable = False
    vertical = False
    verified = "NumPy"
    default_rate = 3e-3
    aside = LowRank.aside | {"balance_rate"}

    rank: int = 32
    active: int = 8
    alpha: float = 64.0
    select: Literal["signed", "magnitude"] = "signed"
    balance_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.active <= self.rank:
            raise ConfigError(f"flylora: active is {self.active}; it must be from 1 to the rank {self.rank}")
        check_least("flylora: balance_rate", self.balance_rate, 0)

    def nonzeros(self, in_dim: int) -> int:
        """Nonzeros of each column of A."""
        return max(1, in_dim * self.active // self.rank)

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        check_rank(self.name, self.rank, site)
        if site.kind == "embed":
            raise ConfigError(f"flylora: {site.path} is an embedding, whose rows cannot be routed; exclude it")
        key_place, key_value = jax.random.split(key)
        order = jax.random.uniform(key_place, (site.in_dim, self.rank)).argsort(axis=0).argsort(axis=0)
        value = jax.random.normal(key_value, (site.in_dim, self.rank)) / self.rank
        a = jnp.where(order < self.nonzeros(site.in_dim), value, 0.0)
        return Factors({"b": jnp.zeros((self.rank, site.out_dim))}, {"a": a, "d": jnp.zeros(self.rank)})

    def down(self, factors: FactorDict) -> Float[Array, "in r"]:
        return factors["a"]

    def up(self, xa: Float[Array, "tokens r"], x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        chosen = self.route(xa, factors["d"])
        xa = xa * chosen.astype(xa.dtype)
        if "load" in factors:
            xa = measured(lambda slope, load, counts: counts, xa, factors["load"], chosen.sum(0))
        return xa @ (self.alpha / self.rank * factors["b"]).astype(xa.dtype)

    def route(self, xa: Float[Array, "tokens r"], d: Float[Array, " r"]) -> Float[Array, "tokens r"]:
        """1 at the ranks that a token uses, 0 elsewhere."""
        score = jax.lax.stop_gradient(jnp.abs(xa) if self.select == "magnitude" else xa)
        places = jax.lax.top_k(score.astype(jnp.float32) + d, self.active)[1]
        return jax.nn.one_hot(places, self.rank).sum(-2)

    def probe(self, step: Array, adapter: Adapter) -> dict[str, FactorDict]:
        return {path: {"load": jnp.zeros_like(state["d"])} for path, state in adapter.frozen["sites"].items()}

    def advance(self, step: Array, adapter: Adapter, grads: Tree, opt_state: Tree) -> tuple[Adapter, Tree]:
        sites = {}
        for path, state in adapter.frozen["sites"].items():
            load = grads["probe"]["sites"][path]["load"]
            toward = jnp.sign(load.mean(-1, keepdims=True) - load)
            sites[path] = state | {"d": state["d"] + self.balance_rate * toward}
        return dataclasses.replace(adapter, frozen=adapter.frozen | {"sites": sites}), opt_state
