"""Elementwise steps of a block: activations and norms, keeping nothing for their gradients but their arguments."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


def light(function: Callable) -> Callable:
    """`function` with nothing kept for its gradient but its arguments: the rest is computed again, which is cheap here.

    Elementwise steps would otherwise keep a stacked array each, which costs more to write and read than to repeat.
    """
    lean = jax.custom_vjp(function)

    def backward(arguments: tuple, slope: Array) -> tuple:
        return jax.vjp(function, *arguments)[1](slope)

    lean.defvjp(lambda *arguments: (function(*arguments), arguments), backward)
    return lean


def _gate(activation: Callable) -> Callable:
    return light(lambda gate, up: activation(gate) * up)


GATED = {name: _gate(activation) for name, activation in ACTIVATIONS.items()}
PLAIN = {name: light(activation) for name, activation in ACTIVATIONS.items()}


def normalised(
    eps: float, offset: float, dtype: Any, x: Float[Array, "*batch width"], scale: Any, bias: Any
) -> Float[Array, "*batch width"]:
    """Layer norm if there is a bias, else root-mean-square norm, in float32; the result in `dtype`, or that of `x`."""
    y, lead = x.astype(jnp.float32), (None,) * (x.ndim - 1)
    if bias is not None:
        y = y - y.mean(axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(axis=-1, keepdims=True) + eps)
    y = y * (scale.astype(jnp.float32) + offset)[lead]
    if bias is not None:
        y = y + bias.astype(jnp.float32)[lead]
    return y.astype(dtype or x.dtype)
