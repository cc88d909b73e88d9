"""LaMDA: its start, how rows of B freeze and stay frozen, what is left then, and LaMDA++'s ranks."""

import dataclasses
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters
from test_lora import LLAMA_7B, Kernels
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError
from vlora_jax.training.optimizers import OptimizerConfig, optimizer
from vlora_jax.training.step import Subject, train_step

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)


def new(method, base):
    return jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)


class Decaying(vj.LaMDA):
    """With the decay that it has none of by itself, so that it is seen to be held back as well."""

    decays = frozenset({"s", "b"})


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    return graphdef, base, new(Decaying(rank=3, steps=8, share=0.75), base)


def test_it_starts_from_the_svd_and_changes_nothing(linear):
    _, base, adapter = linear
    kernel, factors = base["kernel"].get_value(), adapter.factors("")
    u, sigma, v = np.linalg.svd(kernel, full_matrices=False)
    close(factors["s"], np.diag(sigma[:3]))
    close(factors["a"] @ factors["s"] @ factors["b"], u[:, :3] * sigma[:3] @ v[:3])
    close(factors["b"] @ factors["b"].T, np.eye(3), 1e-5)
    assert not site_delta(adapter, adapter.sites[0], kernel).any()


def test_its_gradients_are_the_kernel_s_between_the_other_factors(linear):
    graphdef, base, start = linear
    adapter = moved(start)
    loss = lambda trainable: jnp.sin(vj.apply(graphdef, base, adapter.with_trainable(trainable), X)).sum()
    gradient = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][""]
    kernel = vj.merge(base, adapter)["kernel"].get_value()
    of_kernel = np.asarray(X).T @ np.cos(X @ kernel + base["bias"].get_value())
    a, s, b = (np.asarray(adapter.factors("")[name]) for name in "asb")
    close(gradient["s"], a.T @ of_kernel @ b.T, 1e-5)
    close(gradient["b"], s.T @ a.T @ of_kernel, 1e-5)


def frozen_rows(method, step):
    return sum(step >= last for last in method.last_steps(method.rank))


def test_as_many_rows_are_frozen_at_a_step_as_the_schedule_says():
    """`k(i) = min(r, ⌊r i / (η T)⌋)`, exactly."""
    method = vj.LaMDA(rank=64, steps=1000)
    assert [frozen_rows(method, step) for step in (0, 100, 299, 300, 999)] == [0, 21, 63, 64, 64]
    for rank, steps, share in ((64, 1000, "0.3"), (7, 33, "0.7"), (5, 3, "1"), (8, 50, "0.1")):
        method = vj.LaMDA(rank=rank, steps=steps, share=float(share))
        for step in range(steps + 1):
            assert frozen_rows(method, step) == min(rank, Fraction(rank * step) / (Fraction(share) * steps) // 1)


def regression(model, batch, train):
    losses = ((model(batch["x"]) - batch["y"]) ** 2).sum(-1)
    return {"loss": losses.sum(), "correct": jnp.float32(0), "weight": jnp.float32(losses.size)}


def history(linear, name, adapter):
    """States of eight training steps, with a strong weight decay."""
    graphdef, base, _ = linear
    config = OptimizerConfig(name=name, rate=0.02, schedule="constant", warmup=0, decay=0.5, clip=1.0)
    tx = optimizer(config, 8, adapter.trainable, adapter)
    subject = Subject(graphdef, adapter, regression)
    step, rng = train_step(subject, tx), np.random.default_rng(3)
    state = jax.tree.map(jnp.array, subject.start(adapter, tx, jax.random.key(0)))
    states = [jax.tree.map(np.array, dataclasses.replace(state, key=None))]
    for _ in range(8):
        batch = {"x": rng.normal(size=(1, 5, 4)), "y": rng.normal(size=(1, 5, 6)), "id": np.zeros((1, 5), np.int32)}
        state, metrics = step(state, base, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), batch))
        states.append(jax.tree.map(np.array, dataclasses.replace(state, key=None)))
        assert metrics["finite"].all()
    return states


