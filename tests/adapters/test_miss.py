"""MiSS: its three modes against loops in NumPy, its relation to LoRA, and the sizes that papers count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, stacked_sites, trained_numbers
from tiny import abstract, filled

import vlora_jax as vj
from vlora_jax.adapters.miss import nearest_divisor
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.inspection.hlo import dot_flops

RNG = np.random.default_rng(0)
LLAMA_2_7B = stacked_sites(
    32, q=(4096, 4096), k=(4096, 4096), v=(4096, 4096), o=(4096, 4096),
    gate=(4096, 11008), up=(4096, 11008), down=(11008, 4096),
)  # fmt: skip
LLAMA_2_13B = stacked_sites(
    40, q=(5120, 5120), k=(5120, 5120), v=(5120, 5120), o=(5120, 5120),
    gate=(5120, 13824), up=(5120, 13824), down=(13824, 5120),
)  # fmt: skip
MISTRAL_7B = stacked_sites(
    32, q=(4096, 4096), k=(4096, 1024), v=(4096, 1024), o=(4096, 4096),
    gate=(4096, 14336), up=(4096, 14336), down=(14336, 4096),
)  # fmt: skip
ROBERTA_BASE = stacked_sites(12, q=(768, 768), v=(768, 768))
LLAMA_32_3B = stacked_sites(28, q=(3072, 3072), v=(3072, 1024))


def looped(mode, d, kernel):
    """ΔW entry by entry, or block by block."""
    inputs, outputs = kernel.shape
    delta = np.empty(kernel.shape)
    if mode != "bat":
        for i in range(inputs):
            for o in range(outputs):
                delta[i, o] = d[i % d.shape[0], o % d.shape[1]]
        return delta
    r = d.shape[1]
    for b in range(0, inputs, r):
        for a in range(0, outputs, r):
            delta[b : b + r, a : a + r] = d[a // r] @ kernel[b : b + r, a : a + r] + d[a // r]
    return delta


CASES = {
    "default": (vj.MiSS(rank=4), (8, 6), (4, 6)),
    "not divided": (vj.MiSS(rank=3), (7, 5), (3, 5)),
    "mini": (vj.MiSS(rank=3, mode="mini", mini_rank=2), (7, 6), (3, 2)),
    "bat": (vj.MiSS(rank=8, mode="bat"), (24, 16), (2, 8, 8)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_is_the_repeated_matrix(case):
    method, shape, own = CASES[case]
    site = vj.Site("q", "kernel", "dense", (), shape, (0,), (1,))
    start = method.init_site(jax.random.key(0), site, None).trainable["d"]
    assert start.shape == own
    assert not start.any()
    d, kernel, x = RNG.normal(size=own), RNG.normal(size=shape), RNG.normal(size=(5, shape[0]))
    ids = jnp.asarray([shape[0] - 1, 0, 3])

    @jax.jit
    def run(d, kernel, x):
        factors, y = {"d": d}, jnp.zeros((5, shape[1]))
        looked_up = method.forward(Lookup(ids, jnp.float32), y[:3], kernel, factors)
        return method.delta(kernel, factors), method.forward(x, y, kernel, factors), looked_up

    delta, change, rows = run(*(jnp.asarray(each, jnp.float32) for each in (d, kernel, x)))
    expected = looped(method.mode, d, kernel)
    close(delta, expected)
    close(change, x @ expected)
    close(rows, expected[ids])
    pair = method.low_rank(shape, {"d": jnp.asarray(d, jnp.float32)})
    if method.mode == "bat":
        assert pair is None
        assert np.linalg.matrix_rank(expected) == 16 > method.rank
    else:
        assert pair is not None
        assert pair[0].shape == (shape[0], method.rank)
        close(pair[0] @ pair[1], expected)


def test_it_is_lora_with_a_frozen_matrix_of_repeated_identities():
    """Outputs, and the gradient that reaches D."""
    a = jnp.asarray(np.tile(np.eye(3), (3, 1))[:7], jnp.float32)
    x, d, g = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((5, 7), (3, 4), (5, 4)))
    y, kernel = jnp.zeros((5, 4)), jnp.zeros((7, 4))
    miss, lora = vj.MiSS(rank=3), vj.LoRA(rank=3, alpha=3.0)

    def by(method, factors):
        return lambda d: (method.forward(x, y, kernel, factors(d)) * g).sum()

    ours = jax.jit(jax.value_and_grad(by(miss, lambda d: {"d": d})))(d)
    theirs = jax.jit(jax.value_and_grad(by(lora, lambda d: {"a": a, "b": d})))(d)
    jax.tree.map(close, ours, theirs)


def test_with_as_many_rows_as_inputs_any_change_can_be_had():
    d = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32)
    np.testing.assert_array_equal(vj.MiSS(rank=6).delta(jnp.zeros((6, 4)), {"d": d}), d)


def test_mode_bat_can_be_undone_from_the_merged_kernel_alone():
    """K = (I + D)⁻¹ (K' - D), block by block."""
    method = vj.MiSS(rank=4, mode="bat")
    d, kernel = 0.3 * RNG.normal(size=(3, 4, 4)), RNG.normal(size=(8, 12))
    merged = kernel + np.asarray(method.delta(jnp.asarray(kernel, jnp.float32), {"d": jnp.asarray(d, jnp.float32)}))
    for b in range(2):
        for a in range(3):
            block = np.s_[4 * b : 4 * b + 4, 4 * a : 4 * a + 4]
            close(np.linalg.solve(np.eye(4) + d[a], merged[block] - d[a]), kernel[block], 1e-5)


def test_changes_of_mode_bat_do_not_add_up_and_those_of_the_others_do():
    d = jnp.asarray(RNG.normal(size=(2, 3, 2)), jnp.float32)
    mini = vj.MiSS(rank=3, mode="mini", mini_rank=2)
    summed = mini.sum_factors({"d": d}, jnp.asarray([2.0, -1.0]))
    delta = lambda d: mini.delta(jnp.zeros((5, 4)), {"d": d})
    close(delta(summed["d"]), 2 * delta(d[0]) - delta(d[1]))
    bat = vj.MiSS(rank=4, mode="bat")
    assert (mini.adds_up, bat.adds_up) == (True, False)
    with pytest.raises(ConversionError, match="do not add up"):
        bat.sum_factors({"d": d}, jnp.ones(2))


@pytest.mark.parametrize(
    ("options", "sites", "numbers"),
    [
        ({"rank": 16}, LLAMA_2_7B, 21_757_952),
        ({"rank": 32}, LLAMA_2_7B, 43_515_904),
        ({"rank": 64}, LLAMA_2_7B, 87_031_808),
        ({"rank": 128}, LLAMA_2_7B, 174_063_616),
        ({"rank": 64}, MISTRAL_7B, 88_080_384),
        ({"rank": 128}, LLAMA_2_13B, 272_629_760),
        ({"rank": 16}, ROBERTA_BASE, 294_912),
        ({}, LLAMA_32_3B, 7_340_032),  # these three: PEFT's method comparison
        ({"mode": "bat"}, LLAMA_32_3B, 7_340_032),
        ({"mode": "mini", "mini_rank": 64}, LLAMA_32_3B, 229_376),
    ],
)
def test_it_trains_as_many_numbers_as_are_published(options, sites, numbers):
    assert trained_numbers(vj.MiSS(**options), sites) == numbers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "miss: rank is 0; it must be at least 1"),
        ({"mini_rank": 0}, "miss: mini_rank is 0; it must be at least 1"),
        ({"dropout": 1.0}, "miss: dropout is 1.0; it must be at least 0 and below 1"),
        ({"mode": "bat", "dropout": 0.1}, "miss: dropout is 0.1; mode bat has none"),
        ({"mode": "full"}, "miss: mode is 'full'; it must be one of default, mini, bat"),
    ],
)
def test_options_that_mean_nothing_are_refused(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.MiSS(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 25}, r"rank 25 is above the 24 inputs of q \(24, 18\); lower it"),
        ({"rank": 4, "mode": "bat"}, r"rank 4 must divide the 24 inputs and 18 outputs of q .*; nearest that does: 3"),
        ({"rank": 4, "mode": "mini", "mini_rank": 4}, "mini_rank 4 does not divide the 18 outputs of q .*: 3"),
    ],
)
def test_blocks_that_do_not_fit_a_kernel_are_refused_with_what_would(options, message):
    with pytest.raises(ConfigError, match=message):
        trained_numbers(vj.MiSS(**options), stacked_sites(2, q=(24, 18)))


