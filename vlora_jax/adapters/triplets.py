"""Low-rank changes with a diagonal between their factors, as in an SVD."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Product


@dataclass(frozen=True, kw_only=True)
class Triplets(Product):
    """ΔW = A diag(g) B with `A (in, r)`, `B (r, out)` and a diagonal `g (r,)` that the method makes of its factors."""

    @abstractmethod
    def gain(self, factors: FactorDict) -> Float[Array, " r"]:
        """The diagonal g, scale included."""

    def pair(self, factors: FactorDict) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        return factors["a"], self.gain(factors)[:, None] * factors["b"]


def orthogonality(adapter: Adapter, form: Literal["norm", "square"]) -> Float[Array, ""]:
    """How far the columns of all A and the rows of all B are from orthonormal.

    `"norm"`: the mean of ‖AᵀA − I‖ and ‖BBᵀ − I‖ (Frobenius) over all layers; `"square"`: the sum of their squares.
    """
    squares = jnp.concatenate([each.reshape(-1) for each in _deviations(adapter)])
    if form == "square":
        return squares.sum()
    away = squares > 0  # at 0 the root has no finite slope
    return jnp.where(away, jnp.sqrt(jnp.where(away, squares, 1.0)), 0.0).mean()


def _deviations(adapter: Adapter) -> Iterable[Array]:
    """‖AᵀA − I‖² and ‖BBᵀ − I‖² of every layer."""
    for factors in adapter.trainable["sites"].values():
        for rows in (factors["a"].swapaxes(-1, -2), factors["b"]):
            gram = rows @ rows.swapaxes(-1, -2)
            yield ((gram - jnp.eye(gram.shape[-1])) ** 2).sum((-2, -1))
