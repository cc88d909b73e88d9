"""Merging many changes into one that keeps them from undoing each other: TIES (arXiv 2306.01708), DARE (2311.03099).

Both act on the entries of ΔW, which are dense whatever the method, so nothing thin comes of them. What `ties` and
`dare` return keeps its members and no ΔW: its memory is theirs. ΔW is built where it is asked for and exactly: `merge`
does so site by site, one layer at a time, and `as_lora` makes one LoRA of it by the SVD of each layer, with what that
leaves out. Bound to a model it builds each layer's ΔW in every call, which takes as long as a call with whole kernels
and their election on top: merge it before much use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.blend import WORDS, Blend, Weight, blended, drawing_key
from vlora_jax.adapters.options import check_dropout
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError, ConversionError


@dataclass(frozen=True, kw_only=True)
class Ties(Blend):
    """The changes' largest entries, averaged over those that have the sign which most of their sum has.

    Attributes:
      density: share of the entries of each change that is kept.
    """

    name: ClassVar[str] = "ties"
    paper: ClassVar[str] = "2306.01708"
    formula: ClassVar[str] = "mean of the trimmed wᵢ·ΔWᵢ of the elected sign"
    layerwise: ClassVar[bool] = True

    density: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ConfigError(f"{self.name}: density is {self.density}; it must be above 0 and at most 1")

    def blend(self, changes: Sequence[tuple[Array, Array]], factors: FactorDict) -> Array:
        kept = jnp.stack([weight * trimmed(change, self.density) for weight, change in changes])
        sizes = jnp.stack([jnp.abs(weight) for weight, _ in changes]).reshape(-1, *[1] * (kept.ndim - 1))
        agrees = elected(kept)
        total = jnp.where(agrees, sizes, 0.0).sum(0)
        return jnp.where(agrees, kept, 0.0).sum(0) / jnp.where(total > 0, total, 1.0)


@dataclass(frozen=True, kw_only=True)
class Dare(Blend):
    """m∘ΔW / (1 - p), m zero with probability p: the change's expectation, in few of its entries.

    Which entries are dropped is drawn from two frozen words of each layer, so that it is the same in every use.

    Attributes:
      drop: p.
    """

    name: ClassVar[str] = "dare"
    paper: ClassVar[str] = "2311.03099"
    formula: ClassVar[str] = "m∘ΔW / (1 - p)"
    layerwise: ClassVar[bool] = True

    drop: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_dropout(self.name, self.drop, "drop")

    def blend(self, changes: Sequence[tuple[Array, Array]], factors: FactorDict) -> Array:
        ((_, change),) = changes
        key = jax.random.fold_in(drawing_key(factors[WORDS]), change.ndim)  # of a bias other ones than of its kernel
        keep = jax.random.bernoulli(key, 1.0 - self.drop, change.shape)
        return jnp.where(keep, change / (1.0 - self.drop), 0.0)


def trimmed(change: Float[Array, "..."], density: float) -> Float[Array, "..."]:
    """A change with its largest entries only, in magnitude; of equal ones at the border, all are kept.

    >>> trimmed(jnp.array([3.0, -1.0, 2.0, -4.0]), 0.5)
    Array([ 3.,  0.,  0., -4.], dtype=float32)
    """
    if density == 1:
        return change
    sizes = jnp.abs(change)
    least = jnp.sort(sizes.reshape(-1))[change.size - max(1, round(density * change.size))]
    return jnp.where(sizes >= least, change, 0.0)


def elected(changes: Float[Array, "members ..."]) -> Bool[Array, "members ..."]:
    """Which entries have the sign of the sum of all; none where they cancel exactly."""
    return (jnp.sign(changes) == jnp.sign(changes.sum(0))) & (changes != 0)


def ties(
    adapters: Sequence[Adapter],
    weights: Sequence[Weight] | None = None,
    density: float = 0.2,
    base: Tree | None = None,
) -> Adapter:
    """One adapter by TIES: trim every change, elect a sign for each entry, and average those that have it.

    An entry is Σ wᵢ·ΔWᵢ / Σ |wᵢ| over the members whose trimmed wᵢ·ΔWᵢ has the sign of Σ wᵢ·ΔWᵢ: with equal weights
    the paper's disjoint mean, whose λ is `scale`. Entries are ranked within each kernel of a layer, each bias and each
    parameter that is trained whole (the paper: within the whole model), so that one layer at a time is enough.

    Args:
      adapters: of one base; their methods, sites and ranks may differ.
      weights: one for each, 1 if not given.
      density: share of the entries of each change that is kept; the paper's k.
      base: the parameters; needed where an adapter trains some of them whole.

    Raises:
      ConversionError: a method depends on the input, so that there is no ΔW.
      ConfigError, TargetError: see `blended`; a density that is no share.

    >>> from flax import nnx
    >>> from vlora_jax import LoRA, init, merge, split
    >>> _, base = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> adapters = [init(LoRA(rank=2, start="kaiming_both"), jax.random.key(seed), base) for seed in range(3)]
    >>> change = merge(base, ties(adapters, density=0.25))["kernel"][...] - base["kernel"][...]
    >>> 3 <= int((change != 0).sum()) <= 9
    True
    """
    check_mergeable("ties", adapters)
    return blended(Ties(density=density), adapters, [1.0] * len(adapters) if weights is None else weights, base)


def dare(adapter: Adapter, drop: float, key: PRNGKeyArray, base: Tree | None = None) -> Adapter:
    """An adapter by DARE: each entry of its change is dropped with a probability, and the others made up for it.

    Several are then added with `weighted_sum`, or elected with `ties(…, density=1.0)`; give each a key of its own.

    Args:
      drop: p, from 0 up to 1, without it.
      key: `jax.random.key`; each layer of each site draws on its own.
      base: the parameters; needed where the adapter trains some of them whole.

    Raises:
      ConversionError: the method depends on the input, so that there is no ΔW.
      ConfigError: `drop` is no probability below 1.

    >>> from flax import nnx
    >>> from vlora_jax import LoRA, init, merge, split
    >>> _, base = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> one = init(LoRA(rank=2, start="kaiming_both"), jax.random.key(0), base)
    >>> merged = merge(base, dare(one, 0.5, jax.random.key(1)))
    >>> 0 < int((merged["kernel"][...] == base["kernel"][...]).sum()) < 12
    True
    """
    check_mergeable("dare", [adapter])
    return blended(Dare(drop=drop), [adapter], [1.0], base, key)


def check_mergeable(what: str, adapters: Sequence[Adapter]) -> None:
    """Raises ConversionError if one of the adapters has no ΔW."""
    gated = next((adapter.method.name for adapter in adapters if not adapter.method.mergeable), None)
    if gated is not None:
        raise ConversionError(
            f"{what}: {gated} depends on the input, so that there is no ΔW; only add and average take it"
        )