def test_the_nearest_divisor_is_a_divisor():
    assert [nearest_divisor(12, wish) for wish in (1, 5, 7, 100)] == [1, 4, 6, 12]


def multiplied(function, *shapes):
    """FLOPs of the matrix products in a compiled function."""
    return dot_flops(jax.jit(function).lower(*(jnp.zeros(shape) for shape in shapes)).compile().as_text())


@pytest.mark.parametrize("case", CASES)
def test_the_flops_it_states_are_those_of_its_programs(case):
    """But for additions: a sum over equal places, and copies where ΔW is built."""
    method, shape, own = CASES[case]
    (site,) = stacked_sites(1, q=shape)
    token, build = method.flops(site)
    forward = lambda x, d: method.forward(x, jnp.zeros((50, shape[1])), jnp.ones(shape), {"d": d})
    delta = lambda d: method.delta(jnp.ones(shape), {"d": d})
    if method.mode == "bat":
        assert multiplied(delta, own) == build
        assert multiplied(forward, (50, shape[0]), own) == 50 * token + build
    else:
        assert multiplied(forward, (50, shape[0]), own) == 50 * (token - shape[0])
        assert multiplied(delta, own) == 0


def test_a_vertical_stack_takes_every_mode():
    """Bat sees the kernel that its compound shares; applied as it is or built, the stack is the same."""
    for method in (vj.MiSS(rank=1, mode="bat"), vj.MiSS(rank=2, mode="mini", mini_rank=1)):
        stacks = [
            abstract(layers=4, vertical=vj.Vertical(size=2, increment=method, path=path))
            for path in ("factored", "materialised")
        ]
        params, h = filled(stacks[0][1]), jnp.asarray(RNG.normal(size=(7, 6)), jnp.float32)
        run = lambda params, h, stacks=stacks: [vj.apply(graphdef, params, None, h) for graphdef, _ in stacks]
        close(*jax.jit(run)(params, h), 1e-5)
