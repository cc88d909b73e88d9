"""Every method of the registry that says so can be the increment of a vertical stack, in every form of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import mostly_slow
from test_methods import small
from tiny import WIDTH, abstract, error, filled

import vlora_jax as vj
from vlora_jax.adapters.registry import METHODS

QUICK = ("lora", "lokr", "miss")

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, WIDTH)), jnp.float32)
FORMS = [("star", "factored"), ("star", "materialised"), ("chain", "auto")]


@pytest.mark.parametrize("name", mostly_slow([name for name, method in METHODS.items() if method.vertical], QUICK))
def test_a_stack_computes_what_its_expanded_layers_do(name):
    """Chains of methods that do not add up build their kernels."""
    stacks = []
    for structure, path in FORMS:
        vertical = vj.Vertical(size=3, structure=structure, path=path, increment=small(name), targets=("up", "down"))
        graphdef, shapes = abstract(layers=6, vertical=vertical)
        stacks.append((graphdef, filled(shapes)))

    @jax.jit
    def outputs(params, x):
        both = lambda graphdef, params: (nnx.merge(graphdef, params)(x), nnx.merge(*vj.expand(graphdef, params))(x))
        return [both(graphdef, each) for (graphdef, _), each in zip(stacks, params, strict=True)]

    found = outputs([params for _, params in stacks], X)
    for vertical, dense in found:
        assert error(vertical, dense) < 1e-5
    star, built, chain = (vertical for vertical, _ in found)
    assert error(star, built) < 1e-5
    assert error(star, chain) > 1e-3


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.vertical])
def test_others_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} cannot be a vertical increment"):
        vj.Vertical(increment=small(name))
