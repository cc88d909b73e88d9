"""VB-LoRA: mixtures of bank vectors against NumPy, what a gradient reaches, starts, rates and published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, stacked_sites, trained_numbers

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError
from vlora_jax.training.optimizers import OptimizerConfig, rates

RNG = np.random.default_rng(0)
METHOD = vj.VBLoRA(rank=3, vectors=7, length=4, topk=2)
SHAPE = (8, 12)


def drawn(method=METHOD, shape=SHAPE):
    shapes = {
        "logits_a": (method.rank, shape[0] // method.length, method.vectors),
        "logits_b": (shape[1] // method.length, method.rank, method.vectors),
        "bank": (method.vectors, method.length),
    }
    return {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def mixture(row, bank, topk):
    """The softmax mixture of the vectors that a row of logits rates highest."""
    best = np.argsort(-row)[:topk]
    weights = np.exp(row[best] - row[best].max())
    return (weights[:, None] * bank[best]).sum(0) / weights.sum()


def composed(method, factors):
    """A (in, r) and B (r, out), sub-vector by sub-vector."""
    logits_a, logits_b, bank = (np.asarray(factors[name], np.float64) for name in ("logits_a", "logits_b", "bank"))
    mix = lambda row: mixture(row, bank, method.topk)
    a = np.stack([np.concatenate([mix(row) for row in of_rank]) for of_rank in logits_a], axis=1)
    b = np.stack([np.concatenate([mix(of_part[k]) for of_part in logits_b]) for k in range(method.rank)])
    return a, b


@pytest.mark.parametrize("topk", [1, 2, 7])
def test_factors_are_mixtures_of_bank_vectors(topk):
    method = vj.VBLoRA(rank=3, vectors=7, length=4, topk=topk)
    factors, x = drawn(method), jnp.asarray(RNG.normal(size=(5, 8)), jnp.float32)

    @jax.jit
    def run(factors, x):
        change = method.forward(x, jnp.zeros((5, 12)), jnp.zeros(SHAPE), factors)
        return change, method.delta(jnp.zeros(SHAPE), factors), *method.low_rank(SHAPE, factors)

    change, delta, left, right = run(factors, x)
    a, b = composed(method, factors)
    close(left, a)
    close(right, b)
    close(delta, a @ b)
    close(change, x @ a @ b)
    if topk == 1:  # each sub-vector is a vector of the bank
        parts = np.asarray(left).T.reshape(-1, 4)
        distance = np.abs(parts[:, None] - np.asarray(factors["bank"])).max(-1).min(1)
        assert not distance.any()


def test_only_chosen_logits_have_a_gradient():
    factors = drawn()
    loss = lambda factors: (METHOD.delta(jnp.zeros(SHAPE), factors) ** 2).sum()
    gradient = jax.jit(jax.grad(loss))(factors)
    for name in ("logits_a", "logits_b"):
        reached = np.asarray(gradient[name]) != 0
        assert (reached.sum(-1) == 2).all()
        chosen = np.argsort(-np.asarray(factors[name]), axis=-1)[..., :2]
        assert np.take_along_axis(reached, chosen, -1).all()
        assert np.abs(gradient[name].sum(-1)).max() < 1e-6 * np.abs(gradient[name]).max()  # of a softmax


def test_the_shared_bank_has_the_sum_of_its_uses_gradients():
    one, other = drawn(), drawn()
    change = lambda factors, bank: (METHOD.delta(jnp.zeros(SHAPE), factors | {"bank": bank}) ** 2).sum()
    both = lambda bank: change(one, bank) + change(other, bank)
    bank = one["bank"]
    total, *parts = jax.jit(
        lambda bank: (jax.grad(both)(bank), *(jax.grad(change, 1)(each, bank) for each in (one, other)))
    )(bank)
    close(total, parts[0] + parts[1], 1e-5)


def test_logits_that_were_left_out_of_a_file_may_be_minus_infinity():
    """PEFT's `save_only_topk_weights` keeps the chosen weights only; their logarithms give the same change."""
    factors = drawn()
    kept = {}
    for name in ("logits_a", "logits_b"):
        logits = np.asarray(factors[name])
        chosen = np.argsort(-logits, axis=-1)[..., :2]
        weights = np.asarray(jax.nn.softmax(np.take_along_axis(logits, chosen, -1)))
        left = np.full(logits.shape, -np.inf, np.float32)
        np.put_along_axis(left, chosen, np.log(weights), -1)
        kept[name] = jnp.asarray(left)
    delta = lambda factors: METHOD.delta(jnp.zeros(SHAPE), factors)
    squares = lambda factors: ((delta(factors) ** 2).sum(), delta(factors))
    run = jax.jit(jax.grad(squares, has_aux=True))
    (gradient, change), (_, expected) = run(factors | kept), run(factors)
    close(change, expected)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_the_bank_starts_uniform_and_small_and_logits_normal():
    sites = stacked_sites(2, q=(512, 256), v=(512, 512))
    adapter = jax.jit(lambda: vj.init(vj.VBLoRA(), jax.random.key(0), {}, sites))()
    bank = np.asarray(adapter.shared["bank"])
    assert bank.shape == (256, 256)
    assert 0.0199 < np.abs(bank).max() <= 0.02
    close(np.std(bank), 0.02 / np.sqrt(3), 1e-4)
    for site in sites:
        for name, shape in (("logits_a", (2, 4, 2, 256)), ("logits_b", (2, site.out_dim // 256, 4, 256))):
            logits = adapter.factors(site.path)[name]
            assert logits.shape == shape
            close(np.std(logits), 0.1, 5e-3)
            assert np.abs(logits[0] - logits[1]).max() > 0.1
    own = {name: value[0] for name, value in adapter.factors("v").items()}
    delta = jax.jit(vj.VBLoRA().delta)(jnp.zeros((512, 512)), own | adapter.shared)
    close(np.std(delta) / (np.sqrt(4) * 0.02**2 / 6), 1, 0.3)  # what its documentation says


def test_the_bank_learns_at_a_tenth_of_the_rate_of_logits():
    adapter = jax.eval_shape(lambda: vj.init(vj.VBLoRA(), jax.random.key(0), {}, stacked_sites(2, q=(512, 256))))
    relative = rates(OptimizerConfig(), adapter.trainable, adapter)
    assert relative == {path: 0.1 if path == "shared/bank" else 1.0 for path in flatten(adapter.trainable)}
    assert vj.VBLoRA.default_rate == 0.03


def test_it_trains_as_many_numbers_as_are_published():
    """Llama-3.2-3B, query and value, in PEFT's method comparison; and the shapes of PEFT's files."""
    sites = stacked_sites(28, q=(3072, 3072), v=(3072, 1024))
    assert trained_numbers(vj.VBLoRA(), sites) == 1_212_416
    method = vj.VBLoRA(rank=4, vectors=20, length=16)
    adapter = jax.eval_shape(lambda: vj.init(method, jax.random.key(0), {}, stacked_sites(1, v=(64, 32))))
    shapes = {
        name: leaf.shape
        for name, leaf in (*adapter.trainable["sites"]["v"].items(), *adapter.trainable["shared"].items())
    }
    assert shapes == {"logits_a": (1, 4, 4, 20), "logits_b": (1, 2, 4, 20), "bank": (20, 16)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topk": 0}, "vblora: topk is 0; it must be at least 1"),
        ({"topk": 9, "vectors": 8}, "vblora: topk is 9; the bank has 8 vectors"),
        ({"dropout": 1.0}, "vblora: dropout is 1.0; it must be at least 0 and below 1"),
        ({"bank_bound": 0.0}, "vblora: bank_bound is 0.0; it must be positive"),
        ({"bank_rate": -1.0}, "vblora: bank_rate is -1.0; it must be positive"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vj.VBLoRA(**options)


def test_a_length_that_does_not_divide_is_refused_with_one_that_does():
    with pytest.raises(ConfigError, match=r"length 256 does not divide the 384 inputs of q .* below it: 192"):
        trained_numbers(vj.VBLoRA(), stacked_sites(1, q=(384, 1536)))
