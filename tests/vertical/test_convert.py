"""Pretrained to vertical: each scheme against its SVDs in NumPy, exact at full rank, and the synthetic study."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import TARGETS, Tiny, abstract, error, filled, increment, layers_of

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError, ConversionError, TargetError
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.convert import common_base, convert, residuals
from vlora_jax.vertical.expand import expand

LAYERS, SIZE, RANK = 6, 3, 2


@pytest.fixture(scope="module")
def pretrained():
    graphdef, shapes = abstract(layers=LAYERS)
    return graphdef, jax.tree.map(jnp.asarray, filled(shapes))


def svd(matrix, rank):
    u, sigma, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ v[:rank]


def expected_kernels(vertical, kernels, rank):
    """The schemes of the literature for one compound, without refinement."""
    if not vertical.enabled:
        return [kernels.mean(axis=0)] * len(kernels)
    base, built = (kernels.mean(axis=0) if vertical.adapter_on_base else kernels[0]), []
    for index, kernel in enumerate(kernels):
        before = built[-1] if vertical.structure == "chain" and built else base
        alone = index == 0 and not vertical.adapter_on_base
        built.append(base if alone else before + svd(kernel - before, rank))
    return built


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "star"},
        {"structure": "star", "adapter_on_base": True, "pattern": "cycle"},
        {"structure": "chain", "pattern": "cycle", "diagonal": True},
        {"structure": "chain", "adapter_on_base": True},
        {"enabled": False, "pattern": "cycle"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_kernels_are_the_best_a_scheme_can_do(pretrained, options):
    """A scale of 3 / 2, and a rank of its own for one target."""
    graphdef, base = pretrained
    vertical = Vertical(size=SIZE, increment=increment(RANK, rank_pattern={"down": 1}), **options)
    converted = convert(graphdef, base, vertical, iterations=0)
    built = flatten(jax.jit(lambda base: expand(converted[0], base)[1])(converted[1]))
    dense = {path: np.asarray(leaf) for path, leaf in flatten(base).items()}
    np.testing.assert_array_equal(built["block/up/bias"], dense["block/up/bias"])
    left = residuals(base, *converted)
    for target in TARGETS:
        path, rank = f"block/{target}", {"up": RANK, "down": 1}[target]
        kernels, expected = dense[f"{path}/kernel"], np.empty_like(dense[f"{path}/kernel"])
        for compound in range(LAYERS // SIZE):
            layers = list(layers_of(vertical, LAYERS, compound))
            expected[layers] = expected_kernels(vertical, kernels[layers], rank)
        assert error(built[f"{path}/kernel"], expected) < 1e-5
        norms = [np.linalg.norm(each) for each in (*(kernels - expected), *kernels)]
        np.testing.assert_allclose(left[path], np.divide(norms[:LAYERS], norms[LAYERS:]), atol=1e-5)


def test_full_rank_gives_back_the_pretrained_model():
    config = DecoderConfig(width=8, heads=2, mlp_width=8, layers=4, vocabulary=16)
    vertical = Vertical(size=2, increment=increment(8), adapter_on_base=True, detach="none")
    model = lambda vertical: Decoder(config.model_copy(update={"vertical": vertical}), nnx.Rngs(0))
    graphdef, shapes = vj.split(nnx.eval_shape(lambda: model(None)))
    base = jax.tree.map(jnp.asarray, filled(shapes, deviation=0.3))
    converted_graph, converted = convert(graphdef, base, vertical)
    tokens = jnp.arange(10).reshape(2, 5)
    logits = jax.jit(lambda *bases: [vj.apply(g, b, None, tokens) for g, b in zip((graphdef, converted_graph), bases)])
    np.testing.assert_allclose(*logits(base, converted), atol=1e-4)
    # What came out is what a config with the same sharing builds: checkpoints, counts and rebuilding follow.
    fresh_graph, fresh = vj.split(nnx.merge(*vj.split(nnx.eval_shape(lambda: model(vertical)))))
    assert converted_graph == fresh_graph
    assert jax.tree.map(np.shape, converted) == jax.tree.map(np.shape, fresh)
    assert vj.count(converted) == vj.count(base) - 2 * 7 * 8 * 8 + 4 * 7 * 8 * (8 + 8)


def test_factors_are_balanced(pretrained):
    """‖A‖ = ‖B‖ column by row, so that one learning rate fits both."""
    graphdef, base = pretrained
    leaves = flatten(convert(graphdef, base, Vertical(size=SIZE, increment=increment(RANK), adapter_on_base=True))[1])
    for target in TARGETS:
        a, b = (np.asarray(leaves[f"increments/lora/{target}/{name}"]) for name in "ab")
        np.testing.assert_allclose(np.linalg.norm(a, axis=2), np.linalg.norm(b, axis=3), rtol=1e-4)


def test_refinement_never_rises():
    """The mean, then a base refined in more and more turns: what products of the rank leave over."""
    kernels = np.random.default_rng(0).normal(size=(4, 12, 9)).astype(np.float32)
    base_after = jax.jit(common_base, static_argnums=(1, 2))
    left = []
    for turns in (0, 1, 4, 30):
        rest = kernels - np.asarray(base_after(jnp.asarray(kernels), 3, turns))
        left.append(sum(np.linalg.norm(each - svd(each, 3)) ** 2 for each in rest))
    assert left == sorted(left, reverse=True)
    assert left[-1] < 0.9 * left[0]


def test_a_bfloat16_base_stays_so_and_increments_make_up_for_its_rounding(pretrained):
    graphdef, base = pretrained
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base)
    vertical = Vertical(size=SIZE, increment=increment(5), adapter_on_base=True)
    converted_graph, converted = convert(graphdef, half, vertical)
    for path, leaf in flatten(converted).items():
        assert leaf.dtype == (jnp.float32 if path.startswith("increments") else jnp.bfloat16), path
    for per_layer in residuals(half, converted_graph, converted).values():
        assert np.all(np.asarray(per_layer) < 1e-3)  # full rank; a rounded base alone would leave 2⁻⁹


def test_schemes_rank_as_in_the_synthetic_study():
    """Layers with spectra k^-0.5 that share half of their variance; the refined base as with exact SVDs in turn."""
    rng, side, rank = np.random.default_rng(0), 32, 2

    def matrix():
        u, _, v = np.linalg.svd(rng.normal(size=(side, side)))
        values = u * np.arange(1, side + 1) ** -0.5 @ v
        return values / np.linalg.norm(values)

    shared = matrix()
    kernels = np.stack([0.5**0.5 * (shared + matrix()) for _ in range(4)])
    graphdef, shapes = abstract(lambda rngs: nnx.Linear(side, side, use_bias=False, rngs=rngs), 4)
    base = jax.tree.map(lambda _: jnp.asarray(kernels, jnp.float32), shapes)

    def left(iterations=0, **options):
        vertical = Vertical(size=4, increment=increment(rank), **options)
        (per_layer,) = residuals(base, *convert(graphdef, base, vertical, iterations=iterations)).values()
        return np.sqrt(np.mean(np.square(per_layer)))

    exact = kernels.mean(axis=0)
    for _ in range(30):
        exact = np.mean([kernel - svd(kernel - exact, rank) for kernel in kernels], axis=0)
    rest = [kernel - exact - svd(kernel - exact, rank) for kernel in kernels]
    refined, mean = left(adapter_on_base=True, iterations=30), left(adapter_on_base=True)
    assert abs(refined - np.linalg.norm(rest) / np.linalg.norm(kernels)) < 0.002
    chain_from_mean = left(adapter_on_base=True, structure="chain")
    first_layer = min(left(structure="star"), left(structure="chain"))
    assert refined < 0.95 * mean < 0.95 * chain_from_mean < 0.8 * first_layer


class Bare(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"increment": vj.Diagonal()}, ConversionError, "SVDs, which are LoRA, not diagonal"),
        ({"increment": increment(alpha=0.0)}, ConversionError, "alpha of 0 or below"),
        ({"increment": increment(alpha_pattern={"up": -1.0})}, ConversionError, "alpha of 0 or below"),
        ({"size": 4}, ConfigError, "size 4 does not divide layers 6; nearest size that does: 3"),
        ({"size": 2, "increment": increment(6)}, ConfigError, "rank 6 is above the smaller side, 5"),
        ({"size": 2, "targets": "upp"}, TargetError, "nearest: up"),
    ],
)
def test_what_cannot_be_converted_is_refused(pretrained, options, kind, message):
    with pytest.raises(kind, match=message):
        convert(*pretrained, Vertical(**options))


def test_only_dense_stacks_convert():
    vertical = Vertical(size=2, increment=increment())
    for make, message in (
        (lambda: Bare(nnx.Rngs(0)), "has no stack of layers"),
        (lambda: Stack(Tiny, 4, vertical=vertical, rngs=nnx.Rngs(0)), "vertical already; expand it"),
    ):
        with pytest.raises(ConversionError, match=message):
            convert(*vj.split(nnx.eval_shape(make)), vertical)
