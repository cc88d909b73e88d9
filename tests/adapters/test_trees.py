"""Pytrees by path: the flat view, the way back, and patterns over paths."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import parameters
from third_party import Containers

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten, matches, matching, replace_leaves, unflatten, variables
from vlora_jax.errors import CheckpointError, TargetError

NESTED = {"layers": [{"kernel": 1, "bias": 2}, {"kernel": 3}], "head": (4,)}


def test_leaves_are_named_by_their_path():
    assert flatten(NESTED) == {"head/0": 4, "layers/0/bias": 2, "layers/0/kernel": 1, "layers/1/kernel": 3}


def test_paths_of_an_nnx_state_are_those_of_its_modules():
    paths = list(flatten(parameters(Containers)[1]))
    assert "chain/layers/0/kernel" in paths
    assert "listed/1/bias" in paths
    assert "named/left/kernel" in paths
    assert "plain/0/right/kernel" in paths


def test_an_adapter_s_leaves_are_named_by_part_site_and_tensor():
    adapter = jax.eval_shape(
        lambda base: vj.init(vj.LoRA(rank=2, targets="left", full="right/bias"), jax.random.key(0), base),
        parameters(Containers)[1],
    )
    assert list(flatten(adapter)) == [
        "trainable/full/plain/0/right/bias",
        "trainable/sites/named/left/a",
        "trainable/sites/named/left/b",
    ]


def test_unflatten_is_the_inverse_of_flatten_in_any_order():
    flat = flatten(NESTED)
    assert unflatten(NESTED, dict(reversed(flat.items()))) == NESTED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda flat: flat.pop("layers/1/kernel"), r"file: 1 leaves missing \['layers/1/kernel'\], 0 unexpected"),
        (lambda flat: flat.update(hed=1), r"0 leaves missing \[\], 1 unexpected \['hed'\]; nearest names: head/0"),
    ],
)
def test_leaves_too_many_or_too_few_are_refused(change, message):
    flat = flatten(NESTED)
    change(flat)
    with pytest.raises(CheckpointError, match=message):
        unflatten(NESTED, flat, "file")


def test_replacing_leaves_keeps_all_others_and_the_structure():
    base = parameters(Containers)[1]
    replaced = replace_leaves(base, {"listed/0/bias": jnp.arange(5.0)})
    assert isinstance(replaced, nnx.State)
    np.testing.assert_array_equal(replaced["listed"][0]["bias"].get_value(), np.arange(5))
    for path, leaf in flatten(base).items():
        if path != "listed/0/bias":
            assert flatten(replaced)[path] is leaf, path
    with pytest.raises(CheckpointError, match="listed/0/bais"):
        replace_leaves(base, {"listed/0/bais": jnp.zeros(5)})


def test_variables_keep_what_is_written_beside_the_values():
    base = parameters(Containers)[1]
    kernel = variables(base)["named/left/kernel"]
    assert isinstance(kernel, nnx.Param)
    assert kernel.get_metadata()["layout"].inputs == (0,)
    assert list(variables(base)) == list(flatten(base))


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("q", "layers/attn/q", True),
        ("q", "layers/attn/qkv", False),
        ("attn/q", "layers/attn/q", True),
        ("layers/attn", "layers/attn/q", True),
        ("ayers", "layers/attn/q", False),
        ("layers/[0-2]/.*", "layers/2/up", True),
        ("layers/[0-2]/.*", "layers/3/up", False),
        ("q|o", "layers/o", True),
        ("layers/q|o", "xlayers/q", False),
        (".*_proj", "attn/v_proj", True),
        (".*", "", True),
    ],
)
def test_patterns_match_whole_components(pattern, path, expected):
    assert matches(pattern, path) is expected


def test_a_pattern_without_match_names_its_role_and_what_is_near():
    assert matching("bias", ["up/bias", "up/kernel"], "group") == ["up/bias"]
    with pytest.raises(TargetError, match="group 'bais' matches nothing; nearest: up/bias"):
        matching("bais", ["up/bias", "up/kernel"], "group")
    with pytest.raises(TargetError, match=r"group '\(' is not a regular expression"):
        matching("(", ["up/bias"], "group")
    with pytest.raises(TargetError, match="matches nothing; nearest: none"):
        matching("bias", [], "group")
