"""Rows of an embedding trained whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters
from third_party import Tied

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError


def rows_of(make, **options):
    graphdef, base = parameters(make)
    method = vj.TokenRows(**options)
    start = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)
    return graphdef, base, start


def test_the_rows_start_as_the_base_s_and_are_replaced():
    graphdef, base, start = rows_of(lambda rngs: nnx.Embed(7, 4, rngs=rngs), indices=[5, 1], targets=".*")
    table = np.array(base["embedding"].get_value())
    np.testing.assert_array_equal(start.factors("")["rows"], table[[5, 1]])
    adapter = moved(start)
    table[[5, 1]] = adapter.factors("")["rows"]
    close(jax.jit(lambda: vj.apply(graphdef, base, adapter, jnp.array([[0, 5], [1, 1]])))(), table[[[0, 5], [1, 1]]])


def test_a_head_that_shares_the_embedding_sees_the_rows():
    graphdef, base, start = rows_of(Tied, indices=(2,), targets="embed")
    adapter, ids = moved(start), jnp.array([[0, 2]])
    bound, merged = jax.jit(
        lambda: (vj.apply(graphdef, base, adapter, ids), vj.apply(graphdef, vj.merge(base, adapter), None, ids))
    )()
    close(bound, merged)
    assert np.abs(bound - vj.apply(graphdef, base, None, ids)).max() > 1e-2


def test_only_the_rows_have_a_gradient():
    graphdef, base, start = rows_of(lambda rngs: nnx.Embed(7, 4, rngs=rngs), indices=(0, 6), targets=".*")
    loss = lambda t: vj.apply(graphdef, base, start.with_trainable(t), jnp.array([6, 6, 3])).sum()
    gradient = flatten(jax.jit(jax.grad(loss))(start.trainable))["sites//rows"]
    np.testing.assert_array_equal(gradient, np.array([[0.0] * 4, [2.0] * 4]))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ((), "indices is empty"),
        ((7,), "indices has 7; .*has 7 rows"),
        ((1, 1), "has a row twice"),
        ((-1,), "has -1; rows count from 0"),
        ((1.5,), "an entry of indices is 1.5; it must be a whole number"),
    ],
)
def test_rows_that_are_not_there_are_refused(unchecked, indices, message):
    with pytest.raises(ConfigError, match=message):
        rows_of(lambda rngs: nnx.Embed(7, 4, rngs=rngs), indices=indices, targets=".*")