LAST = [2, 4, 6]  # steps that each of three rows trains: 0.75 · 8 · row / 3


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor"])
def test_rows_freeze_one_by_one_and_stay_bit_for_bit_under_decay_and_momentum(linear, name):
    *_, adapter = linear
    assert adapter.method.last_steps(3) == LAST
    states = history(linear, name, adapter)
    b, s = (np.stack([state.trainable["sites"][""][n] for state in states]) for n in "bs")
    for row, last in enumerate(LAST):
        assert all((b[step, row] != b[step + 1, row]).all() for step in range(last)), "a row trains until it freezes"
        assert (b[last:, row] == b[last, row]).all()
    assert all((s[step] != s[step + 1]).any(axis=(0, 1)) for step in range(8)), "S trains on"
    for step, state in enumerate(states):
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (3, 6)]
        assert len(moments) >= (2 if name == "adamw" else 1)
        for row, last in enumerate(LAST):
            assert all(moment[row].any() == (0 < step < last) for moment in moments)


def test_a_mask_of_gradients_and_moments_alone_would_not_hold_rows_under_decay(linear):
    class Leaky(Decaying):
        def allow(self, adapter: Adapter, updates):
            return updates

    *_, adapter = linear
    leaky = dataclasses.replace(adapter, method=Leaky(rank=3, steps=8, share=0.75))
    b = np.stack([state.trainable["sites"][""]["b"] for state in history(linear, "adamw", leaky)])
    assert (b[7, 0] != b[8, 0]).any()
    close(b[8, 0] / b[7, 0], np.full(6, 1 - 0.02 * 0.5), 1e-5)  # nothing but the decay


def test_frozen_it_is_lora_xs_on_the_same_sides(linear):
    graphdef, base, start = linear
    xs = new(vj.LoRAXS(rank=3, alpha=3.0), base)
    r = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)), jnp.float32)
    sigma = start.factors("")["sigma"]
    lamda = dataclasses.replace(
        start, frozen={"sites": {"": start.frozen["sites"][""] | {"left": jnp.zeros(3, int)}}, "shared": {}}
    )
    loss = lambda adapter: (
        lambda own: jnp.sin(
            vj.apply(graphdef, base, adapter.with_trainable(adapter.trainable | {"sites": {"": own}}), X)
        ).sum()
    )
    ours, theirs = jax.jit(
        lambda: (
            jax.value_and_grad(loss(lamda))({"s": jnp.diag(sigma) + sigma[:, None] * r, "b": start.factors("")["b"]}),
            jax.value_and_grad(loss(xs))({"r": r}),
        )
    )()
    close(ours[0], theirs[0], 1e-5)
    close(sigma[:, None] * ours[1]["s"], theirs[1]["r"], 1e-5)
    assert not ours[1]["b"].any()


def test_one_plain_lora_of_its_rank_holds_it_exactly():
    base = parameters(LaxScanned)[1]
    adapter = moved(new(vj.LaMDA(rank=2, targets="up"), base))
    lora, residuals = vj.as_lora(base, adapter, max_rank=2)
    assert not any(residual.any() for residual in residuals.values())
    for site in adapter.sites:
        kernel = site.read(flatten(base))
        close(site_delta(lora, site, kernel), site_delta(adapter, site, kernel))


def concentrated(rate, shape, rng):
    """A kernel with singular values rateⁱ: the smaller the rate, the more concentrated."""
    u, v = (np.linalg.qr(rng.normal(size=(side, min(shape))))[0] for side in shape)
    return u * rate ** np.arange(min(shape)) @ v.T


RATES = {"up": [0.9, 0.2, 0.6], "out": [0.5, 0.8, 0.3]}


@pytest.fixture(scope="module")
def spread():
    """Two stacked kernels with spectra of six different concentrations, and their LaMDA++ adapter."""
    rng = np.random.default_rng(0)
    shapes = {"up": (5, 8), "out": (8, 6)}
    base = {n: {"kernel": np.stack([concentrated(r, s, rng) for r in RATES[n]])} for n, s in shapes.items()}
    sites = [vj.Site(n, "kernel", "dense", (3,), s, (0,), (1,)) for n, s in shapes.items()]
    base = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), base)
    method = vj.LaMDA(rank=2, ranks=[1, 2, 4], steps=8, share=0.5)
    return base, sites, jax.jit(lambda base: vj.init(method, jax.random.key(0), base, sites))(base)


