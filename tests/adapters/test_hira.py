"""HiRA: its formula, its gradient, and what a product with the kernel itself implies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters

import vlora_jax as vj
from vlora_jax.adapters.sites import Site

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    adapter = jax.jit(lambda base: vj.init(vj.HiRA(rank=2), jax.random.key(0), base))(base)
    return graphdef, base, moved(adapter)


def test_the_kernel_is_modulated_entry_by_entry(linear):
    """Σₖ diag(aₖ) W diag(bₖ), which is W ⊙ (A B)."""
    graphdef, base, adapter = linear
    kernel, factors = np.asarray(base["kernel"].get_value()), adapter.factors("")
    change = sum(np.diag(a) @ kernel @ np.diag(b) for a, b in zip(factors["a"].T, factors["b"], strict=True))
    out, merged = jax.jit(lambda: (vj.apply(graphdef, base, adapter, X), vj.merge(base, adapter)))()
    close(merged["kernel"].get_value(), kernel + change)
    close(out, X @ (kernel + change) + base["bias"].get_value())


def test_zeros_of_the_kernel_stay_zero_and_its_rank_multiplies(linear):
    """A change of rank r·rank(W), above r: 2 × rank 2 here."""
    _, _, adapter = linear
    kernel = np.random.default_rng(0).normal(size=(4, 2)) @ np.random.default_rng(1).normal(size=(2, 6))
    change = np.asarray(adapter.method.delta(jnp.asarray(kernel, jnp.float32), adapter.factors("")))
    assert np.linalg.matrix_rank(change, 1e-5) == 4
    kernel[1, 3] = 0
    assert np.asarray(adapter.method.delta(jnp.asarray(kernel, jnp.float32), adapter.factors("")))[1, 3] == 0


def test_factors_of_ones_double_the_kernel(linear):
    _, base, _ = linear
    kernel = base["kernel"].get_value()
    close(vj.HiRA(rank=1).delta(kernel, {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 6))}), kernel)


def test_its_gradient_is_the_dense_one_times_the_kernel(linear):
    """Of Σ y·C: ∂A = (W ⊙ xᵀC) Bᵀ, ∂B = Aᵀ (W ⊙ xᵀC)."""
    graphdef, base, adapter = linear
    cotangent = np.random.default_rng(3).normal(size=(5, 6)).astype(np.float32)
    loss = lambda trainable: (vj.apply(graphdef, base, adapter.with_trainable(trainable), X) * cotangent).sum()
    gradient = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][""]
    dense = np.asarray(base["kernel"].get_value()) * (X.T @ cotangent)
    close(gradient["a"], dense @ adapter.factors("")["b"].T)
    close(gradient["b"], adapter.factors("")["a"].T @ dense)


@pytest.mark.parametrize(("start", "deviation"), [("zero_b", 1 / 8 / 3**0.5), ("gaussian", 1 / 16)])
def test_it_starts_as_in_peft(start, deviation):
    site = lambda kind: Site("up", "kernel", kind, (), (64, 48), (0,), (1,))
    draw = jax.jit(vj.HiRA(rank=16, start=start).init_site, static_argnums=1)
    drawn = draw(jax.random.key(0), site("dense"), None).trainable
    close(np.std(drawn["a"]), deviation, 0.005)
    assert not drawn["b"].any()
    table = draw(jax.random.key(0), site("embed"), None).trainable
    assert not table["a"].any()
    close(np.std(table["b"]), 1.0, 0.1)


def test_it_trains_as_many_numbers_as_lora():
    base = {"q": {"kernel": jax.ShapeDtypeStruct((768, 768), jnp.float32)}}
    count = lambda method: vj.count(jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base))
    assert count(vj.HiRA()) == count(vj.LoRA(rank=32)) == 32 * 1536
