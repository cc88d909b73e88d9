"""A linear layer's call seen as matrices, whatever the layer's axes: what methods are written for."""

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.sites import Site


@dataclass(frozen=True)
class Lookup:
    """The input of an embedding: `x @ A` takes the rows `ids` of A, as a product with one-hot rows would."""

    ids: Array
    dtype: Any

    def __matmul__(self, table: Array) -> Array:
        return jnp.take(table, self.ids, axis=0)


@dataclass(frozen=True)
class View:
    """Input `(tokens, in)`, output without bias `(tokens, out)`, and the way back to the output's own shape."""

    x: Array | Lookup
    y: Array
    restore: Callable[[Array], Array]

    def dropped(self, rate: float, key: PRNGKeyArray, kernel: Array | None) -> "View":
        """With a share of its inputs dropped, which the ids of an embedding know nothing of.

        Args:
          kernel: `(in, out)`, where the output shall be that of the inputs that are left; else it stays as it is.
        """
        if isinstance(self.x, Lookup):
            return self
        x = dropout(self.x, rate, key)
        return View(x, self.y if kernel is None else x @ kernel.astype(x.dtype), self.restore)


def lookup_view(site: Site, ids: Array, y: Array) -> View:
    """An embedding `y = table[ids]`."""
    return View(Lookup(ids.reshape(-1), y.dtype), y.reshape(-1, site.out_dim), lambda change: change.reshape(y.shape))


def dense_view(site: Site, x: Array, y: Array, axes: tuple[int, ...], bias: Array | None) -> View:
    """A dense layer that contracts `axes` of `x`, in the order in which `x` has them, and appends its output axes."""
    sources = sorted(axis % x.ndim for axis in axes)  # the kernel's input axes follow this order, whatever `axes` has
    flat = jnp.moveaxis(x, sources, tuple(range(-len(axes), 0))).reshape(-1, site.in_dim).astype(y.dtype)
    bare = y.reshape(-1, site.out_dim)
    if bias is not None:
        bare = bare - bias.reshape(-1).astype(y.dtype)
    return View(flat, bare, lambda change: change.reshape(y.shape))


def einsum_view(site: Site, x: Array, y: Array, equation: str, bias: Array | None) -> View:
    """An einsum layer, `"btd,ndh->btnh"`; `...` stands for any leading axes."""
    equation = equation.replace(" ", "")
    if "..." in equation:
        named = len(equation.split(",")[0].replace("...", ""))
        unused = [name for name in string.ascii_letters if name not in equation]
        equation = equation.replace("...", "".join(unused[: x.ndim - named]))
    terms, result = equation.split("->")
    inputs, kernel = terms.split(",")
    batch = "".join(name for name in inputs if name not in kernel)
    contracted = "".join(kernel[axis] for axis in site.inputs)
    emitted = "".join(kernel[axis] for axis in site.outputs)
    sizes = dict(zip(inputs, x.shape, strict=True)) | dict(zip(emitted, site.out_shape, strict=True))
    bare = y
    if bias is not None:
        bare = y - bias.reshape(tuple(sizes[name] if name in emitted else 1 for name in result)).astype(y.dtype)
    return View(
        jnp.einsum(f"{inputs}->{batch}{contracted}", x).reshape(-1, site.in_dim).astype(y.dtype),
        jnp.einsum(f"{result}->{batch}{emitted}", bare).reshape(-1, site.out_dim),
        lambda change: jnp.einsum(
            f"{batch}{emitted}->{result}", change.reshape(tuple(sizes[name] for name in batch + emitted))
        ),
    )


def thin(x: Array | Lookup, a: Array) -> Array:
    """`x @ a` for a narrow `a (in, r)`, in x's dtype.

    The barrier keeps a transposed `a` in the program, so that its gradient is the product `gᵀ x (r, in)`. Left to
    itself XLA asks for `xᵀ g (in, r)`, which runs at a sixth of the speed on CPU and costs a LoRA step 15 %.
    """
    if isinstance(x, Lookup):
        return (x @ a).astype(x.dtype)
    turned = jax.lax.optimization_barrier(a.T).astype(x.dtype)
    return jax.lax.dot_general(x, turned, (((1,), (1,)), ((), ())))


def dropout(x: Array, rate: float, key: PRNGKeyArray) -> Array:
    """`x` with a share `rate` of its entries zeroed and the others scaled by 1 / (1 - rate)."""
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
