"""What a merge loses: W + ΔW has to be rounded to the type that the model is stored in."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.trees import Tree
from vlora_jax.inspection.changes import Change, changes

ROWS = 512


@dataclass(frozen=True)
class RoundingRow:
    """What is left of one layer's change once it is merged.

    Attributes:
      lost: ‖(merged - W) - ΔW‖ / ‖ΔW‖ with W and W + ΔW both rounded; 0 for no change.
      unmoved: share of the kernel's entries that ΔW changes and the merged kernel does not.
    """

    path: str
    layer: int | None
    lost: float
    unmoved: float


def rounding_rows(base: Tree, adapter: Adapter, dtype: str = "bfloat16", rows: int | None = ROWS) -> list[RoundingRow]:
    """A row for each layer of each site.

    Builds ΔW, O(in·out·r), so that it looks at some rows of each kernel only, evenly spaced.

    Args:
      base: the parameters that the adapter changes.
      dtype: that the merged model is stored in.
      rows: how many rows of each kernel are looked at; all with None.

    Raises:
      ConversionError: the change depends on the input.
      BaseMismatchError: the base lacks a site of the adapter.
    """
    found = []
    for part, change in changes(base, adapter):
        size = part.site.in_dim
        places = np.arange(size) if rows is None or rows >= size else np.linspace(0, size - 1, rows).astype(int)
        figures = np.asarray(_rounded(dtype, jnp.asarray(places), part.kernels, change))
        for layer, (lost, unmoved) in zip(part.layers, figures.tolist(), strict=True):
            found.append(RoundingRow(part.site.path, layer, lost, unmoved))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _rounded(
    dtype: str, places: Array, kernels: Float[Array, "layers in out"], change: Change
) -> Float[Array, "layers 2"]:
    def one(layer: tuple[Array, Change]) -> Array:
        kernel, change = layer[0][places].astype(dtype), layer[1]
        delta = (change.u[places] * change.values) @ change.v
        merged = (kernel.astype(jnp.float32) + delta).astype(dtype)
        kept = merged.astype(jnp.float32) - kernel.astype(jnp.float32)
        size = jnp.linalg.norm(delta)
        touched = delta != 0
        unmoved = (touched & (merged == kernel)).sum() / jnp.maximum(touched.sum(), 1)
        lost = jnp.linalg.norm(kept - delta) / jnp.where(size > 0, size, 1.0)  # 0 / 1 for no change
        return jnp.stack([lost, unmoved])

    return jax.lax.map(one, (kernels, change))
