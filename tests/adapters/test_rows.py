"""Rows of a batch with an adapter each: the same as a call for each row, for every method of the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, mostly_slow, moved
from test_methods import small, tower

import vlora_jax as vj
from vlora_jax.adapters.registry import METHODS

QUICK = ("lora", "dora", "ia3", "vera", "tied_lora")


@pytest.mark.parametrize("name", mostly_slow([name for name, method in METHODS.items() if method.on_sites], QUICK))
def test_rows_with_an_adapter_each_are_calls_one_by_one(name):
    graphdef, base = tower(name)
    adapters = [moved(vj.init(small(name), jax.random.key(seed), base), seed) for seed in range(3)]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 4)), jnp.float32)
    rows = jnp.asarray([2, -1, 0, 2])

    @jax.jit
    def both(base, adapters, x):
        together = vj.bind(graphdef, base, vj.stack_adapters(adapters), rows=rows)(x)
        own = [None if row < 0 else adapters[row] for row in rows.tolist()]
        return together, jnp.concatenate([vj.apply(graphdef, base, a, x[i : i + 1]) for i, a in enumerate(own)])

    together, alone = both(base, adapters, x)
    close(together, alone, 1e-5)
    with pytest.raises(AssertionError):
        close(together[0], together[3], 1e-3)
