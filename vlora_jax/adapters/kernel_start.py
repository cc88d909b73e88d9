"""LoRA that starts from a part of the kernel, which it takes off the kernel."""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.svd import values
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class KernelStart(LoRA):
    """ΔW = s·(A B - A₀ B₀): A and B start at A₀ and B₀, a part of the kernel that stays frozen.

    The papers train A and B on W - s·A₀ B₀ in place of W. Here the base stays as it is and the adapter carries A₀ and
    B₀: the same function, but without the adapter the model is the base, and several can be bound. ΔW is the product
    of [A - A₀, A₀] and [B; B - B₀], a LoRA of rank 2r: small changes survive bfloat16, which A B - A₀ B₀ would lose.
    Options are LoRA's, but for `start` and `bias`; dropout acts on the inputs of A and A₀ alike (our reading: the
    papers' runs have none). Rank and alpha are 8 by default, so that s = 1, as in PiSSA's paper: set both.
    """

    vertical = False
    reads_base = True
    decays = frozenset()  # zero is not where they start

    alpha: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.start != "zero_b" or self.bias:
            raise ConfigError(f"{self.name}: start and bias are lora's only; A and B start from the kernel")

    @abstractmethod
    def part(self, key: PRNGKeyArray, kernel: Float[Array, "in out"]) -> tuple[Array, Array]:
        """A₀ `(in, r)` and B₀ `(r, out)` for s = 1."""

    def rescaled(self, a: Array, b: Array, gain: Float[Array, "*stack r"]) -> tuple[Array, Array]:
        """A₀ and B₀ for the scales `gain`; the same, if s·A₀ B₀ may depend on s."""
        return a, b

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        a, b = self.part(key, values(self.name, kernel))
        return Factors({"a": a, "b": b})

    def init_stack(self, key: PRNGKeyArray, site: Site, kernel: Array | None = None) -> Factors:
        wrong = next((alpha for rank, alpha in self.by_layer(site) if rank and alpha <= 0), None)
        if wrong is not None:
            raise ConfigError(f"{self.name}: alpha is {wrong} at {site.path}; it must be positive")
        factors = super().init_stack(key, site, kernel)
        a, b = self.rescaled(factors.trainable["a"], factors.trainable["b"], self.gain(site))
        return Factors({"a": a, "b": b}, factors.frozen | {"a0": jnp.copy(a), "b0": jnp.copy(b)})

    def doubled(self, factors: FactorDict) -> FactorDict:
        """Factors of the LoRA of twice the rank."""
        a, b, a0, b0 = (factors[name] for name in ("a", "b", "a0", "b0"))
        both = {"a": jnp.concatenate([a - a0, a0], axis=-1), "b": jnp.concatenate([b, b - b0], axis=-2)}
        return both | ({"gain": jnp.concatenate([factors["gain"]] * 2, axis=-1)} if "gain" in factors else {})

    def pair(self, factors: FactorDict) -> tuple[Float[Array, "in both"], Float[Array, "both out"]]:
        return super().pair(self.doubled(factors))

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        start = super().sum_factors({"a": factors["a0"], "b": factors["b0"]}, weights)
        return super().sum_factors(factors, weights) | {"a0": start["a"], "b0": start["b"]}

    def exported(self, adapter: Adapter) -> Adapter:
        """A LoRA of twice the rank with the same scales."""
        twice = lambda rank: 2 * rank
        alpha = lambda alpha: doubled_alpha(alpha, self.rank_stabilised)
        options = {each.name: getattr(self, each.name) for each in dataclasses.fields(LoRA)}
        options |= {"rank": twice(self.rank), "rank_pattern": _changed(self.rank_pattern, twice)}
        options |= {"alpha": alpha(self.alpha), "alpha_pattern": _changed(self.alpha_pattern, alpha)}
        method, trainable, frozen = LoRA(**options), {}, {}
        for site in adapter.sites:
            ranks = np.array([rank for rank, _ in self.by_layer(site)]).reshape(*site.stack, 1)
            padding = np.tile(np.arange(ranks.max()) >= ranks, 2)
            order = np.argsort(padding, axis=-1, kind="stable")  # what is padded goes last
            both = self.doubled(adapter.factors(site.path))
            a = jnp.where(padding[..., None, :], 0, both["a"])
            b = jnp.where(padding[..., :, None], 0, both["b"])
            trainable[site.path] = {
                "a": jnp.take_along_axis(a, order[..., None, :], axis=-1),
                "b": jnp.take_along_axis(b, order[..., :, None], axis=-2),
            }
            frozen[site.path] = {"gain": method.gain(site)} if "gain" in both else {}
        lora = Adapter.of(method, list(adapter.sites), trainable=trainable, frozen=frozen)
        return lora.with_trainable(lora.trainable | {"full": adapter.trainable["full"]})


def doubled_alpha(alpha: float, rank_stabilised: bool) -> float:
    """The alpha that gives twice the rank the same scale."""
    return alpha * (math.sqrt(2) if rank_stabilised else 2)


def _changed(table: tuple[tuple[str, Any], ...], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A table of values, or of tuples of them, with each value changed."""
    each = lambda value: [change(one) for one in value] if isinstance(value, tuple) else change(value)
    return {pattern: each(value) for pattern, value in table}
