"""DeLoRA: its formula, its bound, its two starts and the gradient at them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    begin = lambda base, start: vj.init(vj.DeLoRA(rank=2, boundary=3.0, start=start), jax.random.key(0), base)
    starts = {start: jax.jit(begin, static_argnums=1)(base, start) for start in ("zero_b", "residual")}
    return graphdef, base, starts


def test_a_strength_of_zero_is_refused():
    for options in ({"boundary": 0.0}, {"boundary_pattern": {"up": 0.0}}):
        with pytest.raises(ConfigError, match=r"delora: .*boundary is 0, at which nothing trains"):
            vj.DeLoRA(**options)
    assert vj.DeLoRA(boundary=0.0, start="residual").boundary == 0, "there B is not zero, and the strength trains"


def explicit(kernel, factors, boundary):
    """ΔW by NumPy, one direction after the other."""
    a, b = np.asarray(factors["a"], np.float64), np.asarray(factors["b"], np.float64)
    rank = a.shape[1]
    lengths = [max(np.linalg.norm(a[:, k]), 1e-4) * max(np.linalg.norm(b[k]), 1e-4) for k in range(rank)]
    change = sum(boundary / rank / lengths[k] * np.outer(a[:, k], b[k]) for k in range(rank))
    return np.linalg.norm(np.asarray(kernel, np.float64), axis=1)[:, None] * change


def test_the_change_is_a_sum_of_unit_directions_with_one_strength(linear):
    graphdef, base, starts = linear
    adapter, kernel = moved(starts["zero_b"]), np.asarray(base["kernel"].get_value())
    change = explicit(kernel, adapter.factors(""), float(adapter.factors("")["boundary"]))
    out, merged = jax.jit(lambda: (vj.apply(graphdef, base, adapter, X), vj.merge(base, adapter)))()
    close(merged["kernel"].get_value(), kernel + change)
    close(out, X @ (kernel + change) + base["bias"].get_value())


def test_its_norm_is_bounded_by_the_strength_and_lengths_do_not_count(linear):
    _, base, starts = linear
    adapter = moved(starts["zero_b"])
    factors, kernel = adapter.factors(""), base["kernel"].get_value()
    delta = jax.jit(adapter.method.delta)
    change = delta(kernel, factors)
    assert np.linalg.norm(change / factors["w"][:, None]) <= factors["boundary"]
    scaled = factors | {"a": factors["a"] * jnp.array([100.0, 0.2]), "b": factors["b"] * jnp.array([[7.0], [30.0]])}
    close(delta(kernel, scaled), change)
    close(delta(kernel, factors | {"boundary": -2 * factors["boundary"]}), -2 * np.asarray(change))
    one = jnp.concatenate([factors["a"][:, :1]] * 2, axis=1), jnp.concatenate([factors["b"][:1]] * 2)
    same = delta(kernel, factors | {"a": one[0], "b": one[1]})  # the bound is reached where directions agree
    close(np.linalg.norm(same / factors["w"][:, None]), factors["boundary"])


def test_a_b_of_zero_counts_as_short_and_has_a_gradient_without_nan(linear):
    """At B = 0: ∂ΔW/∂bₖ = diag(w)·(λ/r)·aₖ / (‖aₖ‖·1e-4); A and λ have none."""
    graphdef, base, starts = linear
    start = starts["zero_b"]
    cotangent = np.random.default_rng(3).normal(size=(5, 6)).astype(np.float32)
    loss = lambda trainable: (vj.apply(graphdef, base, start.with_trainable(trainable), X) * cotangent).sum()
    gradient = jax.jit(jax.grad(loss))(start.trainable)["sites"][""]
    assert not gradient["a"].any()
    assert gradient["boundary"] == 0
    factors = {name: np.asarray(value) for name, value in start.factors("").items()}
    left = factors["w"][:, None] * factors["a"] / np.linalg.norm(factors["a"], axis=0) * 3.0 / 2 / 1e-4
    close(gradient["b"], left.T @ np.asarray(X.T @ cotangent), 1e-5)


def test_the_residual_start_subtracts_the_first_change_for_ever(linear):
    graphdef, base, starts = linear
    start, kernel = starts["residual"], np.asarray(base["kernel"].get_value())
    first = explicit(kernel, start.factors(""), 3.0)
    assert np.linalg.norm(first) > 0.1
    adapter = moved(start)
    assert set(adapter.frozen["sites"][""]) == {"w", "a0", "b0"}
    later = explicit(kernel, adapter.factors(""), float(adapter.factors("")["boundary"]))
    merged, at_start = jax.jit(lambda: (vj.merge(base, adapter), vj.apply(graphdef, base, start, X)))()
    close(merged["kernel"].get_value(), kernel + later - first)
    close(at_start, vj.apply(graphdef, base, None, X))


def test_every_layer_has_its_own_strength_and_lengths():
    base = parameters(LaxScanned)[1]
    method = vj.DeLoRA(rank=2, boundary_pattern={"up": 4.0}, targets="up|mix")
    adapter = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)
    for path, boundary in (("blocks/up", 4.0), ("blocks/mix", 1.0)):
        np.testing.assert_array_equal(adapter.factors(path)["boundary"], np.full(3, boundary))
    kernel = np.asarray(flatten(base)["blocks/up/kernel"])
    close(adapter.factors("blocks/up")["w"], np.linalg.norm(kernel, axis=2))


def test_it_trains_one_number_more_than_lora():
    base = {"q": {"kernel": jax.ShapeDtypeStruct((768, 768), jnp.float32)}}
    adapter = jax.eval_shape(lambda base: vj.init(vj.DeLoRA(rank=8), jax.random.key(0), base), base)
    assert vj.count(adapter) == 8 * 1536 + 1


def test_shapes_alone_are_no_start():
    with pytest.raises(ConfigError, match="delora: the start needs the base's values"):
        vj.DeLoRA(rank=2).init_site(jax.random.key(0), vj.Site("", "kernel", "dense", (), (4, 6), (0,), (1,)), None)
