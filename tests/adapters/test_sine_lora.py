"""Sine-activated low rank: its formula, bound, gradient and limit, and the rank that the sine gives it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters
from test_lora import Kernels
from test_lora_xs import LLAMA3_8B
from tiny import abstract
from tiny import filled as normal

import vlora_jax as vj
from vlora_jax.errors import ConfigError

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    method = vj.SineLoRA(rank=2, alpha=3.0, frequency=20.0)
    return graphdef, base, jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)


def numpy_of(adapter):
    return (np.asarray(adapter.factors("")[name], np.float64) for name in "ab")


def test_the_change_is_the_sine_of_the_product(linear):
    graphdef, base, start = linear
    adapter = moved(start)
    a, b = numpy_of(adapter)
    delta = 1.5 * np.sin(20 * a @ b) / 2
    kernel = np.asarray(base["kernel"].get_value())
    close(vj.merge(base, adapter)["kernel"].get_value(), kernel + delta, 1e-5)
    close(
        jax.jit(lambda: vj.apply(graphdef, base, adapter, X))(), X @ (kernel + delta) + base["bias"].get_value(), 1e-5
    )
    assert np.abs(delta).max() <= 1.5 / 2
    assert np.abs(delta).max() > 0.6


def test_a_starts_as_lora_s_and_b_at_zero(linear):
    _, _, start = linear
    a, b = numpy_of(start)
    assert 0.3 < np.abs(a).max() <= 0.5
    assert not b.any()


def test_its_gradients_are_those_of_the_formula(linear):
    """`∂L/∂B = (α ω / (r √in)) · Aᵀ (G ∘ cos(ω A B))`, and likewise for A."""
    graphdef, base, start = linear
    adapter = moved(start)
    a, b = numpy_of(adapter)
    kernel = np.asarray(base["kernel"].get_value()) + 1.5 * np.sin(20 * a @ b) / 2
    of_kernel = np.asarray(X).T @ np.cos(X @ kernel + base["bias"].get_value())
    loss = lambda trainable: jnp.sin(vj.apply(graphdef, base, adapter.with_trainable(trainable), X)).sum()
    gradient = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][""]
    inner = 1.5 * 20 / 2 * of_kernel * np.cos(20 * a @ b)
    close(gradient["b"], a.T @ inner, 1e-4)
    close(gradient["a"], inner @ b.T, 1e-4)


def test_a_low_frequency_makes_it_lora(linear):
    *_, start = linear
    adapter = moved(start)
    a, b = numpy_of(adapter)
    method = vj.SineLoRA(rank=2, alpha=3.0 * 2 / 1e-3, frequency=1e-3)  # alpha √in / ω
    close(method.delta(jnp.zeros((4, 6)), adapter.factors("")), 1.5 * a @ b, 1e-5)


def test_the_sine_raises_the_rank_the_more_the_higher_its_frequency():
    rng = np.random.default_rng(0)
    bound = 1 / np.sqrt(128)
    factors = {"a": jnp.asarray(rng.uniform(-bound, bound, (128, 1))), "b": jnp.asarray(rng.normal(size=(1, 128)))}
    ranks = []
    for frequency in (1.0, 10.0, 100.0, 2000.0):
        delta = vj.SineLoRA(rank=1, frequency=frequency).delta(jnp.zeros((128, 128)), factors)
        sigma = np.linalg.svd(np.asarray(delta), compute_uv=False)
        ranks.append(int((sigma > 1e-5 * sigma[0]).sum()))
    assert 1 < ranks[0] < ranks[1] < ranks[2] < ranks[3]
    assert ranks[3] > 64


def test_no_array_of_the_kernel_s_size_is_kept_for_the_backward_pass(linear):
    graphdef, base, start = linear
    run = lambda trainable: vj.apply(graphdef, base, start.with_trainable(trainable), X)
    kept = jax.tree.leaves(jax.eval_shape(lambda: jax.vjp(run, start.trainable)[1]))
    assert [leaf.shape for leaf in kept].count((4, 6)) <= 1  # the base's


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frequency": 0.0}, "sine_lora: frequency is 0.0; it must be positive"),
        ({"rank": 0}, "sine_lora: rank is 0; it must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vj.SineLoRA(**options)


def test_as_many_numbers_train_as_of_lora():
    """Llama-3-8B, query, key, value, up and down, rank 4: 7 077 888."""
    base = vj.split(nnx.eval_shape(lambda: Kernels(32, LLAMA3_8B, nnx.Rngs(0))))[1]
    method = vj.SineLoRA(rank=4, targets="q|k|v|up|down")
    assert vj.count(jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base)) == 7_077_888


@pytest.mark.parametrize("structure", ["star", "chain"])
def test_as_increments_of_a_vertical_stack_it_is_what_the_expanded_layers_compute(structure):
    vertical = vj.Vertical(size=3, structure=structure, increment=vj.SineLoRA(rank=2, frequency=5.0))
    graphdef, shapes = abstract(vertical=vertical)
    base, x = jax.tree.map(jnp.asarray, normal(shapes)), jnp.ones((2, 6))

    @jax.jit
    def both(base):
        return vj.apply(graphdef, base, None, x), vj.apply(*vj.expand(graphdef, base), None, x)

    shared, dense = both(base)
    close(shared, dense, 1e-5)
    assert np.abs(shared[0] - shared[0].mean()).max() > 1e-3
