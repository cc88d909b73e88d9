"""MiSS, first called Bone: one small matrix repeated over the kernel (arXiv 2409.15371)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.kept import times_built
from vlora_jax.adapters.method import Factors, SiteMethod
from vlora_jax.adapters.options import check_least
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MiSS(SiteMethod):
    """ΔW[i, o] = D[i mod r, o]: the rows of D are repeated down the kernel. D starts at zero; there is no scale.

    It is LoRA with the frozen `A[i, j] = 1 if i mod r = j`, but `x @ A` costs no product: the entries of x whose
    places are equal modulo r are added up. r need not divide the inputs.

    Attributes:
      rank: r, at most the inputs.
      mode: `"default"` as above, D `(r, out)`; `"mini"`: D `(r, mini_rank)` repeated along the outputs too,
        `ΔW[i, o] = D[i mod r, o mod mini_rank]`; `"bat"`, the Bone of the paper's first version: D `(out / r, r, r)`,
        and of the block K (r, r) of the kernel at inputs b and outputs a the change is `D_a K_ba + D_a`.
      mini_rank: columns of D in mode mini; must divide the outputs.
      dropout: share of the inputs that is dropped in training; mode bat has none.

    Mode bat depends on the kernel, and its rank is not bounded by r. Its ΔW is built in every step, which costs
    r·in·out multiplications and then in·out a token; left unbuilt it would cost 2·in·out a token.
    """

    name = "miss"
    decays = frozenset({"d"})
    paper = "2409.15371"
    formula = "ΔW[i, o] = D[i mod r, o]"
    trains = "r·out"
    verified = "PEFT"
    peft = "MISS"
    default_rate = 3e-4

    rank: int = 64
    mode: Literal["default", "mini", "bat"] = "default"
    mini_rank: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(f"{self.name}: rank", self.rank, 1)
        check_least(f"{self.name}: mini_rank", self.mini_rank, 1)
        if self.mode == "bat" and self.dropout:
            raise ConfigError(f"{self.name}: dropout is {self.dropout}; mode bat has none")

    @property
    def adds_up(self) -> bool:
        """A sum of changes has the same form, unless each contains its own layer's kernel."""
        return self.mode != "bat"

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        self.check_site(site)
        if self.mode == "bat":
            return Factors({"d": jnp.zeros((site.out_dim // self.rank, self.rank, self.rank))})
        return Factors({"d": jnp.zeros((self.rank, self.mini_rank if self.mode == "mini" else site.out_dim))})

    def check_site(self, site: Site) -> None:
        """Raises ConfigError if the blocks do not fit a site."""
        where = f"{site.path} {site.shape}"
        if self.rank > site.in_dim:
            raise ConfigError(f"{self.name}: rank {self.rank} is above the {site.in_dim} inputs of {where}; lower it")
        if self.mode == "mini" and site.out_dim % self.mini_rank:
            near = nearest_divisor(site.out_dim, self.mini_rank)
            raise ConfigError(
                f"{self.name}: mini_rank {self.mini_rank} does not divide the {site.out_dim} outputs of {where}; "
                f"nearest that does: {near}"
            )
        common = math.gcd(site.in_dim, site.out_dim)
        if self.mode == "bat" and common % self.rank:
            raise ConfigError(
                f"{self.name}: in mode bat rank {self.rank} must divide the {site.in_dim} inputs and {site.out_dim} "
                f"outputs of {where}; nearest that does: {nearest_divisor(common, self.rank)}"
            )

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        if self.mode == "bat":
            if isinstance(x, Lookup):
                return x @ self.delta(kernel, factors).astype(y.dtype)
            return times_built(self.delta, x, kernel, factors)
        change = self.summed(x) @ factors["d"].astype(y.dtype)
        return jnp.tile(change, (1, y.shape[-1] // change.shape[-1]))

    def summed(self, x: Any) -> Float[Array, "tokens r"]:
        """Entries of x added up over the places that are equal modulo r."""
        if isinstance(x, Lookup):
            return jax.nn.one_hot(x.ids % self.rank, self.rank, dtype=x.dtype)
        padded = jnp.pad(x, ((0, 0), (0, -x.shape[1] % self.rank)))
        return padded.reshape(x.shape[0], -1, self.rank).sum(1)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        d, (inputs, outputs) = factors["d"], kernel.shape
        if self.mode == "bat":
            blocks = kernel.astype(jnp.float32).reshape(inputs // self.rank, self.rank, outputs // self.rank, self.rank)
            change = jnp.einsum("aij,bjao->biao", d, blocks) + d.swapaxes(0, 1)
            return change.reshape(inputs, outputs)
        return jnp.tile(d, (math.ceil(inputs / self.rank), outputs // d.shape[1]))[:inputs]

    def flops(self, site: Site) -> tuple[float, float]:
        kernel = 1.0 * site.in_dim * site.out_dim
        if self.mode == "bat":
            return 2 * kernel, 2 * self.rank * kernel
        columns = self.mini_rank if self.mode == "mini" else site.out_dim
        return site.in_dim + 2.0 * self.rank * columns, kernel

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array] | None:
        if self.mode == "bat":
            return None
        repeats = jax.nn.one_hot(jnp.arange(shape[0]) % self.rank, self.rank)
        return repeats, jnp.tile(factors["d"], (1, shape[1] // factors["d"].shape[1]))

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        if not self.adds_up:
            return super().sum_factors(factors, weights)
        return {"d": jnp.tensordot(weights, factors["d"], 1)}


def nearest_divisor(number: int, wish: int) -> int:
    """The divisor of a number that is nearest to a wish.

    >>> nearest_divisor(768, 100)
    96
    """
    return min((each for each in range(1, number + 1) if number % each == 0), key=lambda each: abs(each - wish))
