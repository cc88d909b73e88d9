"""Measurements that a method takes where the model runs, in training steps only."""

import functools
from collections.abc import Callable
from typing import Any

import jax

Tree = Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def measured(measure: Callable, value: Tree, probe: Tree, known: Tree) -> Tree:
    """`value` as it is; where it is differentiated, the "gradient" of `probe` is a measurement.

    A method's `forward` calls it where the leaves of its `Method.probe` are among the factors; the step hands what
    was measured to `Method.advance`. Nothing is measured where `value` has no part in the loss.

    Args:
      measure: `(cotangent of value, probe, known) → a tree like probe`; holds no arrays of its own.
      value: what is passed on, whose cotangent may be measured.
      probe: floating-point leaves.
      known: what else to measure or to measure with; no gradient reaches it.

    >>> import jax.numpy as jnp
    >>> loss = lambda x, probe: (3 * measured(lambda slope, probe, known: slope + known, x, probe, 10.0)).sum()
    >>> [float(each) for each in jax.grad(loss, argnums=(0, 1))(2.0, 0.0)]
    [3.0, 13.0]
    """
    return value


def _forward(measure: Callable, value: Tree, probe: Tree, known: Tree) -> tuple:
    return value, (probe, known)


def _backward(measure: Callable, kept: tuple, cotangent: Tree) -> tuple:
    return cotangent, measure(cotangent, *kept), None


measured.defvjp(_forward, _backward)
