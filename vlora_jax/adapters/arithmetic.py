"""Arithmetic of adapters as changes of one base: add, scale, negate, average, interpolate; of every method, also mixed.

Changes are what is added up, not parameters: the average of two LoRAs is the mean of their ΔW, which is not the
product of the mean of A with the mean of B. A sum is an adapter like any other, exact, that keeps its parts: it is
bound, merged, inspected and trained further as they are, and `as_lora` makes one plain LoRA of it.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.blend import Blend, Weight, blended
from vlora_jax.adapters.trees import Tree


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Blend):
    """ΔW = Σ wᵢ·ΔWᵢ, what `add` and its relatives return.

    Members that depend on the input add up as well, but cannot be merged.
    """

    name: ClassVar[str] = "weighted_sum"
    formula: ClassVar[str] = "Σ wᵢ·ΔWᵢ"

    def blend(self, changes: Sequence[tuple[Array, Array]], factors: FactorDict) -> Array:
        return functools.reduce(jnp.add, [weight.astype(change.dtype) * change for weight, change in changes])

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        parts = self.parts(factors)
        return self.blend([(weight, member.forward(x, y, kernel, own)) for member, weight, own in parts], factors)

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array] | None:
        found = [(weight, member.low_rank(shape, own)) for member, weight, own in self.parts(factors)]
        pairs = [(pair[0], weight * pair[1]) for weight, pair in found if pair is not None]
        if len(pairs) < len(found):
            return None
        return jnp.concatenate([left for left, _ in pairs], axis=1), jnp.concatenate([right for _, right in pairs])


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[Weight], base: Tree | None = None) -> Adapter:
    """One adapter whose change is Σ wᵢ·ΔWᵢ.

    Args:
      adapters: of one base; their methods, sites and ranks may differ.
      weights: one for each; may be traced, so that they can be searched in one program.
      base: the parameters; needed where an adapter trains some of them whole, whose change is then `whole - base`.

    Raises:
      ConfigError, TargetError: see `blended`.

    >>> import jax
    >>> from vlora_jax import LoRA, init, merge, split
    >>> from flax import nnx
    >>> _, base = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> one = init(LoRA(rank=2, start="kaiming_both"), jax.random.key(0), base)
    >>> bool(jnp.allclose(merge(base, add(one, negate(one)))["kernel"][...], base["kernel"][...]))
    True
    """
    return blended(WeightedSum(), adapters, weights, base)


def add(*adapters: Adapter, base: Tree | None = None) -> Adapter:
    """All changes together: Σ ΔWᵢ. See `weighted_sum`."""
    return weighted_sum(adapters, [1.0] * len(adapters), base)


def scale(adapter: Adapter, by: Weight, base: Tree | None = None) -> Adapter:
    """A change made larger or smaller: `by`·ΔW. See `weighted_sum`."""
    return weighted_sum([adapter], [by], base)


def negate(adapter: Adapter, base: Tree | None = None) -> Adapter:
    """The opposite change, -ΔW, as task arithmetic takes a skill away (arXiv 2212.04089). See `weighted_sum`."""
    return scale(adapter, -1.0, base)


def average(*adapters: Adapter, base: Tree | None = None) -> Adapter:
    """The mean change. See `weighted_sum`."""
    return weighted_sum(adapters, [1 / max(len(adapters), 1)] * len(adapters), base)


def interpolate(one: Adapter, other: Adapter, share: Weight, base: Tree | None = None) -> Adapter:
    """`(1 - share)·ΔW₁ + share·ΔW₂`: the first at 0, the second at 1, beyond them outside. See `weighted_sum`."""
    return weighted_sum([one, other], [1 - share, share], base)
