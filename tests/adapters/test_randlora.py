"""RandLoRA: its sum over bases in both pairings, the bases that PEFT draws, and the sizes that papers count."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters, stacked_sites, trained_numbers

import vlora_jax as vj
from vlora_jax.errors import ConfigError

RNG = np.random.default_rng(0)
LLAMA_3_8B = stacked_sites(
    32, q=(4096, 4096), k=(4096, 1024), v=(4096, 1024), up=(4096, 14336), down=(14336, 4096)
)  # fmt: skip


def values(shape, method, sides):
    """Random factors of a kernel, and shared bases for the largest sides."""
    small, (bound_small, bound_large) = min(shape), sorted(sides)
    count, of_all = (math.ceil(side / method.rank) for side in (small, bound_small))
    shapes = {
        "lambda": (method.rank, count),
        "gamma": (count, small),
        "a": (method.rank, bound_small),
        "b": (bound_large, of_all, method.rank),
    }
    return {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def summed(method, shape, factors):
    """ΔW as the sum of its definition."""
    lambdas, gamma, a, b = (np.asarray(factors[name], np.float64) for name in ("lambda", "gamma", "a", "b"))
    (rank, count), small, large = lambdas.shape, min(shape), max(shape)
    if method.pairing == "peft":  # B flattened over (base, rank) and read as (rank, base)
        flat = b[:large, :count].reshape(large, count * rank)
        b = np.stack([[flat[:, k * count + j] for k in range(rank)] for j in range(count)]).transpose(2, 0, 1)
    m = sum(
        b[:large, j, :] @ np.diag(lambdas[:, j]) @ a[:, :small] @ np.diag(gamma[j]) for j in range(count)
    )  # fmt: skip
    scale = method.alpha / method.rank / (math.sqrt(count) if method.root_scale else 1)
    return scale * (m.T if shape[0] <= shape[1] else m)


@pytest.mark.parametrize("pairing", ["peft", "paper"])
@pytest.mark.parametrize("shape", [(7, 7), (5, 9), (9, 5)])
def test_a_change_is_the_sum_over_its_bases(pairing, shape):
    method = vj.RandLoRA(rank=3, alpha=3.0, pairing=pairing)
    factors = values(shape, method, (8, 10))
    delta = jax.jit(lambda: method.delta(jnp.zeros(shape), factors))()
    close(delta, summed(method, shape, factors))
    assert np.linalg.matrix_rank(np.asarray(delta, np.float64), 1e-4) == min(shape)


def test_the_pairings_agree_for_one_base_only():
    shape = (3, 8)
    for rank, same in ((3, True), (4, True), (2, False)):
        peft, paper = (vj.RandLoRA(rank=rank, pairing=pairing) for pairing in ("peft", "paper"))
        factors = values(shape, peft, shape)
        one, other = (np.asarray(each.delta(jnp.zeros(shape), factors)) for each in (peft, paper))
        assert np.allclose(one, other, rtol=1e-4) is same


def test_the_scale_is_alpha_over_rank_and_may_have_the_root_of_the_bases():
    shape = (6, 6)
    factors = values(shape, vj.RandLoRA(rank=2), shape)
    delta = lambda **options: np.asarray(vj.RandLoRA(rank=2, **options).delta(jnp.zeros(shape), factors))
    close(delta(alpha=40.0), 20 * delta(alpha=2.0), 1e-5)
    close(delta(alpha=4.0, root_scale=True), 2 / math.sqrt(3) * delta(alpha=2.0), 1e-5)
    assert vj.RandLoRA().alpha / vj.RandLoRA().rank == 20


def built(method, tokens, shape=(6, 8)):
    """Whether a forward pass builds ΔW (see `times_built`)."""
    factors = values(shape, method, shape)
    forward = lambda x, factors: method.forward(x, jnp.zeros((tokens, shape[1])), jnp.zeros(shape), factors)
    equations = jax.make_jaxpr(forward)(jnp.zeros((tokens, shape[0])), factors).eqns
    return any(each.primitive.name.startswith("custom_vjp_call") for each in equations)


@pytest.mark.parametrize("tokens", [2, 50])
def test_few_tokens_meet_the_factors_and_many_the_built_change(tokens):
    method, shape = vj.RandLoRA(rank=2, alpha=2.0), (6, 8)
    assert built(method, tokens) is (tokens == 50)
    factors = values(shape, method, shape)
    x = jnp.asarray(RNG.normal(size=(tokens, 6)), jnp.float32)
    change = jax.jit(lambda: method.forward(x, jnp.zeros((tokens, 8)), jnp.zeros(shape), factors))()
    close(change, np.asarray(x) @ summed(method, shape, factors))


def test_at_the_start_nothing_changes_and_only_lambda_has_a_gradient():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    method = vj.RandLoRA(rank=3)
    adapter = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)
    factors = adapter.factors("")
    assert not factors["lambda"].any()
    np.testing.assert_array_equal(factors["gamma"], np.full((2, 4), np.float32(1 / 4)))
    x = jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)
    loss = lambda t: (vj.apply(graphdef, base, adapter.with_trainable(t), x) ** 2).sum()
    gradient = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][""]
    assert np.abs(gradient["lambda"]).min() > 0
    assert not gradient["gamma"].any()
    gradient = jax.jit(jax.grad(loss))(moved(adapter).trainable)["sites"][""]
    assert np.abs(gradient["gamma"]).min() > 0


def test_gamma_starts_at_one_over_its_larger_side():
    method = vj.RandLoRA(rank=1)
    wide = vj.Site("q", "kernel", "dense", (), (5, 9), (0,), (1,))
    assert (method.init_site(jax.random.key(0), wide, None).trainable["gamma"] == 1 / 5).all()
    coarse = vj.RandLoRA(rank=5).init_site(jax.random.key(0), wide, None).trainable
    assert (coarse["lambda"].shape, coarse["gamma"].shape) == ((5, 1), (1, 5))


def test_all_sites_share_bases_for_the_largest_sides():
    adapter = jax.eval_shape(
        lambda: vj.init(vj.RandLoRA(rank=8), jax.random.key(0), {}, stacked_sites(2, q=(64, 64), v=(64, 32)))
    )
    assert {name: leaf.shape for name, leaf in adapter.frozen["shared"].items()} == {"a": (8, 64), "b": (64, 8, 8)}
    assert {name: leaf.shape for name, leaf in adapter.trainable["sites"]["v"].items()} == {
        "lambda": (2, 8, 4),
        "gamma": (2, 4, 32),
    }
    assert adapter.frozen["sites"] == {}


def test_the_bases_are_those_that_peft_draws():
    """PEFT 0.20, key 0, r 8, both sides 64: numbers of bfloat16, printed to eight places."""
    sites = stacked_sites(2, q=(64, 64), v=(64, 32))
    bases = jax.jit(lambda: vj.RandLoRA(rank=8).draw(sites))()
    printed = {"a": [-0.01275635, 0.9140625, -1.40625, -1.25], "b": [-0.48632812, -0.65234375, 0.43945312, 0.6171875]}
    for name, values in printed.items():
        np.testing.assert_array_equal(
            bases[name].ravel()[:4], np.asarray(values).astype(jnp.bfloat16).astype(np.float32)
        )
    for base in bases.values():
        close(np.std(base, ddof=1), 1, 0.01)
        np.testing.assert_array_equal(base, np.asarray(base).astype(jnp.bfloat16).astype(np.float32))
    other = vj.RandLoRA(rank=8, projection_key=1).draw(sites)
    assert np.abs(other["a"] - bases["a"]).max() > 1


@pytest.mark.parametrize("projection", ["peft", "jax"])
@pytest.mark.parametrize(("bases", "share"), [("dense", None), ("sparse", 1 / 3), ("very_sparse", 1 / 16)])
def test_bases_have_deviation_one_and_the_share_of_zeros_of_their_kind(projection, bases, share):
    method = vj.RandLoRA(rank=8, bases=bases, projection=projection)
    drawn = method.draw(stacked_sites(1, q=(256, 256)))
    assert {name: base.shape for name, base in drawn.items()} == {"a": (8, 256), "b": (256, 32, 8)}
    for base in drawn.values():
        close(np.std(base, ddof=1), 1, 1e-2)
    a, b = (np.asarray(drawn[name]) for name in "ab")
    assert not np.array_equal(a.ravel()[:64], b.ravel()[:64])
    if share is None:
        assert np.abs(b).max() < 1.75  # uniform of deviation 1 ends at √3
        close(np.mean(np.abs(b)), math.sqrt(3) / 2, 0.02)
    else:
        close(np.mean(b != 0), share, 0.01)
        close(np.mean(b > 0), share / 2, 0.01)
        assert len(np.unique(np.abs(b))) == 2


def test_bases_of_jax_follow_their_key():
    draw = lambda key: vj.RandLoRA(rank=2, projection="jax", projection_key=key).draw(stacked_sites(1, q=(8, 8)))
    one, same, other = (np.asarray(draw(key)["b"]) for key in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1


@pytest.mark.parametrize(
    ("rank", "sites", "numbers"),
    [
        (6, stacked_sites(1, q=(768, 768)), 99_072),
        (32, stacked_sites(1, q=(768, 768)), 19_200),
        (60, LLAMA_3_8B, 28_778_112),
        (30, LLAMA_3_8B, 56_626_112),
        (15, LLAMA_3_8B, 112_723_968),
        (3, stacked_sites(1, q=(24, 16)), 114),
        (32, stacked_sites(28, q=(3072, 3072), v=(3072, 1024)), 9_289_728),  # PEFT's method comparison
    ],
)
def test_it_trains_as_many_numbers_as_are_published(rank, sites, numbers):
    assert trained_numbers(vj.RandLoRA(rank=rank), sites) == numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "randlora: rank is 0; it must be at least 1"),
        ({"dropout": -0.1}, "randlora: dropout is -0.1; it must be at least 0 and below 1"),
        ({"bases": "ternary"}, "randlora: bases is 'ternary'; it must be one of dense, sparse, very_sparse"),
        ({"pairing": "official"}, "randlora: pairing is 'official'; it must be one of peft, paper"),
    ],
)
def test_options_that_mean_nothing_are_refused(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.RandLoRA(**options)
