"""LoKr: which factors it keeps, that they make the Kronecker product, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, filled, parameters, random_adapter
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.lokr import sides
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.sites import Site
from vlora_jax.errors import ConfigError


def site(in_dim, out_dim):
    return Site("up", "kernel", "dense", (), (in_dim, out_dim), (0,), (1,))


def shapes_of(method, in_dim, out_dim):
    return jax.eval_shape(lambda: method.init_site(jax.random.key(0), site(in_dim, out_dim), None).trainable)


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (256, -1, (16, 16)),  # the examples of PEFT's documentation
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (768, -1, (24, 32)),
        (4096, -1, (64, 64)),
        (11008, -1, (86, 128)),
        (768, 7, (6, 128)),  # the largest divisor that is not above the factor
        (768, 1000, (24, 32)),
        (16, 8, (8, 2)),  # a divisor is taken as it is
        (1, -1, (1, 1)),
    ],
)
def test_sizes_are_split_near_their_root_or_by_the_factor(size, factor, expected):
    assert sides(size, factor) == expected


FORMS = {  # options: the factors of a 48 × 40 kernel, (6·8) × (5·8)
    "second a product": ({"rank": 3}, {"w1": (6, 5), "a2": (8, 3), "b2": (3, 8)}),
    "whole at half the longer side": ({"rank": 4}, {"w1": (6, 5), "w2": (8, 8)}),
    "both products": (
        {"rank": 2, "decompose_both": True},
        {"a1": (6, 2), "b1": (2, 5), "a2": (8, 2), "b2": (2, 8)},
    ),
    "first whole all the same": ({"rank": 3, "decompose_both": True}, {"w1": (6, 5), "a2": (8, 3), "b2": (3, 8)}),
    "first a product, second whole": (
        {"rank": 3, "decompose_both": True, "decompose_factor": 8},
        {"a1": (8, 3), "b1": (3, 8), "w2": (6, 5)},
    ),
    "a factor that divides one side": (
        {"rank": 2, "decompose_factor": 3},
        {"w1": (3, 2), "a2": (16, 2), "b2": (2, 20)},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_kronecker_product_of_its_factors(form):
    options, expected = FORMS[form]
    method = vj.LoKr(alpha=5.0, **options)
    shapes = shapes_of(method, 48, 40)
    assert {name: leaf.shape for name, leaf in shapes.items()} == expected
    factors = filled(shapes, 0, 1.0)
    half = lambda i: factors.get(f"w{i}") if f"w{i}" in factors else np.asarray(factors[f"a{i}"]) @ factors[f"b{i}"]
    delta = 5.0 / options["rank"] * np.kron(half(1), half(2))
    x, kernel = jnp.asarray(np.random.default_rng(1).normal(size=(7, 48)), jnp.float32), jnp.zeros((48, 40))
    close(method.delta(kernel, factors), delta)
    close(method.forward(x, jnp.zeros((7, 40)), kernel, factors), x @ delta, 2e-6)
    pair = method.low_rank((48, 40), factors)
    inner = np.prod([factors[f"a{i}"].shape[1] if f"a{i}" in factors else min(factors[f"w{i}"].shape) for i in (1, 2)])
    assert (pair is None) == (inner >= 40)
    if pair is not None:
        assert pair[0].shape == (48, inner)
        close(pair[0] @ pair[1], delta)
    rank = np.linalg.matrix_rank
    assert rank(delta) == rank(np.asarray(half(1))) * rank(np.asarray(half(2)))


@pytest.mark.parametrize("form", FORMS)
def test_flops_of_the_compiled_forward_are_as_planned(form):
    method, tokens = vj.LoKr(**FORMS[form][0]), 512
    x, y, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 48), (tokens, 40), (48, 40)))
    compiled = jax.jit(method.forward).lower(x, y, kernel, shapes_of(method, 48, 40)).compile()
    assert abs(compiled.cost_analysis()["flops"] / (tokens * method.flops(site(48, 40))[0]) - 1) < 0.1


def test_stacked_layers_have_a_product_each():
    base = parameters(LaxScanned)[1]
    adapter = random_adapter(vj.LoKr(rank=1, alpha=3.0, targets="mix"), base)
    (mix,) = adapter.sites  # 6 × 10 = (2·3) × (2·5)
    factors = {name: np.asarray(value) for name, value in adapter.factors(mix.path).items()}
    assert factors["w1"].shape == (3, 2, 2)
    change = jax.jit(lambda: site_delta(adapter, mix, jnp.zeros((3, 6, 10))))()
    for layer in range(3):
        close(change[layer], 3.0 * np.kron(factors["w1"][layer], factors["a2"][layer] @ factors["b2"][layer]))


@pytest.mark.parametrize(
    ("options", "zero"),
    [
        ({"rank": 8}, "w1"),
        ({"rank": 8, "decompose_both": True}, "b1"),
        ({"rank": 8, "start": "zero_w2"}, "a2"),
        ({"rank": 16, "start": "zero_w2"}, "w2"),
    ],
)
def test_one_factor_starts_as_zero_and_the_others_as_in_peft(options, zero):
    drawn = jax.jit(vj.LoKr(**options).init_site, static_argnums=1)(jax.random.key(0), site(768, 768), None).trainable
    fans = {"w1": 24, "a1": 24, "w2": 32, "a2": 32, "b1": 8, "b2": 8}
    assert zero in drawn
    for name, value in drawn.items():
        largest, bound = np.abs(value).max(), fans[name] ** -0.5
        assert (largest == 0) if name == zero else (0.95 * bound < largest <= bound)


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"rank": 8}, 24 * 24 + 8 * (32 + 32)),
        ({"rank": 16}, 24 * 24 + 32 * 32),
        ({"rank": 8, "decompose_both": True}, 8 * (24 + 24) + 8 * (32 + 32)),
        ({"rank": 8, "decompose_factor": 8}, 8 * 8 + 8 * (96 + 96)),
    ],
)
def test_a_768_square_kernel_takes_about_a_thousand_numbers(options, numbers):
    assert sum(leaf.size for leaf in shapes_of(vj.LoKr(**options), 768, 768).values()) == numbers


def test_any_rank_will_do():
    assert {name: leaf.shape for name, leaf in shapes_of(vj.LoKr(rank=100), 6, 4).items()} == {
        "w1": (2, 2),
        "w2": (3, 2),
    }
    vj.init(vj.LoKr(rank=100), jax.random.key(0), {"up": {"kernel": jnp.ones((6, 4))}})


@pytest.mark.parametrize("factor", [0, -2])
def test_a_factor_below_one_is_refused(factor):
    with pytest.raises(ConfigError, match=f"lokr: decompose_factor is {factor}; it must be at least 1, or -1"):
        vj.LoKr(decompose_factor=factor)
