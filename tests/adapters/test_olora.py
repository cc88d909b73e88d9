"""OLoRA: its start from the QR decomposition of the transposed kernel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close

import vlora_jax as vj
from vlora_jax.adapters.sites import Site


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)])
def test_b_has_orthonormal_rows_and_the_start_takes_the_first_outputs_off_whole(shape):
    """With Q R = Wᵀ and R upper triangular, the first r columns of Wᵀ (inputs) are Q_r R_r exactly."""
    kernel = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    site = Site("up", "kernel", "dense", (2,), shape, (0,), (1,))
    init = jax.jit(vj.OLoRA(rank=3, alpha=6.0).init_stack, static_argnums=1)
    factors = init(jax.random.key(0), site, jnp.asarray(kernel))
    for layer in range(2):
        a, b = (np.asarray(factors.trainable[name][layer]) for name in "ab")
        close(b @ b.T, np.eye(3), 1e-5)
        q, r = np.linalg.qr(kernel[layer].astype(np.float64).T)
        close(a @ b, (q[:, :3] @ r[:3]).T, 1e-5)
        close((a @ b)[:3], kernel[layer, :3], 1e-5)
        close(a, kernel[layer] @ b.T, 1e-5)
        assert np.abs(a @ b - kernel[layer]).max() > 0.1
