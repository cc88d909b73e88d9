"""What a traced program holds, and parameters by NumPy, so that nothing compiles for them."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

import vlora_jax as vj


def parameters(make: Any, seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """Graph and random parameters of the model that `make(rngs)` builds."""
    graphdef, shapes = vj.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return graphdef, filled(shapes, seed)


def filled(shapes: Any, seed: int = 0) -> Any:
    """Normal values for every leaf, none of them at its special start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(leaf.dtype), shapes)


def equations(program: Any) -> Iterator[Any]:
    """Every equation of a program from `jax.make_jaxpr`, those of loops and inner functions too."""
    is_program = lambda node: hasattr(node, "eqns")
    for equation in program.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from equations(inner)
