"""Vertical to dense: ordinary parameters for any other model code."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from vlora_jax.adapters.sites import Site, split
from vlora_jax.adapters.trees import Tree
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.run import Increments, effective_kernel


def dense_kernels(vertical: Vertical, site: Site, kernel: Array, increments: Increments) -> Array:
    """Every layer's own kernel, `(layers, in, out)` in float32.

    Args:
      site: the shared kernel, by its path in a block.
      kernel: base kernels `(compounds, in, out)`.
      increments: of all targets, `(compounds, increments, …)`.
    """
    compounds = kernel.shape[0]
    methods = [method.for_site(site) for method in vertical.methods]
    tensors = [increments[method.name][site.path] for method in methods]

    def one(kernel: Array, tensors: list, index: Array) -> Array:
        if not methods:
            return kernel
        full = effective_kernel(vertical, kernel, methods, tensors, index)
        return full if vertical.adapter_on_base else jnp.where(index > 0, full, kernel)

    over_layers = jax.vmap(one, in_axes=(None, None, 0))
    grid = jax.vmap(over_layers, in_axes=(0, 0, None))
    kernels = grid(kernel.astype(jnp.float32), tensors, jnp.arange(vertical.size))
    return vertical.ungrid(kernels.reshape(compounds, vertical.size, *kernels.shape[2:]))


def expand(graphdef: nnx.GraphDef, base: Tree) -> tuple[nnx.GraphDef, nnx.State]:
    """The dense twin of a vertical model: same function, one kernel a layer, at the same paths.

    Adapters trained on the vertical model fit the dense one as they are, and can be merged into it.

    Returns:
      Graph and parameters as from `vlora_jax.split`; a model without vertical stacks comes back unchanged.
    """
    model = nnx.merge(graphdef, base)
    module: Any
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "densify"):
            module.densify()
    note_in_configs(model, None)
    return split(model)


def note_in_configs(model: nnx.Module, vertical: Vertical | None) -> None:
    """Let the configs that a model carries say what its stacks have become: built from one, it is the same model."""
    module: Any
    for _, module in nnx.iter_modules(model):
        config: Any = getattr(module, "config", None)
        if "vertical" in getattr(type(config), "model_fields", ()):
            module.config = config.model_copy(update={"vertical": vertical})
