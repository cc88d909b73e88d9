"""An adapter's changes site by site: from the factors wherever there are any, one layer in memory at a time."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.factorise import svd
from vlora_jax.adapters.method import Method, one_by_one
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.svd import product_svd
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import BaseMismatchError, ConversionError, nearest


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Change:
    """What one kernel is changed by in all its layers, as thin SVDs: ΔW = u diag(values) v.

    Attributes:
      u: `(layers, in, k)`, orthonormal columns; a single layer has no axis of layers.
      values: `(layers, k)`, largest first.
      v: `(layers, k, out)`, orthonormal rows.
    """

    u: Float[Array, "*layers in k"]
    values: Float[Array, "*layers k"]
    v: Float[Array, "*layers k out"]


@dataclass(frozen=True)
class Part:
    """What an adapter has at one site.

    Attributes:
      method: as it is there.
      leaves: the base's parameters by path; None if it is not at hand.
      own, shared: the tensors of the site, layer axes first, and those that it shares with others.
    """

    site: Site
    method: Method
    leaves: dict[str, Any] | None
    own: FactorDict
    shared: FactorDict

    @property
    def layers(self) -> tuple[int | None, ...]:
        """Number of each layer in its stack; one None for a kernel that is not stacked."""
        return tuple(range(self.site.layers)) if self.site.stack else (None,)

    @property
    def kernel(self) -> Float[Array, "*stack in out"] | None:
        """The base's kernel, read anew at each call; None if the base is not at hand."""
        return None if self.leaves is None else self.site.read(self.leaves)

    @property
    def factored(self) -> bool:
        """Whether the change is a product of two thin factors, for which no kernel is needed."""
        layer_of = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[len(self.site.stack) :], leaf.dtype)
        one = jax.tree.map(layer_of, self.own)
        shape = (self.site.in_dim, self.site.out_dim)
        return jax.eval_shape(lambda own: self.method.low_rank(shape, own | self.shared), one) is not None

    @property
    def kernels(self) -> Float[Array, "layers in out"]:
        """The base's kernels with one axis of layers.

        Raises:
          ConversionError: the base is not at hand.
        """
        kernel = self.kernel
        if kernel is None:
            raise ConversionError(f"{self.site.path}: its kernel is needed, and the base is not at hand")
        return kernel.reshape(-1, self.site.in_dim, self.site.out_dim)

    def each(self, of_product: Callable, of_matrix: Callable) -> Array | tuple | None:
        """`of_product(left, right)` of each layer's factors, or `of_matrix(ΔW)` where the method has none.

        The functions must be the same objects from call to call: programs are kept by them.

        Returns:
          What they return with `(layers, …)` in front; None if there are neither factors nor a base.
        """
        shape = (self.site.in_dim, self.site.out_dim)
        kernel = None if self.factored else self.kernel
        found = _each(of_product, of_matrix, self.method, self.site.stack, shape, kernel, self.own, self.shared)
        return jax.tree.map(lambda leaf: leaf.reshape(self.site.layers, *leaf.shape[len(self.site.stack) :]), found)


def parts(base: Tree | None, adapter: Adapter) -> Iterator[Part]:
    """What an adapter has at each of its sites; nothing of one whose changes depend on the input.

    Args:
      base: the parameters it changes; of a vertical model, those of its dense twin (`vlora_jax.expand`).

    Raises:
      BaseMismatchError: the base lacks a site of the adapter.
    """
    leaves = None if base is None else flatten(base)
    for site in adapter.sites if adapter.method.mergeable else ():
        if leaves is not None and site.leaf_path not in leaves:
            near = ", ".join(nearest(site.leaf_path, leaves))
            raise BaseMismatchError(f"the adapter changes {site.leaf_path}; nearest parameters of this base: {near}")
        method = adapter.method.for_site(site)
        yield Part(site, method, leaves, adapter.factors(site.path), adapter.shared_at(site.path))


def changes(base: Tree | None, adapter: Adapter) -> Iterator[tuple[Part, Change]]:
    """The change at each site, one in memory at a time.

    From factors that costs O((in + out)·r²) a layer; a method without them needs the base and an SVD of each ΔW,
    O(in·out·min(in, out)).

    Raises:
      ConversionError: the change depends on the input, or a method without factors lacks its base.
      BaseMismatchError: the base lacks a site of the adapter.
    """
    if not adapter.method.mergeable:
        raise ConversionError(f"{adapter.method.name} depends on the input: it has no ΔW that could be looked at")
    for part in parts(base, adapter):
        found = part.each(_product_svd, svd)
        if found is None:
            raise ConversionError(
                f"{part.site.path}: {part.method.name} has no factors, so its ΔW needs the base, which is not at hand"
            )
        yield part, Change(*found)


def _product_svd(left: Array, right: Array) -> tuple:
    return product_svd(left.astype(jnp.float32), right.astype(jnp.float32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _each(
    of_product: Callable,
    of_matrix: Callable,
    method: Method,
    stack: tuple[int, ...],
    shape: tuple[int, ...],
    kernel: Array | None,
    factors: FactorDict,
    shared: FactorDict,
) -> Array | tuple | None:
    """`Part.each`, with the stack's axes in front."""

    def one(_: Array, kernel: Array | None, factors: FactorDict) -> Array | tuple | None:
        pair = method.low_rank(shape, factors | shared)
        if pair is not None:
            return of_product(*pair)
        if kernel is None:
            return None
        return of_matrix(method.delta(kernel.astype(jnp.float32), factors | shared).astype(jnp.float32))

    layers = jnp.zeros(stack)  # all that has a layer axis, where neither kernel nor tensors of its own do
    return one_by_one(one, len(stack))(layers, kernel, factors)
