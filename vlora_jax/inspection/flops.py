"""Matrix-product FLOPs of a traced program: scans as often as they run, kernels over their whole grid."""

import math
from typing import Any

import jax

CAUSAL = "splash"  # kernels that skip the blocks above the diagonal


def matmul_flops(jaxpr: Any, times: float = 1) -> float:
    """FLOPs (2 a multiply-add) of all matrix products that a program executes, over all devices.

    Of branches the dearest counts. A Pallas kernel counts for each place of its grid; of a causal attention kernel,
    which skips the blocks above the diagonal, half of that.

    Args:
      jaxpr: `jax.make_jaxpr(f)(*args).jaxpr`.

    >>> import jax.numpy as jnp
    >>> f = lambda x: jax.lax.scan(lambda h, _: (h @ h, None), x, length=5)[0]
    >>> matmul_flops(jax.make_jaxpr(f)(jnp.ones((8, 8))).jaxpr) == 5 * 2 * 8**3
    True
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
            total += times * 2 * math.prod(out) * math.prod(left[axis] for axis in contracted)
            continue
        inner = [matmul_flops(part, times * _times(name, params)) for part in _parts(params)]
        total += max(inner, default=0.0) if name == "cond" else sum(inner)
    return total


def _times(name: str, params: dict[str, Any]) -> float:
    if name == "scan":
        return params["length"]
    if name == "shard_map":
        axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
        return math.prod(params["mesh"].shape[axis] for axis in axes)
    if name == "pallas_call":
        grid = math.prod(params["grid_mapping"].grid)
        return grid / 2 if CAUSAL in str(params.get("name", "")) else grid
    return 1


def _parts(params: dict[str, Any]) -> list[Any]:
    """The programs inside an equation."""
    is_program = lambda value: hasattr(value, "jaxpr") or hasattr(value, "eqns")
    leaves = jax.tree.leaves(list(params.values()), is_leaf=is_program)
    return [getattr(leaf, "jaxpr", leaf) for leaf in leaves if is_program(leaf)]
