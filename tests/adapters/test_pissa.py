"""PiSSA, and what all starts from a part of the kernel have in common: the start, the papers' form, the way to LoRA."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters
from test_lora import LLAMA_7B, Kernels, roberta
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.svd import principal, randomised
from vlora_jax.adapters.trees import flatten, replace_leaves
from vlora_jax.errors import ConfigError

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)
BOTH = pytest.mark.parametrize("kind", [vj.PiSSA, vj.OLoRA])


@pytest.fixture(scope="module")
def stacked():
    return parameters(LaxScanned)[1]


def truncated(kernel, rank):
    """The best approximation of a rank, by NumPy in float64."""
    u, sigma, v = np.linalg.svd(np.asarray(kernel, np.float64), full_matrices=False)
    return (u[..., :rank] * sigma[..., None, :rank]) @ v[..., :rank, :]


def principal_part(actual, kernel, rank):
    """`actual` is the truncated kernel to the rounding of an SVD in float32, which goes by the kernel's norm."""
    norm = np.linalg.norm(np.asarray(kernel, np.float64), axis=(-2, -1)).max()
    np.testing.assert_allclose(actual, truncated(kernel, rank), rtol=0, atol=1e-6 * max(1.0, norm))


def new(method, base):
    return jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)


@pytest.mark.parametrize("stabilised", [False, True])
def test_it_starts_from_the_principal_part_shared_evenly_between_a_and_b(stacked, stabilised):
    method = vj.PiSSA(rank=2, alpha=5.0, rank_stabilised=stabilised, targets="up|down")
    scale = 5.0 / (math.sqrt(2) if stabilised else 2)
    adapter = new(method, stacked)
    for site in adapter.sites:
        kernel, factors = site.read(flatten(stacked)), adapter.factors(site.path)
        sigma = np.linalg.svd(kernel, compute_uv=False)[:, :2]
        principal_part(scale * factors["a"] @ factors["b"], kernel, 2)
        close((factors["a"] ** 2).sum(1), sigma / scale)
        close((factors["b"] ** 2).sum(2), sigma / scale)
        for name in "ab":
            np.testing.assert_array_equal(factors[name], factors[f"{name}0"])


@BOTH
def test_it_computes_and_learns_what_the_paper_s_form_does(kind):
    """LoRA of the same A and B on the kernel less s·A₀ B₀."""
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    method = kind(rank=2, alpha=3.0)
    adapter = moved(new(method, base))
    start = adapter.frozen["sites"][""]
    residual = base["kernel"].get_value() - 1.5 * start["a0"] @ start["b0"]
    lora = vj.init(vj.LoRA(rank=2, alpha=3.0), jax.random.key(1), base).with_trainable(adapter.trainable)

    @jax.jit
    def both(trainable, residual):
        other = replace_leaves(base, {"kernel": residual})
        loss = lambda trainable, base, adapter: (
            jnp.sin(vj.apply(graphdef, base, adapter.with_trainable(trainable), X)).sum(),
            vj.apply(graphdef, base, adapter.with_trainable(trainable), X),
        )
        gradient = jax.grad(loss, has_aux=True)
        return gradient(trainable, base, adapter), gradient(trainable, other, lora)

    (ours, out), (theirs, expected) = both(adapter.trainable, residual)
    close(out, expected)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), ours, theirs)
    assert np.abs(out - vj.apply(graphdef, base, None, X)).max() > 1e-2


def decaying(size=(40, 30), rate=0.7):
    """A kernel with singular values rateⁱ."""
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(side, min(size))))[0] for side in size)
    return jnp.asarray(u * rate ** np.arange(min(size)) @ v.T, jnp.float32)


def test_the_fast_start_is_near_the_exact_one_after_some_iterations():
    kernel = decaying()
    near = jax.jit(randomised, static_argnums=(2, 3))
    best = np.linalg.norm(kernel - truncated(kernel, 4))
    errors = []
    for iterations in (0, 1, 4):
        p, sigma, q = near(jax.random.key(0), kernel, 4, iterations)
        close(p.T @ p, np.eye(4), 1e-5)
        close(q @ q.T, np.eye(4), 1e-5)
        errors.append(np.linalg.norm(kernel - p * sigma @ q) / best)
    assert errors[0] > errors[1] >= errors[2] - 1e-6
    assert errors[2] < 1 + 1e-5
    close(sigma, 0.7 ** np.arange(4), 1e-5)


