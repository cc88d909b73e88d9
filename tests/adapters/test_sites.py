"""Which kernels a model has, how their axes are read, and what patterns select."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import parameters
from third_party import MODELS, Attention, LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.sites import Layout, Site, einsum_layout
from vlora_jax.errors import ConversionError, TargetError

PATHS = ["embed", "head", "layers/attn/o", "layers/attn/q", "layers/attn/v", "layers/mlp/down", "layers/mlp/up", "wi_0"]


def site(path, kind="dense", stack=(), shape=(4, 6), inputs=(0,), outputs=(1,), stack_axis=0):
    leaf = "embedding" if kind == "embed" else "kernel"
    return Site(path, leaf, kind, stack, shape, inputs, outputs, stack_axis)


SITES = [site(path, "embed" if path == "embed" else "dense") for path in PATHS]


def chosen(targets, exclude=None):
    return [each.path for each in vj.select(SITES, targets, exclude)]


@pytest.mark.parametrize(
    ("targets", "exclude", "paths"),
    [
        ("q", None, ["layers/attn/q"]),
        ("q|v", None, ["layers/attn/q", "layers/attn/v"]),
        (["v", "q"], None, ["layers/attn/q", "layers/attn/v"]),
        (("up", "q"), "attn", ["layers/mlp/up"]),
        ("attn", None, ["layers/attn/o", "layers/attn/q", "layers/attn/v"]),
        ("layers/.*", "attn/o", ["layers/attn/q", "layers/attn/v", "layers/mlp/down", "layers/mlp/up"]),
        ("layers/mlp/up", None, ["layers/mlp/up"]),
        ("embed", None, ["embed"]),
        (".*", None, PATHS),
        ("attention", None, ["layers/attn/o", "layers/attn/q", "layers/attn/v"]),
        ("mlp", None, ["layers/mlp/down", "layers/mlp/up", "wi_0"]),
        ("all-linear", None, PATHS[2:]),
        ("all-linear", ["attention", "wi_0"], ["layers/mlp/down", "layers/mlp/up"]),
        (["attention", "head"], "q", ["head", "layers/attn/o", "layers/attn/v"]),
    ],
)
def test_patterns_and_presets_select_whole_components(targets, exclude, paths):
    assert chosen(targets, exclude) == paths


@pytest.mark.parametrize(
    ("name", "presets"),
    [
        ("encoder/self_attention/query", ["attention", "all-linear"]),
        ("block/mha/out", ["attention", "all-linear"]),
        ("blocks/3/attn/mlp", ["attention", "all-linear"]),
        ("decoder/feed_forward/dense", ["mlp", "all-linear"]),
        ("ffn/wo", ["mlp", "all-linear"]),
        ("layer/gate_proj", ["mlp", "all-linear"]),
        ("layer/fc1", ["mlp", "all-linear"]),
        ("proj", ["all-linear"]),
        ("lm_head", []),
        ("model/classifier", []),
    ],
)
def test_presets_know_the_usual_names(name, presets):
    sites = [site(name), site("other/mlp/up"), site("other/attn/q")]
    assert [p for p in ("attention", "mlp", "all-linear") if sites[0] in vj.select(sites, p)] == presets


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        ("qq", None, r"target 'qq' matches nothing; nearest: layers/attn/q"),
        (["q", "upp"], None, r"target 'upp' matches nothing; nearest: layers/mlp/up"),
        ("att", None, r"target 'att' matches nothing; nearest: layers/attn/"),
        ("q", "vv", r"exclude 'vv' matches nothing; nearest: layers/attn/v"),
        ("q(", None, r"target 'q\(' is not a regular expression"),
        ("q", "[", r"exclude '\[' is not a regular expression"),
        ("q|v", "attn", r"targets \['q\|v'\] select nothing once \['attn'\] is excluded"),
        ([], None, r"targets \[\] select nothing"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(targets, exclude, message):
    with pytest.raises(TargetError, match=message):
        chosen(targets, exclude)


def test_a_preset_without_sites_is_refused():
    with pytest.raises(TargetError, match="target 'attention' matches nothing; nearest: "):
        vj.select([site("up")], "attention")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", {"": ((), (4, 5), (0,), (1,))}),
        ("general, two axes in, two out", {"": ((), (3, 4, 5, 2), (0, 1), (2, 3))}),
        ("einsum", {"": ((), (2, 4, 5), (1,), (0, 2))}),
        ("embedding", {"": ((), (7, 4), (0,), (1,))}),
        ("tied embedding", {"embed": ((), (7, 4), (0,), (1,)), "mix": ((), (4, 4), (0,), (1,))}),
        ("one layer, two names", {"again": ((), (4, 4), (0,), (1,))}),
        (
            "lax.scan",
            {
                "blocks/down": ((3,), (5, 2, 4), (0, 1), (2,)),
                "blocks/mix": ((3,), (2, 3, 5, 2), (0, 1), (2, 3)),
                "blocks/up": ((3,), (4, 6), (0,), (1,)),
            },
        ),
    ],
)
def test_every_kernel_is_found_with_its_axes(name, expected):
    found = vj.find_sites(parameters(MODELS[name][0])[1])
    assert {each.path: (each.stack, each.shape, each.inputs, each.outputs) for each in found} == expected


def test_kernels_of_flax_s_attention_are_found_by_preset():
    sites = vj.find_sites(parameters(Attention)[1])
    assert [each.path for each in vj.select(sites, "attention")] == [
        f"attn/{n}" for n in ("key", "out", "query", "value")
    ]
    assert [each.path for each in vj.select(sites, "all-linear", "attention")] == ["mlp/down", "mlp/up"]


def test_layers_without_a_matrix_are_no_sites():
    class Others(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (2,), rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.groups = nnx.LinearGeneral(3, 4, batch_axis={0: 2}, rngs=rngs)
            self.experts = nnx.Einsum("ebd,edf->ebf", (2, 3, 4), rngs=rngs)
            self.scaled = nnx.Einsum("bd,df->bdf", (3, 4), rngs=rngs)
            self.pooled = nnx.Einsum("btd,df->bf", (3, 4), rngs=rngs)
            self.linear = nnx.Linear(3, 4, rngs=rngs)

    assert [each.path for each in vj.find_sites(parameters(Others)[1])] == ["linear"]


def test_plain_pytrees_have_the_sites_that_are_unambiguous():
    tree = {"up": {"kernel": jnp.zeros((4, 6)), "bias": jnp.zeros(6)}, "embed": {"embedding": jnp.zeros((7, 4))}}
    assert [(each.path, each.kind) for each in vj.find_sites(tree)] == [("embed", "embed"), ("up", "dense")]
    with pytest.raises(TargetError, match=r"up/kernel has 3 axes .* vlora_jax.split"):
        vj.init(vj.LoRA(), jax.random.key(0), {"up": {"kernel": jnp.zeros((3, 4, 6))}})


@pytest.mark.parametrize(
    ("equation", "layout"),
    [
        ("btd,df->btf", ((0,), (1,))),
        ("btd,ndh->btnh", ((1,), (0, 2))),
        ("btnh, nhd -> btd", ((0, 1), (2,))),
        ("...nh,dnh->...d", ((1, 2), (0,))),
        ("ebd,edf->ebf", None),  # one kernel for each e
        ("btd,df->bf", None),  # the input is summed over t
        ("bd,dfx->bf", None),  # the kernel is summed over x
    ],
)
def test_einsum_equations_tell_inputs_from_outputs(equation, layout):
    assert einsum_layout(equation) == (layout and Layout("einsum", *layout))


def test_kernels_become_matrices_and_come_back():
    """`(n, d, h)` with inputs d, two layer axes stored after the first kernel axis."""
    heads = site("q", "einsum", stack=(3, 2), shape=(4, 5, 6), inputs=(1,), outputs=(0, 2), stack_axis=1)
    stored = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 2, 5, 6)))
    matrix = heads.matrix(stored)
    assert (heads.in_dim, heads.out_dim, heads.layers) == (5, 24, 6)
    np.testing.assert_array_equal(matrix, np.einsum("nlkdh->lkdnh", stored).reshape(3, 2, 5, 24))
    np.testing.assert_array_equal(heads.kernel(matrix), stored)
    np.testing.assert_array_equal(heads.matrix(stored[:, 0, 0]), matrix[0, 0])


def test_reading_a_kernel_that_layers_share_is_refused():
    shared = site("up", stack=(6,), shape=(4, 6))
    assert shared.read({"up/kernel": jnp.zeros((6, 4, 6))}).shape == (6, 4, 6)
    with pytest.raises(ConversionError, match=r"up/kernel stores \(2, 4, 6\) for 6 layers of \(4, 6\)"):
        shared.read({"up/kernel": jnp.zeros((2, 4, 6))})


def test_splitting_twice_keeps_layouts():
    graphdef, base = parameters(LaxScanned)
    again = vj.split(nnx.merge(graphdef, base))[1]
    assert vj.find_sites(again) == vj.find_sites(base)
