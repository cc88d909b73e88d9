"""Factorisations under `jax.vmap` are the batch's, and loop over single matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlora_jax import DeepLoRA, Site
from vlora_jax.adapters.factorise import qr, singular_values, svd, triangle


def lapack_batches(function, *arguments):
    """Sizes of the batches that a compiled program gives to LAPACK."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    calls = [line for line in text.splitlines() if 'custom_call_target="lapack' in line]
    assert calls
    shapes = [line.split("custom-call(")[0].split("[", 1)[1].split("]")[0].split(",") for line in calls]
    return {int(np.prod([int(side) for side in shape[:-2]], dtype=int)) for shape in shapes}


@pytest.mark.parametrize("function", [qr, triangle, svd, singular_values])
def test_a_batch_is_factorised_one_matrix_at_a_time(function):
    """A batch given to LAPACK as one can lock the pool of threads up."""
    matrices = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    over = jax.vmap(jax.vmap(function))
    found = jax.jit(over)(matrices)
    alone = [function(matrix) for matrix in matrices.reshape(6, 5, 4)]
    again = jax.tree.map(lambda *each: jnp.stack(each).reshape(2, 3, *each[0].shape), *alone)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, again)
    assert lapack_batches(over, matrices) == {1}


def test_the_start_of_deep_lora_draws_one_matrix_at_a_time():
    site = Site("layers/q", "kernel", "dense", (6,), (8, 8), (0,), (1,))
    start = lambda key: DeepLoRA(rank=4).init_stack(key, site).trainable
    assert lapack_batches(start, jax.random.key(0)) == {1}