def test_the_fast_start_depends_on_its_draw_and_changes_nothing_all_the_same():
    graphdef, base = parameters(lambda rngs: nnx.Linear(40, 30, rngs=rngs))
    x = jnp.ones((2, 40))
    start = jax.jit(lambda key: vj.init(vj.PiSSA(rank=2, alpha=2.0, niter=1), key, base))
    adapters = [start(jax.random.key(seed)) for seed in (0, 1)]
    products = [a.factors("")["a0"] @ a.factors("")["b0"] for a in adapters]
    exact = truncated(base["kernel"].get_value(), 2)
    for adapter, product in zip(adapters, products, strict=True):
        close(vj.apply(graphdef, base, adapter, x), vj.apply(graphdef, base, None, x), 1e-5)
        assert 1e-3 < np.linalg.norm(product - exact) / np.linalg.norm(exact) < 0.8
    assert np.abs(products[0] - products[1]).max() > 1e-3


def test_numpy_and_jax_take_the_same_triplets():
    kernel = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    for mine, theirs in zip(principal(kernel, 3), jax.jit(principal, static_argnums=1)(kernel, 3), strict=True):
        assert mine.shape == theirs.shape
    p, sigma, q = principal(kernel, 3)
    principal_part(p * sigma @ q, kernel, 3)


def test_each_layer_starts_from_its_own_principal_part_of_its_own_rank(stacked):
    method = vj.PiSSA(
        rank=2, alpha=6.0, targets="up|mix", rank_pattern={"up": [1, 0, 3]}, alpha_pattern={"mix": [1.0, 2.0, 4.0]}
    )
    adapter = new(method, stacked)
    ranks = {"blocks/up": [(1, 6.0), (0, 6.0), (3, 2.0)], "blocks/mix": [(2, 0.5), (2, 1.0), (2, 2.0)]}
    for site in adapter.sites:
        kernel, factors = site.read(flatten(stacked)), adapter.factors(site.path)
        for layer, (rank, scale) in enumerate(ranks[site.path]):
            a, b = (factors[name][layer] for name in ("a0", "b0"))
            principal_part(scale * a @ b, kernel[layer], rank)
            assert not a[:, rank:].any()
            assert not b[rank:].any()


@BOTH
@pytest.mark.parametrize("stabilised", [False, True])
def test_as_plain_lora_it_is_twice_the_rank_with_the_same_scale(stacked, kind, stabilised):
    method = kind(
        rank=2, alpha=6.0, rank_stabilised=stabilised, rank_pattern={"up": [1, 0, 3]},
        alpha_pattern={"down": 4.0, "mix": [1.0, 2.0, 4.0]}, full="up/bias", dropout=0.25,
    )  # fmt: skip
    adapter = moved(new(method, stacked))
    lora = method.exported(adapter)
    assert type(lora.method) is vj.LoRA
    assert (lora.method.rank, lora.method.dropout, lora.method.full) == (4, 0.25, "up/bias")
    assert lora.method.alpha == pytest.approx(6.0 * (math.sqrt(2) if stabilised else 2))
    sites = {site.path: site for site in adapter.sites}
    assert [rank for rank, _ in lora.method.by_layer(sites["blocks/up"])] == [2, 0, 6]
    own, both = adapter.factors("blocks/up"), lora.factors("blocks/up")["a"]
    for layer, rank in enumerate((1, 0, 3)):
        a, a0 = (own[name][layer, :, :rank] for name in ("a", "a0"))
        np.testing.assert_array_equal(both[layer, :, : 2 * rank], np.concatenate([a - a0, a0], axis=1))
    leaves = flatten(stacked)
    deltas = jax.jit(
        lambda *adapters: [{p: site_delta(a, s, s.read(leaves)) for p, s in sites.items()} for a in adapters]
    )
    ours, theirs = deltas(adapter, lora)
    for path, delta in ours.items():
        close(theirs[path], delta)
        assert np.abs(delta).max() > 1e-2
    np.testing.assert_array_equal(lora.trainable["full"]["blocks/up/bias"], adapter.trainable["full"]["blocks/up/bias"])


@BOTH
def test_one_plain_lora_holds_it_exactly_in_twice_the_rank(stacked, kind):
    adapter = moved(new(kind(rank=1, targets="up"), stacked))
    lora, residuals = vj.as_lora(stacked, adapter, max_rank=2)
    assert lora.method.rank == 2
    assert not any(residual.any() for residual in residuals.values())
    leaves = flatten(stacked)
    for site in adapter.sites:
        close(site_delta(lora, site, site.read(leaves)), site_delta(adapter, site, site.read(leaves)))


@BOTH
def test_sums_of_changes_keep_their_starts(kind):
    method, rng = kind(rank=2, alpha=3.0), np.random.default_rng(0)
    shapes = {"a": (3, 4, 2), "b": (3, 2, 6), "a0": (3, 4, 2), "b0": (3, 2, 6)}
    factors = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    weights, kernel = jnp.asarray([0.5, -2.0, 1.0]), jnp.zeros((4, 6))
    each = [method.delta(kernel, {name: value[n] for name, value in factors.items()}) for n in range(3)]
    close(method.delta(kernel, method.sum_factors(factors, weights)), np.tensordot(weights, np.stack(each), 1))


