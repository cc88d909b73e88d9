"""A vertical stack against its formulas in NumPy: kernels, outputs and the gradient table of each structure."""

import functools
import itertools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TARGETS, Tiny, abstract, error, filled, increment, layers_of, reference, reference_pass

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten, replace_leaves
from vlora_jax.errors import ConfigError, ConversionError, TargetError
from vlora_jax.models.vit import ViT, ViTConfig
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.expand import expand

LAYERS, SIZE, TOKENS = 6, 3, 7
ROWS = {  # structure, detach: which uses of a kernel move the base, and which move increment j
    ("star", "base"): ("first", "own"),
    ("star", "none"): ("all", "own"),
    ("chain", "none"): ("all", "from j on"),
    ("chain", "base"): ("first", "from j on"),
    ("chain", "prev"): ("first", "own"),
}
REMATS = ("none", "full", "dots", "nested")
CASES = [  # every structure with and without an increment on the base; patterns, diagonals and remats in turn
    (*row, on_base, "cycle" if (n + on_base) % 2 else "sequence", n % 3 == on_base, REMATS[(2 * n + on_base) % 4])
    for (n, row), on_base in itertools.product(enumerate(ROWS), (False, True))
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    """One stack, run factored and materialised, and expanded, beside its reference."""
    structure, detach, on_base, pattern, diagonal, remat = request.param
    options = {"structure": structure, "detach": detach, "adapter_on_base": on_base, "pattern": pattern}
    vertical = Vertical(size=SIZE, increment=increment(), diagonal=diagonal, **options)
    rng = np.random.default_rng(1)
    h, cotangent = rng.normal(size=(2, TOKENS, 6)).astype(np.float32)
    stacks = {
        path: abstract(layers=LAYERS, vertical=vertical.model_copy(update={"path": path}), remat=remat)
        for path in ("factored", "materialised")
    }
    params = filled(stacks["factored"][1])

    def loss(params, path):
        out = vj.apply(stacks[path][0], params, None, h)
        return (out * cotangent).sum(), out

    @jax.jit
    def everything(params):
        runs = {path: jax.grad(loss, has_aux=True)(params, path) for path in stacks}
        return runs, expand(stacks["factored"][0], params)[1]

    runs, dense = jax.device_get(everything(params))
    return SimpleNamespace(
        vertical=vertical,
        params=params,
        reference=reference(vertical, LAYERS, params, h, cotangent),
        outputs={path: out for path, (_, out) in runs.items()},
        grads={path: flatten(grads) for path, (grads, _) in runs.items()},
        dense=flatten(dense),
    )


def test_both_paths_compute_the_formula(case):
    for out in case.outputs.values():
        assert error(out, case.reference.output) < 1e-6


def test_expanded_kernels_are_the_formula(case):
    for target in TARGETS:
        assert error(case.dense[f"block/{target}/kernel"], case.reference.kernels[target]) < 1e-6


def test_gradients_follow_the_table(case):
    vertical, params = case.vertical, flatten(case.params)
    moves_base, moves_increment = ROWS[vertical.structure, vertical.detach]
    scale, first = vertical.increment.scale, int(not vertical.adapter_on_base)
    for target, compound in itertools.product(TARGETS, range(LAYERS // SIZE)):
        gammas = [case.reference.gammas[target][layer] for layer in layers_of(vertical, LAYERS, compound)]
        expected = [(f"block/{target}/kernel", compound, gammas[0] if moves_base == "first" else sum(gammas))]
        for j in range(vertical.increments):
            moving = gammas[j + first] if moves_increment == "own" else sum(gammas[j + first :])
            a, b = (params[f"increments/lora/{target}/{name}"][compound, j] for name in "ab")
            expected.append((f"increments/lora/{target}/a", (compound, j), scale * moving @ b.T))
            expected.append((f"increments/lora/{target}/b", (compound, j), scale * a.T @ moving))
            if vertical.diagonal:
                for grads in case.grads.values():  # its entries may be small beside those of the matrix they are of
                    d = grads[f"increments/diagonal/{target}/d"][compound, j]
                    assert np.abs(d - np.diagonal(moving)).max() < 1e-5 * np.abs(moving).max(), (target, compound, j)
        for grads, (path, place, value) in itertools.product(case.grads.values(), expected):
            assert error(grads[path][place], value) < 1e-5, path


def test_hard_tying_is_one_kernel_with_the_gradient_of_every_layer():
    vertical = Vertical(size=SIZE, enabled=False)
    graphdef, shapes = abstract(layers=LAYERS, vertical=vertical)
    params = filled(shapes)
    h, cotangent = np.random.default_rng(1).normal(size=(2, TOKENS, 6)).astype(np.float32)

    @jax.jit
    def run(params):
        loss = lambda params: (vj.apply(graphdef, params, None, h) * cotangent).sum()
        return jax.grad(loss)(params), expand(graphdef, params)[1]

    grads, dense = (flatten(tree) for tree in run(params))
    tied = {target: np.repeat(flatten(params)[f"block/{target}/kernel"], SIZE, axis=0) for target in TARGETS}
    written_out = reference_pass(tied, flatten(params)["block/up/bias"], h, cotangent)
    for target in TARGETS:
        path = f"block/{target}/kernel"
        np.testing.assert_array_equal(dense[path], tied[target])
        sums = written_out.gammas[target].reshape(-1, SIZE, *tied[target].shape[1:]).sum(axis=1)
        assert error(grads[path], sums) < 1e-5


def test_star_and_chain_of_two_are_the_same_model():
    rng = np.random.default_rng(1)
    h, cotangent = rng.normal(size=(2, TOKENS, 6)).astype(np.float32)
    stacks = [
        abstract(layers=4, vertical=Vertical(size=2, structure=structure, detach=detach, increment=increment()))
        for structure, detach in (("star", "base"), ("chain", "base"), ("chain", "prev"))
    ]
    params = filled(stacks[0][1])

    @jax.jit
    def run(params):
        loss = lambda params, graphdef: (vj.apply(graphdef, params, None, h) * cotangent).sum()
        return [jax.value_and_grad(loss)(params, graphdef) for graphdef, _ in stacks]

    star, *chains = run(params)
    for (_, shapes), chain in zip(stacks[1:], chains, strict=True):
        assert jax.tree.map(np.shape, shapes) == jax.tree.map(np.shape, params)
        for got, expected in zip(jax.tree.leaves(chain), jax.tree.leaves(star), strict=True):
            assert error(got, expected) < 1e-5


def test_an_unused_base_has_exactly_no_gradient_if_detached():
    """A block behind a gate that is shut in layer 0: only later layers use the kernels."""

    class Gated(Tiny):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.gate = nnx.Param(jnp.ones(()))

        def __call__(self, h):
            return h + self.gate * super().__call__(h)

    h = np.random.default_rng(1).normal(size=(TOKENS, 6)).astype(np.float32)
    stacks = {
        detach: abstract(Gated, 4, vertical=Vertical(size=4, detach=detach, increment=increment()))
        for detach in ("base", "none")
    }
    params = filled(stacks["base"][1])
    gates = flatten(params)["block/gate"]
    params = replace_leaves(params, {"block/gate": gates * (np.arange(4) > 0)})

    @jax.jit
    def run(params):
        loss = lambda params, graphdef: (vj.apply(graphdef, params, None, h) ** 2).sum()
        return {detach: jax.grad(loss)(params, graphdef) for detach, (graphdef, _) in stacks.items()}

    grads = {detach: flatten(tree) for detach, tree in run(params).items()}
    for target in TARGETS:
        assert not np.any(grads["base"][f"block/{target}/kernel"])
        assert np.any(grads["none"][f"block/{target}/kernel"])
        assert np.all(np.any(grads["base"][f"increments/lora/{target}/b"], axis=(2, 3)))


def test_ranks_of_a_star_stay_and_those_of_a_chain_grow():
    stacks = {
        structure: abstract(layers=4, vertical=Vertical(size=4, structure=structure, increment=increment(rank=1)))
        for structure in ("star", "chain")
    }
    params = filled(stacks["star"][1])
    dense = jax.jit(lambda params: [expand(graphdef, params)[1] for graphdef, _ in stacks.values()])(params)
    for tree, ranks in zip(dense, ([1, 1, 1], [1, 2, 3]), strict=True):
        for target in TARGETS:
            kernels = np.asarray(flatten(tree)[f"block/{target}/kernel"])
            assert [np.linalg.matrix_rank(kernel - kernels[0], tol=1e-4) for kernel in kernels[1:]] == ranks


def test_one_adapter_fits_a_vertical_model_and_its_dense_twin():
    """LoRA on frozen compounds and increments, merged into the expanded model: the same function."""
    graphdef, shapes = abstract(layers=4, vertical=Vertical(size=2, increment=increment()))
    base, method = filled(shapes), increment(rank=1, targets="down")
    h = np.random.default_rng(1).normal(size=(TOKENS, 6)).astype(np.float32)

    @jax.jit
    def run(base):
        adapter = vj.init(method, jax.random.key(1), base)
        dense_graph, dense = expand(graphdef, base)
        runs = [(graphdef, base, adapter), (dense_graph, dense, adapter), (dense_graph, vj.merge(dense, adapter), None)]
        return adapter, [vj.apply(*each, h) for each in (*runs, (graphdef, base, None))]

    adapter, (bound, on_dense, merged, without) = run(base)
    assert adapter.trainable["sites"]["block/down"]["a"].shape == (4, 5, 1)
    assert error(bound, merged) < 1e-6
    assert error(on_dense, merged) < 1e-6
    assert error(without, merged) > 1e-3


def test_merging_into_shared_kernels_is_refused():
    _, shapes = abstract(layers=4, vertical=Vertical(size=2, increment=increment()))
    base = jax.tree.map(jnp.asarray, filled(shapes))
    with pytest.raises(ConversionError, match="expand it to dense parameters first"):
        vj.merge(base, vj.init(vj.LoRA(rank=1), jax.random.key(0), base))


def test_compounds_of_one_layer_are_a_dense_stack():
    h = np.random.default_rng(1).normal(size=(TOKENS, 6)).astype(np.float32)
    single = [Vertical(size=1, structure=structure, pattern="cycle") for structure in ("star", "chain")]
    stacks = [abstract(layers=3, vertical=vertical) for vertical in (None, *single)]

    @jax.jit
    def run(values):
        loss = lambda params, graphdef: (vj.apply(graphdef, params, None, h) ** 2).sum()
        return [jax.value_and_grad(loss)(replace_leaves(shapes, values), graphdef) for graphdef, shapes in stacks]

    expected, *got = run(flatten(filled(stacks[0][1])))
    for each in got:
        for one, other in zip(jax.tree.leaves(each), jax.tree.leaves(expected), strict=True):
            assert error(one, other) < 1e-6


ViT_B16 = {"width": 768, "heads": 12, "mlp_width": 3072, "image": 224, "channels": 3, "patch": 16, "classes": 1000}


def vit_b16(vertical):
    config = ViTConfig(**ViT_B16, layers=12, class_token=True, fused_qkv=True, vertical=vertical)
    return vj.count(nnx.split(nnx.eval_shape(lambda: ViT(config, nnx.Rngs(0))))[1])


@pytest.mark.parametrize(
    ("size", "counts"),
    [
        (2, [44_100_328, 44_247_784, 44_690_152, 45_279_976, 48_818_920, 45_279_976]),
        (3, [29_944_552, 30_141_160, 30_730_984, 31_517_416, 36_236_008, 31_124_200]),
        (4, [22_866_664, 23_087_848, 23_751_400, 24_636_136, 29_944_552, 24_046_312]),
        (6, [15_788_776, 16_034_536, 16_771_816, 17_754_856, 23_653_096, 16_968_424]),
        (12, [8_710_888, 8_981_224, 9_792_232, 10_873_576, 17_361_640, 9_890_536]),
    ],
)
def test_vit_b16_trains_as_many_numbers_as_the_released_code(size, counts):
    """Hard tying, ranks 2, 8, 16 and 64, and rank 8 with an increment on the base too."""
    tied = vit_b16(Vertical(size=size, enabled=False))
    ranks = [vit_b16(Vertical(size=size, increment=increment(rank=rank))) for rank in (2, 8, 16, 64)]
    assert [tied, *ranks, vit_b16(Vertical(size=size, adapter_on_base=True))] == counts


def test_dense_vit_b16_has_as_many_numbers_as_timm_counts():
    assert vit_b16(None) == 86_567_656


class PostNorm(nnx.Module):
    """A layer of torch's `nn.Transformer`: post-norm, biases, fused projection in, perhaps cross-attention."""

    def __init__(self, cross, rngs, width=512, mlp_width=2048):
        sizes = {"in_proj": (width, 3 * width), "out_proj": (width, width)}
        sizes |= {"linear1": (width, mlp_width), "linear2": (mlp_width, width)}
        if cross:
            sizes |= {"cross_in": (width, 3 * width), "cross_out": (width, width)}
        for name, (inputs, outputs) in sizes.items():
            setattr(self, name, nnx.Linear(inputs, outputs, rngs=rngs))
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(3 if cross else 2)])


def test_encoder_and_decoder_count_as_the_released_code_does():
    """Width 512, 6 + 6 layers; cross-attention is each decoder layer's own."""
    released = Vertical(
        size=3,
        increment=vj.LoRA(rank=2, alpha=1.0, start="xavier_both"),
        targets=("in_proj", "out_proj", "linear1", "linear2"),
    )
    blocks = [functools.partial(PostNorm, cross) for cross in (False, True)]
    of = lambda vertical: sum(vj.count(abstract(block, 6, vertical=vertical)[1]) for block in blocks)
    norm = 2 * 512
    assert of(None) + 2 * norm == 44_140_544  # torch ends both stacks with a norm
    assert of(released) + norm == 19_104_768  # the released code only the decoder's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "star", "detach": "prev"}, "detach=prev is for structure=chain"),
        ({"increment": {"method": "lora", "dropout": 0.1}}, "takes no dropout"),
        ({"increment": {"method": "lora", "targets": "mlp"}}, "vertical.targets says which kernels are shared"),
        ({"increment": {"method": "lora", "full": "head"}}, "vertical.targets says which kernels are shared"),
        ({"increment": {"method": "lora", "rnk": 4}}, "nearest: 'rank'"),
        ({"size": 0}, "greater than 0"),
        ({"stucture": "star"}, "stucture"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Vertical(**options)


def test_a_method_without_a_change_per_kernel_is_no_increment():
    class Gate(vj.LoRA):
        name, mergeable = "gate", False

    with pytest.raises(ValueError, match="gate cannot be a vertical increment"):
        Vertical(increment=Gate())


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"size": 5}, ConfigError, "size 5 does not divide layers 12; nearest size that does: 4"),
        ({"size": 11}, ConfigError, "nearest size that does: 12"),
        ({"targets": "dwn"}, TargetError, "nearest: down"),
        ({"increment": increment(rank=6)}, ConfigError, "rank 6 is above the smaller side, 5"),
        ({"increment": increment(rank_pattern={"upp": 1})}, TargetError, "rank_pattern.*'upp'.*nearest: up"),
    ],
)
def test_what_does_not_fit_the_block_is_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        abstract(layers=12, vertical=Vertical(**options))


def test_config_survives_plain_values():
    vertical = Vertical(size=3, increment=increment(rank_pattern={"up": 4}), targets=("up", "down"), detach="none")
    assert Vertical(**json.loads(vertical.model_dump_json())) == vertical