def test_the_less_concentrated_a_spectrum_the_larger_its_rank_at_a_fixed_total(spread):
    _, _, adapter = spread
    ranks = {}
    for name, rates in RATES.items():
        left = adapter.factors(name)["left"]
        ranks |= dict(zip(rates, (left > 0).sum(-1).tolist(), strict=True))
        assert left.shape == (3, 4)
    assert ranks == {0.9: 4, 0.8: 4, 0.6: 2, 0.5: 2, 0.3: 1, 0.2: 1}
    assert adapter.factors("up")["left"].tolist() == [[1, 2, 3, 4], [4, 0, 0, 0], [2, 4, 0, 0]]


def test_each_layer_starts_from_the_triplets_of_its_rank(spread):
    base, sites, adapter = spread
    for site, ranks in zip(sites, ((4, 1, 2), (2, 4, 1)), strict=True):
        kernels, factors = base[site.path]["kernel"], adapter.factors(site.path)
        assert not site_delta(adapter, site, kernels).any()
        for layer, rank in enumerate(ranks):
            u, sigma, v = np.linalg.svd(kernels[layer], full_matrices=False)
            product = factors["a"][layer] @ factors["s"][layer] @ factors["b"][layer]
            close(product, u[:, :rank] * sigma[:rank] @ v[:rank], 1e-6 * max(1.0, np.linalg.norm(sigma)))


def test_numbers_beyond_a_layer_s_rank_have_no_gradient_at_all(spread):
    base, (up, out), adapter = spread
    noise = moved(adapter)
    live = {site.path: np.asarray(adapter.factors(site.path)["left"] > 0) for site in (up, out)}
    masks = {path: {"s": rows[..., None] & rows[:, None], "b": rows[..., None]} for path, rows in live.items()}
    inside = {p: {n: noise.factors(p)[n] * mask[n] for n in mask} for p, mask in masks.items()}
    loss = lambda t: sum(
        (site_delta(adapter.with_trainable(t), s, base[s.path]["kernel"]) ** 2).sum() for s in (up, out)
    )
    gradient = jax.jit(jax.grad(loss))(adapter.trainable | {"sites": inside})["sites"]
    for path, mask in masks.items():
        for name, where in mask.items():
            np.testing.assert_array_equal(gradient[path][name] != 0, np.broadcast_to(where, gradient[path][name].shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "lamda: steps is -1; it must be at least 0"),
        ({"share": 0.0}, "lamda: share is 0.0; it must be above 0 and at most 1"),
        ({"share": 1.5}, "lamda: share is 1.5; it must be above 0 and at most 1"),
        ({"rank": 0}, "lamda: rank is 0; it must be at least 1"),
        (
            {"ranks": [32], "rank_pattern": {"up": 2}},
            "lamda: ranks gives each layer its rank; it takes no rank_pattern",
        ),
        ({"ranks": 4}, "lamda: ranks is 4; it must be a list of whole numbers"),
        ({"ranks": [2.5]}, "lamda: an entry of ranks is 2.5; it must be a whole number"),
        ({"rank": 4, "ranks": [0, 4]}, r"lamda: ranks are \[0, 4\]; they must be at least 1, and one at least rank, 4"),
        ({"rank": 4, "ranks": [2, 3]}, r"lamda: ranks are \[2, 3\]; they must be at least 1, and one at least rank, 4"),
    ],
)
def test_impossible_options_are_refused(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.LaMDA(**options)


def test_a_rank_above_the_smaller_side_is_refused(linear):
    _, base, _ = linear
    with pytest.raises(ConfigError, match=r"lamda: rank 5 is above the smaller side, 4, of  \(4, 6\)"):
        vj.init(vj.LaMDA(rank=2, ranks=[1, 5]), jax.random.key(0), base)


@pytest.mark.parametrize(
    ("layers", "sides", "rank", "at_first", "at_the_end"),
    [(1, {"q": (4096, 4096)}, 32, 132_096, 1_024), (32, LLAMA_7B, 64, 87_949_312, 917_504)],
)
def test_as_many_numbers_train_as_counted_at_first_and_at_the_end(layers, sides, rank, at_first, at_the_end):
    base = vj.split(nnx.eval_shape(lambda: Kernels(layers, sides, nnx.Rngs(0))))[1]
    adapter = jax.eval_shape(lambda base: vj.init(vj.LaMDA(rank=rank), jax.random.key(0), base), base)
    assert vj.count(adapter) == at_first
    assert sum(factors["s"].size for factors in adapter.trainable["sites"].values()) == at_the_end