def test_the_svd_of_a_half_precision_kernel_is_taken_in_single_precision():
    kernel = jnp.asarray(decaying((12, 9)), jnp.bfloat16)
    site = Site("up", "kernel", "dense", (), (12, 9), (0,), (1,))
    factors = vj.PiSSA(rank=3, alpha=3.0).init_stack(jax.random.key(0), site, kernel).trainable
    principal_part(factors["a"] @ factors["b"], kernel.astype(jnp.float32), 3)


def test_starts_and_what_trains_from_them_are_arrays_of_their_own(stacked):
    """A step takes the state's arrays away: none may be there twice."""
    for adapter in (
        new(vj.PiSSA(rank=2, targets="up"), stacked),
        vj.init(vj.OLoRA(rank=2, targets="up"), jax.random.key(0), stacked),
    ):
        halved = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf / 2, tree), donate_argnums=0)
        before = np.array(adapter.factors("blocks/up")["a0"])
        close(halved(adapter).factors("blocks/up")["a0"], before / 2)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (vj.PiSSA, {"niter": -1}, "pissa: niter is -1; it must be at least 0"),
        (vj.PiSSA, {"rank": 0}, "pissa: rank is 0; it must be at least 1"),
        (vj.PiSSA, {"start": "gaussian"}, "pissa: start and bias are lora's only"),
        (vj.OLoRA, {"bias": True}, "olora: start and bias are lora's only"),
    ],
)
def test_options_that_it_does_not_have_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(**options)


@BOTH
def test_what_does_not_fit_the_sites_is_refused(stacked, kind):
    with pytest.raises(ConfigError, match=rf"{kind.name}: rank 5 is above the smaller side, 4, of blocks/\w+ "):
        vj.init(kind(rank=5), jax.random.key(0), stacked)
    with pytest.raises(ConfigError, match=rf"{kind.name}: alpha is 0.0 at blocks/up; it must be positive"):
        vj.init(kind(rank=2, alpha_pattern={"up": 0.0}), jax.random.key(0), stacked)
    site = Site("up", "kernel", "dense", (3,), (4, 6), (0,), (1,))
    with pytest.raises(ConfigError, match=f"{kind.name}: the start needs the base's values"):
        kind(rank=2).init_stack(jax.random.key(0), site)


@BOTH
@pytest.mark.parametrize(
    ("layers", "sides", "options", "numbers"),
    [
        (32, LLAMA_7B, {"rank": 128}, 319_815_680),
        (12, roberta(768), {"rank": 8}, 1_327_104),  # DeBERTa-v3-base, the paper's 1.33M
        (12, roberta(768), {"rank": 8, "targets": "query|key|value"}, 442_368),
        (12, roberta(768), {"rank": 8, "targets": "query|value"}, 294_912),
    ],
)
def test_as_many_numbers_train_as_are_published(kind, layers, sides, options, numbers):
    base = vj.split(nnx.eval_shape(lambda: Kernels(layers, sides, nnx.Rngs(0))))[1]
    adapter = jax.eval_shape(lambda base: vj.init(kind(**options), jax.random.key(0), base), base)
    assert vj.count(adapter) == numbers
    assert sum(leaf.size for leaf in jax.tree.leaves(adapter.frozen)) == numbers


def test_layers_with_two_axes_start_each_from_its_own_kernel():
    kernel = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    site = Site("experts", "kernel", "dense", (2, 3), (5, 4), (0,), (1,))
    init = jax.jit(vj.PiSSA(rank=2, alpha=2.0).init_stack, static_argnums=1)
    factors = init(jax.random.key(0), site, jnp.asarray(kernel)).trainable
    principal_part(factors["a"] @ factors["b"], kernel, 2)


@pytest.mark.parametrize("kind", [vj.PiSSA, vj.OLoRA])
def test_a_small_change_survives_a_bfloat16_base(kind):
    """A B - A₀ B₀ would cancel to noise there: each entry has moved by less than its last bit."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(64, 48)).astype(np.float32) / 8
    adapter = new(kind(rank=4), {"kernel": jnp.asarray(kernel)})
    factors = dict(adapter.factors(""))
    for name in ("a", "b"):
        factors[name] = factors[name] + jnp.asarray(rng.normal(0, 1e-5, factors[name].shape), jnp.float32)
    method = adapter.method.for_site(adapter.sites[0])
    x = jnp.asarray(rng.normal(size=(9, 64)), jnp.bfloat16)
    half = jnp.asarray(kernel, jnp.bfloat16)
    change = np.asarray(method.forward(x, x @ half, half, factors), np.float32)
    exact = np.asarray(x, np.float64) @ np.asarray(method.delta(jnp.asarray(kernel), factors), np.float64)
    assert np.abs(change - exact).max() < 0.02 * np.abs(exact).max()
