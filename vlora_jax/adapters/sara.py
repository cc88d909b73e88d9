"""SARA and Mo-SARA: ranks from the singular values of the kernel (arXiv 2408.03290)."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.factorise import singular_values, svd
from vlora_jax.adapters.method import Factors, Method, one_by_one
from vlora_jax.adapters.options import by_pattern, check_least, check_patterns, check_rank, check_type
from vlora_jax.adapters.sites import Site, find_sites, select
from vlora_jax.adapters.svd import values
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.adapters.triplets import Triplets
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SARA(Triplets):
    """ΔW = A diag(λ) B with `A (in, k)`, `B (k, out)` and λ (k,) trained, and k from each kernel's singular values.

    k is the number of leading singular values whose sum stays below a share η of the sum of all, at least 1. λ starts
    at zero, A and B uniform in ±1/√in and ±1/√k. The rank rule is the paper's; there is no public code, the rest is
    second-hand or our reading.

    Shapes are fixed before the kernel's values are seen: `rank` directions are allocated in every layer, and a frozen
    `alive (rank,)` is 0 beyond a layer's own k. `fitted` gives the method with no more than a site needs.

    Attributes:
      rank: most directions of a layer; its k is not above that.
      share: η.
      rank_pattern: another `rank` for the sites that a pattern matches, `{"mlp": 4}`.
    """

    name = "sara"
    decays = frozenset({"a", "b"})
    paper = "2408.03290"
    formula = "ΔW = A diag(λ) B"
    trains = "k·(in + out + 1)"
    vertical = False
    verified = "NumPy"
    default_rate = 1e-2
    reads_base = True

    rank: int = 16
    share: float = 0.01
    rank_pattern: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for where, rank in (("rank", self.rank), *((f"rank_pattern[{p!r}]", rank) for p, rank in self.rank_pattern)):
            check_type(f"{self.name}: {where}", rank, int)
            check_least(f"{self.name}: {where}", rank, 1)
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"{self.name}: share is {self.share}; it must be above 0 and at most 1")

    def for_site(self, site: Site) -> "SARA":
        rank = by_pattern(f"{self.name}: rank_pattern", self.rank_pattern, site, self.rank)
        return dataclasses.replace(self, rank=rank, rank_pattern=())

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        check_patterns(f"{self.name}: rank_pattern", self.rank_pattern, sites)
        return super().init(key, sites, base)

    def fitted(self, base: Tree, sites: list[Site] | None = None) -> "SARA":
        """This method with `rank_pattern` so that each site has the largest k of its layers, and no more.

        Args:
          base: the model's parameters, with their values.
          sites: candidate kernels, if not `find_sites(base)`.
        """
        leaves, ranks = flatten(base), {}
        for site in select(find_sites(base) if sites is None else sites, self.targets, self.exclude):
            spectrum = lambda kernel: singular_values(kernel.astype(jnp.float32))
            sigma = one_by_one(spectrum, len(site.stack))(site.read(leaves))
            ranks[f"^{re.escape(site.path)}$"] = int(self.count(sigma).max())
        return dataclasses.replace(self, rank_pattern=ranks)

    def count(self, sigma: Float[Array, "*stack n"]) -> Float[Array, "*stack"]:
        """How many directions the rule keeps."""
        below = jnp.cumsum(sigma, -1) < self.share * sigma.sum(-1, keepdims=True)
        return jnp.maximum(below.sum(-1), 1).astype(jnp.float32)

    def alive(self, sigma: Float[Array, " n"]) -> Float[Array, " k"]:
        """1 at the directions that the rule keeps, 0 beyond."""
        return (jnp.arange(self.rank) < self.count(sigma)).astype(jnp.float32)

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        check_rank(self.name, self.rank, site)
        sigma = singular_values(values(self.name, kernel))
        key_a, key_b = jax.random.split(key)
        uniform = lambda key, shape, bound: jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        trainable = {
            "a": uniform(key_a, (site.in_dim, self.rank), site.in_dim**-0.5),
            "values": jnp.zeros(self.rank),
            "b": uniform(key_b, (self.rank, site.out_dim), self.rank**-0.5),
        }
        return Factors(trainable, {"alive": self.alive(sigma)})

    def gain(self, factors: FactorDict) -> Float[Array, " k"]:
        return factors["values"] * factors["alive"]


@dataclass(frozen=True, kw_only=True)
class MoSARA(SARA):
    """Δy = v ∘ (((x P) ∘ Σ_i g_i λᵢ) Qᵀ) with the leading singular vectors P, Q of the kernel frozen.

    n vectors λᵢ (k,) are mixed for each token by a router of rank one, g = softmax(x P w₁ w₂) with `w₁ (k, 1)` and
    `w₂ (1, n)`; `v (out,)` starts at zero, each λᵢ as the singular values, w₁ and w₂ normal with deviations 1/√k and 1.
    The change depends on the input and cannot be merged. The formula is second-hand, the starts are ours.

    Attributes:
      experts: n.
    """

    name = "mosara"
    formula = "Δy = v ∘ ((x P ∘ Σ g·λ) Qᵀ)"
    trains = "n·k + k + n + out"
    mergeable = False

    share: float = 0.5
    experts: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("mosara: experts", self.experts, 1)

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        check_rank(self.name, self.rank, site)
        if site.kind == "embed":
            raise ConfigError(f"mosara: {site.path} is an embedding, whose rows cannot be routed; exclude it")
        p, sigma, q = svd(values(self.name, kernel))
        key_in, key_out = jax.random.split(key)
        trainable = {
            "values": jnp.broadcast_to(sigma[: self.rank], (self.experts, self.rank)),
            "w1": jax.random.normal(key_in, (self.rank, 1)) / self.rank**0.5,
            "w2": jax.random.normal(key_out, (1, self.experts)),
            "v": jnp.zeros(site.out_dim),
        }
        return Factors(trainable, {"p": p[:, : self.rank], "q": q[: self.rank], "alive": self.alive(sigma)})

    def down(self, factors: FactorDict) -> Float[Array, "in k"]:
        return factors["p"] * factors["alive"]

    def up(self, xa: Float[Array, "tokens k"], x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        cast = lambda name: factors[name].astype(xa.dtype)
        gate = jax.nn.softmax(((xa @ cast("w1")) @ cast("w2")).astype(jnp.float32)).astype(xa.dtype)
        return cast("v") * ((xa * (gate @ cast("values"))) @ cast("q"))

    def delta(self, kernel: Array, factors: FactorDict) -> Array:
        return Method.delta(self, kernel, factors)

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> None:
        return None
