"""LaMDA and LaMDA++: low-dimensional adaptation with a projection that freezes step by step (arXiv 2406.12832)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.options import check_least, check_steps, check_type
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.svd import Principal
from vlora_jax.adapters.trees import Tree, flatten, map_alike
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LaMDA(Principal):
    """ΔW = A S B - P_r diag(σ_r) Q_rᵀ with W = P diag(σ) Qᵀ: A = P_r frozen, S `(r, r)` and B `(r, out)` trained.

    S starts at diag(σ_r) and B at Q_rᵀ, so that the model is unchanged. Rows of B freeze in their order, the largest
    singular direction first: ⌊r·i / (share·steps)⌋ of them are frozen at step i, whatever the optimiser keeps or
    decays. Afterwards only S trains, as in LoRA-XS. Beyond the frozen A and the trained S, which the abstract has, this
    is our reading; the authors' code has neither an SVD nor a schedule that freezes all rows.

    Attributes:
      steps: of the whole training; 0: the run says.
      share: of the steps, after which all of B is frozen.
      ranks: LaMDA++: all layers of all sites, ordered by the concentration of their spectrum, Σ_{i ≤ rank} σᵢ² / ‖W‖²,
        are divided into as many equal groups as there are ranks here; the least concentrated one gets the largest
        (our reading). The largest is allocated in all layers. Empty: `rank` in all layers.
    """

    name = "lamda"
    paper = "2406.12832"
    formula = "ΔW = P_r S B - P_r diag(σ_r) Q_rᵀ"
    trains = "r² + r·out, at the end r²"
    default_rate = 1e-3
    aside = Principal.aside | {"steps", "share"}

    rank: int = 32
    steps: int = 0
    share: float = 0.3
    ranks: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("lamda: steps", self.steps, 0)
        if not 0 < self.share <= 1:
            raise ConfigError(f"lamda: share is {self.share}; it must be above 0 and at most 1")
        if not isinstance(self.ranks, tuple):
            raise ConfigError(f"lamda: ranks is {self.ranks!r}; it must be a list of whole numbers")
        if self.ranks and self.rank_pattern:
            raise ConfigError("lamda: ranks gives each layer its rank; it takes no rank_pattern")
        for rank in self.ranks:
            check_type("lamda: an entry of ranks", rank, int)
        if self.ranks and not (min(self.ranks) >= 1 and max(self.ranks) >= self.rank):
            raise ConfigError(
                f"lamda: ranks are {list(self.ranks)}; they must be at least 1, and one at least rank, {self.rank}"
            )

    @property
    def width(self) -> int:
        return max(self.ranks, default=self.rank)

    def last_steps(self, rank: int) -> list[int]:
        """How many steps each row of B trains; 0 beyond the rank."""
        if not self.steps:  # `advance` then refuses to train
            return [1] * rank + [0] * (self.width - rank)
        until = [math.ceil(round((row + 1) * self.share * self.steps / rank, 9)) for row in range(rank)]
        return until + [0] * (self.width - rank)

    def start(
        self, key: PRNGKeyArray, p: Float[Array, "in r"], sigma: Float[Array, " r"], q: Float[Array, "r out"]
    ) -> Factors:
        left = jnp.asarray(self.last_steps(self.width), jnp.int32)
        return Factors({"s": jnp.diag(sigma), "b": q}, {"a": p, "sigma": sigma, "b0": jnp.copy(q), "left": left})

    def right(self, factors: FactorDict) -> Float[Array, "r out"]:
        b = jnp.where(factors["left"][:, None] > 0, factors["b"], jax.lax.stop_gradient(factors["b"]))
        sigma = factors["sigma"]  # two differences: nothing is left at the start, however products are rounded
        return (factors["s"] - jnp.diag(sigma)) @ b + sigma[:, None] * (b - factors["b0"])

    def allow(self, adapter: Adapter, updates: Tree) -> Tree:
        return jax.tree.map(lambda update, trains: jnp.where(trains, update, 0), updates, self.training(adapter))

    def advance(self, step: Array, adapter: Adapter, grads: Tree, opt_state: Tree) -> tuple[Adapter, Tree]:
        check_steps(self.name, self.steps)
        sites = {
            path: names | {"left": jnp.maximum(names["left"] - 1, 0)} for path, names in adapter.frozen["sites"].items()
        }
        adapter = dataclasses.replace(adapter, frozen=adapter.frozen | {"sites": sites})
        clear = lambda leaf, like, trains: jnp.where(trains, leaf, 0) if leaf.shape == like.shape else leaf
        return adapter, map_alike(clear, opt_state, adapter.trainable, self.training(adapter))

    def training(self, adapter: Adapter) -> Tree:
        """What still trains: a tree like `adapter.trainable`, false at frozen rows of B."""
        trains = jax.tree.map(lambda _: jnp.bool_(True), adapter.trainable)
        rows = {path: names["left"][..., None] > 0 for path, names in adapter.frozen["sites"].items()}
        return trains | {"sites": {path: names | {"b": rows[path]} for path, names in trains["sites"].items()}}

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        adapter = super().init(key, sites, base)
        return self.allocated(adapter, base) if self.ranks else adapter

    def allocated(self, adapter: Adapter, base: Tree) -> Adapter:
        """The adapter with a rank for each layer: what is beyond is zero, and stays so in training."""
        leaves, sites = flatten(base), adapter.sites
        sigmas = [adapter.frozen["sites"][site.path]["sigma"][..., : self.rank] for site in sites]
        shares = [concentration(site.read(leaves), sigma) for site, sigma in zip(sites, sigmas, strict=True)]
        order = jnp.argsort(jnp.argsort(jnp.concatenate([share.reshape(-1) for share in shares])))
        steps = jnp.asarray([self.last_steps(rank) for rank in sorted(self.ranks, reverse=True)], jnp.int32)
        lefts = jnp.split(steps[order * len(self.ranks) // order.size], np.cumsum([site.layers for site in sites])[:-1])
        trainable, frozen = {}, {}
        for site, left in zip(sites, lefts, strict=True):
            left = left.reshape(*site.stack, self.width)
            live = (left > 0).astype(jnp.float32)
            masks = {"a": live[..., None, :], "sigma": live} | dict.fromkeys(("s", "b", "b0"), live[..., :, None])
            masked = {name: value * masks.get(name, 1) for name, value in adapter.factors(site.path).items()}
            trainable[site.path] = {name: masked[name] for name in ("s", "b")}
            frozen[site.path] = {name: masked[name] for name in ("a", "sigma", "b0")} | {"left": left}
        return Adapter.of(self, list(sites), trainable=trainable, frozen=frozen)


def concentration(kernel: Float[Array, "*stack in out"], sigma: Float[Array, "*stack r"]) -> Float[Array, "*stack"]:
    """The share of a kernel's squared norm that its first singular values have; 1 where all is zero."""
    square = (kernel.astype(jnp.float32) ** 2).sum((-2, -1))
    return jnp.where(square > 0, (sigma**2).sum(-1) / jnp.where(square > 0, square, 1), 1)
