"""What a layer keeps for its backward pass: products, and what is named here; elementwise steps are repeated.

An array that a scan over layers keeps is written into a stack and read from it again, which costs more than most
elementwise steps take.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

KEPT = "kept"
REPEATED = frozenset(
    """
    abs add and broadcast_in_dim clamp concatenate convert_element_type copy cos div eq erf erf_inv erfc exp exp2
    expand_dims expm1 ge gt integer_pow iota le log log1p logistic lt max min mul ne neg not optimization_barrier or pad
    pow reduce_precision reshape rsqrt select_n shift_right_logical sign sin slice split sqrt square squeeze
    stop_gradient sub tanh transpose
    """.split()  # noqa: SIM905  a list literal would take a line a word
)


def keep(x: Array) -> Array:
    """`x`, to be kept for the backward pass although an elementwise step made it."""
    return checkpoint_name(x, KEPT)


def keeps(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """A policy for `jax.checkpoint`: keep all but the results of elementwise steps that no one has named."""
    if primitive.name == "name":
        return parameters["name"] == KEPT
    if primitive.name == "sharding_constraint" and len(arguments[0].shape) == 2:
        return False  # a layer's quantised kernel, gathered: kept, it would be there for all layers on every device
    return primitive.name not in REPEATED


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def times_built(delta: Callable, x: Array, kernel: Array, factors: Any) -> Array:
    """`x @ delta(kernel, factors)` in x's dtype, for methods that must build ΔW.

    The backward pass builds it again, whatever a policy keeps: a scan would otherwise keep one of every layer.
    """
    return x @ delta(kernel, factors).astype(x.dtype)


def _built(delta: Callable, x: Array, kernel: Array, factors: Any) -> tuple[Array, tuple]:
    return times_built(delta, x, kernel, factors), (x, kernel, factors)


def _built_again(delta: Callable, kept: tuple, slope: Array) -> tuple:
    return jax.vjp(lambda x, kernel, factors: x @ delta(kernel, factors).astype(x.dtype), *kept)[1](slope)


times_built.defvjp(_built, _built_again)
