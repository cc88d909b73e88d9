"""Error classes carry an exit code, and `nearest` finds what was meant."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import vlora_jax as vj
from vlora_jax.errors import ConfigError, NonFiniteError, ResourceError, nearest


def test_exit_codes_tell_wrong_input_from_failed_runs():
    assert ConfigError("x").exit_code == 2
    assert NonFiniteError("x").exit_code == 1
    assert ResourceError("disk full", exit_code=1).exit_code == 1


def test_nearest_looks_at_path_components():
    paths = ["layers/block/attn/q", "layers/block/mlp/up", "head"]
    assert nearest("attm", paths, 1) == ["layers/block/attn/q"]
    assert nearest("x", []) == []


def test_swapped_arguments_are_told_by_the_call_as_it_should_be(unchecked):
    graphdef, base = vj.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    adapter = vj.init(vj.LoRA(rank=2), jax.random.key(0), base)
    with pytest.raises(TypeError, match=r"bind\(graphdef, .*\): graphdef must be a GraphDef, not a State"):
        vj.apply(base, graphdef, adapter, jnp.ones((1, 4)))
    with pytest.raises(TypeError, match="each of the adapters must be an Adapter, not a State"):
        vj.bind(graphdef, adapter, base)
    with pytest.raises(TypeError, match=r"init\(method, key, base\): method must be a Method, not"):
        vj.init(jax.random.key(0), vj.LoRA(), base)
    with pytest.raises(TypeError, match=r"merge\(base, \*adapters\): each of the adapters must be an Adapter"):
        vj.merge(adapter, base)
