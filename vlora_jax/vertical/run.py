"""The forward pass of a vertical stack: nested scans over compounds and the layers inside them."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.bind import Part, attach, child, innermost
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Site
from vlora_jax.vertical.config import Vertical

Increments = dict[str, dict[str, FactorDict]]  # method name → target → tensors
Wrap = Callable[[Callable], Callable]


class BaseKernel(nnx.Param):
    """A kernel that all layers of a compound share: `(compounds, …)`, where other parameters have every layer."""


@dataclass(frozen=True)
class Plan:
    """The static side of a vertical stack.

    Attributes:
      sites: the shared kernels, by their path in a block.
      factored: targets whose increments are applied as factors; the others build their kernel.
      remat, compound_remat: wrap one layer, and one compound (of a cycle: one pass), for rematerialisation.
      written_out: a compound's layers follow each other in the program instead of running in a loop.
    """

    vertical: Vertical
    sites: tuple[Site, ...]
    factored: frozenset[str]
    remat: Wrap
    compound_remat: Wrap
    written_out: bool


def run(plan: Plan, block: nnx.Module, increments: Increments, h: Any, call: Callable, each: Any = None) -> Any:
    """Apply all layers of a vertical stack.

    Args:
      block: the stacked block; `BaseKernel`s carry compounds first, all else layers first.
      increments: tensors `(compounds, increments, …)`.
      h: what the first layer receives.
      call: `(block, h, own part of each) → h`, one layer.
      each: a pytree of `(layers, …)`, or None.
    """
    vertical, remat, outer = plan.vertical, plan.remat, plan.compound_remat
    graphdef, kernels, own = nnx.split(block, BaseKernel, ...)
    depth = jax.tree.leaves(kernels)[0].shape[0] * vertical.size
    own = jax.tree.map(lambda leaf: vertical.grid(leaf, depth), (own, each))
    # Only a compound's first layer differs from the others; where it does not, one scan serves them all.
    peel = bool(vertical.methods) and (vertical.detached or not vertical.adapter_on_base)
    later = jnp.arange(int(peel), vertical.size)

    def layer(first: bool, h: Any, kernels: nnx.State, own: tuple, tensors: Increments, index: Array | int) -> Any:
        if vertical.detached and not first:
            kernels = jax.lax.stop_gradient(kernels)
        module = nnx.merge(graphdef, kernels, own[0])
        if vertical.methods and (vertical.adapter_on_base or not first):
            module = with_increments(plan, module, tensors, index)
        return call(module, h, own[1])

    first_layer, later_layer = (remat(functools.partial(layer, first)) for first in (True, False))

    def compound(h: Any, inputs: tuple) -> tuple:
        kernels, own, tensors = inputs
        if peel:
            h = first_layer(h, kernels, jax.tree.map(lambda leaf: leaf[0], own), tensors, 0)
        if plan.written_out:
            for index in range(int(peel), vertical.size):
                h = later_layer(h, kernels, jax.tree.map(lambda leaf: leaf[index], own), tensors, index)  # noqa: B023
            return h, None
        step = lambda h, inputs: (later_layer(h, kernels, inputs[1], tensors, inputs[0]), None)
        return jax.lax.scan(step, h, (later, jax.tree.map(lambda leaf: leaf[int(peel) :], own)))

    def one_pass(one_layer: Callable, h: Any, inputs: tuple) -> tuple:
        index, own = inputs
        step = lambda h, inputs: (one_layer(h, *inputs, index), None)
        return jax.lax.scan(step, h, (kernels, own, increments))

    if vertical.pattern == "sequence":
        return jax.lax.scan(outer(compound), h, (kernels, own, increments))[0]
    by_pass = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), own)
    if peel:
        h, _ = outer(functools.partial(one_pass, first_layer))(h, (0, jax.tree.map(lambda leaf: leaf[0], by_pass)))
    rest = (later, jax.tree.map(lambda leaf: leaf[int(peel) :], by_pass))
    return jax.lax.scan(outer(functools.partial(one_pass, later_layer)), h, rest)[0]


def with_increments(plan: Plan, module: nnx.Module, tensors: Increments, index: Array | int) -> nnx.Module:
    """One layer with its increments: attached as factors, or added into its kernels.

    Args:
      tensors: those of the layer's compound, `(increments, …)`.
      index: the layer's place in its compound.
    """
    vertical, parts = plan.vertical, {}
    for site in plan.sites:
        methods = [method.for_site(site) for method in vertical.methods]
        of_site = [tensors[method.name][site.path] for method in methods]
        if site.path in plan.factored:
            own = [factors_of(vertical, method, each, index) for method, each in zip(methods, of_site, strict=True)]
            parts[site.path] = (site, [Part(method, each, {}) for method, each in zip(methods, own, strict=True)])
        else:
            layer = innermost(child(module, site.path))
            stored = getattr(layer, site.leaf).get_value()
            matrix = effective_kernel(vertical, site.matrix(stored), methods, of_site, index)
            setattr(layer, site.leaf, nnx.Param(site.kernel(matrix).astype(stored.dtype)))
    return attach(module, parts)


def factors_of(vertical: Vertical, method: Method, tensors: FactorDict, index: Array | int) -> FactorDict:
    """Factors of all that layer `index` adds to the base: one increment in a star, a prefix of them in a chain."""
    if vertical.structure == "star":
        return jax.tree.map(lambda leaf: leaf[_place(vertical, index)], tensors)
    return method.sum_factors(_own_gradient(vertical, tensors, index), _reach(vertical, index))


def effective_kernel(
    vertical: Vertical, kernel: Array, methods: Sequence[Method], tensors: Sequence[FactorDict], index: Array | int
) -> Array:
    """`K_i (in, out)` in float32 of layer `index` of a compound.

    Args:
      kernel: the compound's base kernel `(in, out)`.
      tensors: of each method, `(increments, …)`.
    """
    kernel = kernel.astype(jnp.float32)
    if vertical.structure == "star":
        own = [jax.tree.map(lambda leaf: leaf[_place(vertical, index)], each) for each in tensors]
        return kernel + sum(method.delta(kernel, each) for method, each in zip(methods, own, strict=True))

    def step(kernel: Array, inputs: tuple) -> tuple:
        within, tensors = inputs
        change = sum(method.delta(kernel, each) for method, each in zip(methods, tensors, strict=True))
        return kernel + within * change, None

    prefix = [_own_gradient(vertical, each, index) for each in tensors]
    return jax.lax.scan(step, kernel, (_reach(vertical, index), prefix))[0]


def _place(vertical: Vertical, index: Array | int) -> Array | int:
    """Where layer `index` of a compound finds its own increment."""
    return index if vertical.adapter_on_base else index - 1


def _reach(vertical: Vertical, index: Array | int) -> Array:
    """1 for the increments that a chain's layer `index` contains, 0 for the later ones."""
    return (jnp.arange(vertical.increments) <= _place(vertical, index)).astype(jnp.float32)


def _own_gradient(vertical: Vertical, tensors: FactorDict, index: Array | int) -> FactorDict:
    """A chain's increments as layer `index` sees them: under `detach=prev` only its own has a gradient."""
    if vertical.detach != "prev":
        return tensors
    own = jnp.arange(vertical.increments) == _place(vertical, index)

    def mask(leaf: Array) -> Array:
        mine = own.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(mine, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map(mask, tensors)
