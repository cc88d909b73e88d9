"""Activations stay split over the batch, whatever XLA would make of kernels that are split over the same devices.

A kernel's inputs lie over `fsdp`, as the batch does. Left alone, XLA gathers the activations of the whole batch and
adds up partial products of them, as large as all activations; told that they stay split, it gathers the kernel.

Where it is asked for (`lengths_split`), what a block's branches are added to is split over `tensor` as well, along the
length, and so are the norms: what the devices of `tensor` would each hold and compute alike (arXiv 2205.05198, section
4.2.2). A branch begins with gathering and ends with a sum of which each device receives its part.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P

from vlora_jax.adapters.quantized import Quantized
from vlora_jax.distributed.mesh import BATCH_AXES
from vlora_jax.distributed.within import automatic, batch_axes, batch_ways

A = TypeVar("A", bound=jax.Array)

_asked = ContextVar("whether lengths are split", default=False)


@contextmanager
def lengths_split() -> Iterator[None]:
    """Split lengths over `tensor` between the branches of the blocks that are traced inside."""
    before = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(before)


def by_row(x: A) -> A:
    """`x` with its first axis, the batch, split over `data` and `fsdp` of the mesh in use, and nothing else."""
    return constrained(x) if applies(x) or by_length(x) else x


def between(x: A) -> A:
    """`x (batch, length, width)`, which is added to what a block's branches are added to, as that lies."""
    return along(x) if by_length(x) else by_row(x)


def after_layers(h: Any) -> Any:
    """What a loop over layers gives, a pytree, as its blocks' branches lie, and so its gradient.

    Pins within the loop don't reach here. Where all three mesh axes are split, XLA's partitioner (jaxlib 0.10.2) then
    makes a wrong gradient of a norm that follows: of its scale and its argument, so of all that comes before.
    """
    return jax.tree.map(between, h)


def along(x: A) -> A:
    """`x (batch, length, width)` split by rows and along its length, where that is asked for."""
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, "tensor")) if by_length(x) else x


def whole(x: A) -> A:
    """The reverse of `along`."""
    return constrained(x) if by_length(x) else x


def looked_up(x: A) -> A:
    """Rows `(batch, length, features)` of an embedding table, whose features lie over `fsdp`, split over the batch.

    In two steps, of which each is one exchange; XLA would put all of it on every device in between.
    """
    if applies(x) and x.shape[-1] % jax.sharding.get_abstract_mesh().shape["fsdp"] == 0:
        x = jax.lax.with_sharding_constraint(x, P("data", None, "fsdp"))
    return by_row(x)


def gathered(kernel: Quantized) -> Quantized:
    """One layer's quantised kernel on every device of `fsdp`; over `tensor` it stays split.

    XLA would decode what each device has and gather the values: of bfloat16 four times the bytes of NF4's codes.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if sizes.get("fsdp", 1) == 1 or not automatic():
        return kernel
    axis = 0 if kernel.closing else 1  # which of inputs and outputs lies over `tensor`

    def lie(part: A) -> A:
        fits = kernel.grain[axis] % sizes["tensor"] == 0 == part.shape[axis] % sizes["tensor"]
        return jax.lax.with_sharding_constraint(part, P(*(None,) * axis, "tensor") if fits else P())

    return dataclasses.replace(kernel, codes=lie(kernel.codes), scale=lie(kernel.scale))


def constrained(x: A) -> A:
    return jax.lax.with_sharding_constraint(x, P(batch_axes()))


def applies(x: jax.Array) -> bool:
    """Whether there is a mesh with the axes in question, and the batch divides."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return sizes.get("fsdp", 1) > 1 and divides(x)


def by_length(x: jax.Array) -> bool:
    """Whether lengths are to be split, and batch and length divide."""
    ways = jax.sharding.get_abstract_mesh().shape.get("tensor", 1)
    return _asked.get() and ways > 1 and x.ndim == 3 and x.shape[1] % ways == 0 and divides(x)


def divides(x: jax.Array) -> bool:
    """Whether there is a batch and it can be split, by the compiler, over the devices that share it."""
    return x.ndim > 0 and x.shape[0] % batch_ways() == 0 and automatic()
