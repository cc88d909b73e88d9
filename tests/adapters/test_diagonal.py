"""The trained diagonal against explicit matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, parameters, random_adapter

import vlora_jax as vj


@pytest.mark.parametrize("sides", [(4, 4), (4, 6), (6, 4)])
def test_the_main_diagonal_is_added(sides):
    graphdef, base = parameters(lambda rngs: nnx.Linear(*sides, rngs=rngs))
    adapter = random_adapter(vj.Diagonal(), base)
    assert vj.count(adapter) == min(sides)
    delta = np.zeros(sides)
    np.fill_diagonal(delta, adapter.factors("")["d"])
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, sides[0])), jnp.float32)
    out, merged = jax.jit(lambda: (vj.apply(graphdef, base, adapter, x), vj.merge(base, adapter)))()
    kernel = np.asarray(base["kernel"].get_value())
    close(out, x @ (kernel + delta) + base["bias"].get_value())
    close(merged["kernel"].get_value(), kernel + delta)


def test_an_embedding_has_it_in_its_first_rows():
    graphdef, base = parameters(lambda rngs: nnx.Embed(5, 3, rngs=rngs))
    adapter = random_adapter(vj.Diagonal(targets=".*"), base)
    out = jax.jit(lambda: vj.apply(graphdef, base, adapter, jnp.array([0, 2, 4])))()
    table, d = np.array(base["embedding"].get_value()), adapter.factors("")["d"]
    close(out, table[[0, 2, 4]] + np.array([[d[0], 0, 0], [0, 0, d[2]], [0, 0, 0]]))


def test_it_starts_at_zero_in_every_layer():
    base = {"up": {"kernel": jnp.ones((4, 6))}}
    np.testing.assert_array_equal(vj.init(vj.Diagonal(), jax.random.key(0), base).factors("up")["d"], np.zeros(4))
