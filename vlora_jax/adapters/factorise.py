"""QR and SVD of one matrix; under `jax.vmap` one matrix after the other.

On CPU jaxlib hands the matrices of a batch to the threads of the pool in which it runs itself, and waits for them:
where as many such calls of one program run at once as there are threads, none of them ever ends (seen with jaxlib
0.10.2 on two cores, in the start of a Deep LoRA). A loop over single matrices asks for no other thread.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

one_at_a_time: Callable = jax.custom_batching.sequential_vmap


@one_at_a_time
def qr(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    """Q and R, k the smaller side."""
    q, r = jnp.linalg.qr(matrix)
    return q, r


@one_at_a_time
def triangle(matrix: Float[Array, "m n"]) -> Float[Array, "k n"]:
    """R alone."""
    return jnp.linalg.qr(matrix, mode="r")


@one_at_a_time
def svd(matrix: Float[Array, "m n"]) -> tuple[Float[Array, "m k"], Float[Array, " k"], Float[Array, "k n"]]:
    """U, the singular values, largest first, and Vᵀ."""
    u, values, v = jnp.linalg.svd(matrix, full_matrices=False)
    return u, values, v


@one_at_a_time
def singular_values(matrix: Float[Array, "m n"]) -> Float[Array, " k"]:
    """Largest first."""
    return jnp.linalg.svd(matrix, compute_uv=False)
