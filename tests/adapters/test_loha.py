"""LoHa: its formula, both forms of its forward pass and what they cost, and its rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, filled, parameters, random_adapter
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.sites import Site

ROBERTA = {"query": (768, 768), "value": (768, 768)}


def site(in_dim, out_dim):
    return Site("up", "kernel", "dense", (), (in_dim, out_dim), (0,), (1,))


def factors_of(method, in_dim, out_dim, seed=0):
    shapes = jax.eval_shape(lambda: method.init_site(jax.random.key(0), site(in_dim, out_dim), None).trainable)
    return filled(shapes, seed, 1.0)


def explicit(factors, scale):
    a1, b1, a2, b2 = (np.asarray(factors[name], np.float64) for name in ("a1", "b1", "a2", "b2"))
    return scale * np.einsum("...ij,...jo,...ik,...ko->...io", a1, b1, a2, b2)


def test_the_change_is_the_product_entry_by_entry_of_two_low_rank_matrices():
    base = parameters(LaxScanned)[1]
    adapter = random_adapter(vj.LoHa(rank=2, alpha=3.0), base)
    (up,) = vj.select(adapter.sites, "up")
    change = jax.jit(lambda: site_delta(adapter, up, jnp.zeros((3, 4, 6))))()
    close(change, explicit(adapter.factors(up.path), 1.5))


@pytest.mark.parametrize(("rank", "thin"), [(2, True), (3, True), (5, False)])
def test_both_forms_of_the_forward_pass_compute_the_same(rank, thin):
    """r²·(in + out) < in·out for 24 × 20: 44·r² < 480."""
    method = vj.LoHa(rank=rank, alpha=4.0)
    factors, kernel = factors_of(method, 24, 20), jnp.zeros((24, 20))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, 24)), jnp.float32)
    pair = method.low_rank((24, 20), factors)
    assert (pair is not None) == thin
    if pair is not None:
        assert pair[0].shape == (24, rank**2)
        close(pair[0] @ pair[1], explicit(factors, 4.0 / rank))
    close(method.forward(x, x @ kernel, kernel, factors), x @ explicit(factors, 4.0 / rank), 2e-6)


@pytest.mark.parametrize(("rank", "thin"), [(3, True), (6, False)])
def test_its_cost_is_what_it_says_and_the_form_with_fewer_flops_is_taken(rank, thin):
    """FLOPs of the compiled program at 64 × 48, 128 tokens: r²·112 < 3072."""
    method, tokens, (in_dim, out_dim) = vj.LoHa(rank=rank), 128, (64, 48)
    shapes = jax.eval_shape(lambda: factors_of(method, in_dim, out_dim))
    x, y, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 64), (tokens, 48), (64, 48)))
    flops = lambda run: jax.jit(run).lower(x, y, kernel, shapes).compile().cost_analysis()["flops"]
    built = lambda x, y, kernel, factors: x @ method.delta(kernel, factors)
    per_token, build = method.flops(site(in_dim, out_dim))
    expected = {True: tokens * per_token, False: build + 2 * tokens * in_dim * out_dim}
    measured = {thin: flops(method.forward), False: flops(built)}
    for form, cost in measured.items():
        assert abs(cost / expected[form] - 1) < 0.1
    assert min(expected.values()) == expected[thin]


def test_the_rank_of_the_change_is_the_square_of_its_rank():
    """Twice LoRA's numbers at one rank, and a rank of 9 where LoRA with as many numbers has 6."""
    method = vj.LoHa(rank=3)
    factors = factors_of(method, 20, 16)
    assert sum(leaf.size for leaf in factors.values()) == 6 * (20 + 16)
    assert np.linalg.matrix_rank(np.asarray(method.delta(jnp.zeros((20, 16)), factors))) == 9


def test_it_starts_as_in_peft():
    start = jax.jit(vj.LoHa(rank=16).init_site, static_argnums=1)(jax.random.key(0), site(64, 48), None).trainable
    assert not start["a2"].any()
    for name, bound in (("a1", 1 / 8), ("b1", 1 / 4), ("b2", 1 / 4)):
        assert 0.97 * bound < np.abs(start[name]).max() <= bound
        close(np.std(start[name]), bound / 3**0.5, 0.01)
    assert not np.array_equal(start["b1"], start["b2"])


def test_with_rows_of_ones_beside_it_it_is_lora():
    """A₂ B₂ of rank 1 and all ones leaves s·A₁ B₁."""
    factors = {name: leaf[:, :1] if name.startswith("a") else leaf[:1] for name, leaf in factors_of(
        vj.LoHa(rank=1), 6, 5
    ).items()}  # fmt: skip
    ones = {"a2": jnp.ones((6, 1)), "b2": jnp.ones((1, 5))}
    change = vj.LoHa(rank=1, alpha=2.0).delta(jnp.zeros((6, 5)), factors | ones)
    lora = vj.LoRA(rank=1, alpha=2.0).delta(jnp.zeros((6, 5)), {"a": factors["a1"], "b": factors["b1"]})
    close(change, lora)


def test_it_trains_as_many_numbers_as_lora_of_twice_the_rank():
    block = lambda rngs: nnx.Dict({name: nnx.Linear(*sides, rngs=rngs) for name, sides in ROBERTA.items()})
    stack = lambda: nnx.Dict(layers=nnx.split_rngs(splits=12)(nnx.vmap(block))(nnx.Rngs(0)))
    base = vj.split(nnx.eval_shape(stack))[1]
    counts = [
        vj.count(jax.eval_shape(lambda base, m=method: vj.init(m, jax.random.key(0), base), base))
        for method in (vj.LoHa(rank=8), vj.LoRA(rank=16))
    ]
    assert counts == [589_824, 589_824]
