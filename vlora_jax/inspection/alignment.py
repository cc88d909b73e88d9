"""Where a change points, seen from the kernel it changes: does it strengthen what is strong there, or add what is new.

Reads the base. Leading subspaces of W are exact where W is small and otherwise found by randomised subspace iteration
(arXiv 0909.4061): 2·(iterations + 1) products of W with k + 10 columns, O(in·out·k), instead of the full SVD's
O(in·out·min(in, out)).
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.svd import leading
from vlora_jax.adapters.trees import Tree
from vlora_jax.inspection.changes import Change, changes
from vlora_jax.inspection.spectra import alive
from vlora_jax.inspection.tables import ratio

EXACT = 512  # kernels with a side up to this get the full SVD
ITERATIONS = 6


@dataclass(frozen=True)
class AlignmentRow:
    """How one layer's change lies to its kernel W = P diag(σ) Qᵀ.

    Attributes:
      input: share of ‖ΔW‖² on the k leading columns of P, the input side.
      output: the same on those of Q.
      chance_input, chance_output: what a random direction has, k / in and k / out.
      amplification: ‖ΔW‖ / ‖Uᵀ W V‖ with ΔW = U diag(values) Vᵀ, without dead directions: how much larger the change is
        than what W already does along it (arXiv 2106.09685, section 7.3); None for no change, infinite where W does
        nothing.
    """

    path: str
    layer: int | None
    input: float
    output: float
    chance_input: float
    chance_output: float
    amplification: float | None


def alignment_rows(base: Tree, adapter: Adapter, k: int = 16, seed: int = 0) -> list[AlignmentRow]:
    """A row for each layer of each site.

    Args:
      base: the parameters that the adapter changes.
      k: size of W's leading subspaces, at most the smaller side of each kernel.
      seed: of the randomised subspaces.

    Raises:
      ConversionError: the change depends on the input.
      BaseMismatchError: the base lacks a site of the adapter.
    """
    rows = []
    for part, change in changes(base, adapter):
        size = min(k, part.site.in_dim, part.site.out_dim)
        found = np.asarray(_aligned(size, jax.random.key(seed), part.kernels, change))
        chances = size / part.site.in_dim, size / part.site.out_dim
        for layer, (norm, inner, on_input, on_output) in zip(part.layers, found.tolist(), strict=True):
            larger = ratio(norm, inner) if norm else None
            rows.append(AlignmentRow(part.site.path, layer, on_input, on_output, *chances, larger))
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _aligned(k: int, key: Array, kernels: Float[Array, "layers in out"], change: Change) -> Float[Array, "layers 4"]:
    """‖ΔW‖, ‖Uᵀ W V‖, and the shares of ‖ΔW‖² on both sides, layer by layer."""
    iterations = 0 if min(kernels.shape[1:]) <= EXACT else ITERATIONS

    def one(layer: tuple[Array, Change]) -> Array:
        kernel, (u, values, v) = layer[0].astype(jnp.float32), (layer[1].u, layer[1].values, layer[1].v)
        p, _, q = leading(key, kernel, k, iterations)
        norm = jnp.linalg.norm(values)
        share = lambda projected: jnp.where(norm > 0, (jnp.linalg.norm(projected) / norm) ** 2, 0.0)
        live = alive(values)
        inner = jnp.linalg.norm(jnp.where(live[:, None] & live, u.T @ kernel @ v.T, 0.0))
        return jnp.stack([norm, inner, share((p.T @ u) * values), share(values[:, None] * (v @ q.T))])

    return jax.lax.map(one, (kernels, change))
