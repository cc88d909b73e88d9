"""DoRA: its formula, what its norm's missing gradient means, and when it is LoRA or nothing at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters, random_adapter
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    start = jax.jit(lambda base: vj.init(vj.DoRA(rank=2, alpha=3.0), jax.random.key(0), base))(base)
    return graphdef, base, start, moved(start)


def explicit(kernel, factors, scale=1.5):
    """W' by NumPy."""
    v = np.asarray(kernel) + scale * np.asarray(factors["a"]) @ np.asarray(factors["b"])
    return np.asarray(factors["m"]) * v / np.linalg.norm(v, axis=0)


def test_the_kernel_has_the_magnitudes_m_and_the_directions_of_v(linear):
    graphdef, base, _, adapter = linear
    out, merged = jax.jit(lambda: (vj.apply(graphdef, base, adapter, X), vj.merge(base, adapter)))()
    kernel = explicit(base["kernel"].get_value(), adapter.factors(""))
    close(merged["kernel"].get_value(), kernel)
    close(np.linalg.norm(merged["kernel"].get_value(), axis=0), np.abs(adapter.factors("")["m"]))
    close(out, X @ kernel + base["bias"].get_value())


def test_m_starts_as_the_norm_of_every_column(linear):
    _, base, start, _ = linear
    close(start.factors("")["m"], np.linalg.norm(base["kernel"].get_value(), axis=0))
    assert vj.count(start) == 2 * (4 + 6) + 6


def test_with_m_equal_to_the_norm_it_is_lora(linear):
    graphdef, base, _, adapter = linear
    factors = adapter.factors("")
    v = np.asarray(base["kernel"].get_value()) + 1.5 * np.asarray(factors["a"]) @ np.asarray(factors["b"])
    same = {"sites": {"": factors | {"m": jnp.asarray(np.linalg.norm(v, axis=0))}}, "shared": {}, "full": {}}
    lora = vj.init(vj.LoRA(rank=2, alpha=3.0), jax.random.key(0), base)
    lora = lora.with_trainable({"sites": {"": {n: factors[n] for n in "ab"}}, "shared": {}, "full": {}})
    dora = adapter.with_trainable(same)
    close(*jax.jit(lambda: (vj.apply(graphdef, base, dora, X), vj.apply(graphdef, base, lora, X)))())


def test_the_norm_has_no_gradient(linear):
    """The gradient is that of m / n · V with a constant n, and not that of the whole formula."""
    graphdef, base, _, adapter = linear
    kernel = base["kernel"].get_value()

    def loss(trainable):
        return (vj.apply(graphdef, base, adapter.with_trainable(trainable), X) ** 2).sum()

    def formula(factors, constant):
        v = kernel + 1.5 * factors["a"] @ factors["b"]
        n = jnp.linalg.norm(v, axis=0)
        n = jax.lax.stop_gradient(n) if constant else n
        return ((X @ (factors["m"] / n * v) + base["bias"].get_value()) ** 2).sum()

    ours = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][""]
    constant, through = (jax.jit(jax.grad(formula), static_argnums=1)(adapter.factors(""), c) for c in (True, False))
    for name in "abm":
        close(ours[name], constant[name], 1e-5)
    assert np.abs(ours["b"] - through["b"]).max() > 1e-2


def test_an_embedding_is_normed_over_its_vocabulary():
    graphdef, base = parameters(lambda rngs: nnx.Embed(7, 4, rngs=rngs))
    init = lambda base: vj.init(vj.DoRA(rank=2, alpha=3.0, targets=".*"), jax.random.key(0), base)
    adapter = moved(jax.jit(init)(base))
    assert adapter.factors("")["m"].shape == (4,)
    out = jax.jit(lambda: vj.apply(graphdef, base, adapter, jnp.arange(7)))()
    close(out, explicit(base["embedding"].get_value(), adapter.factors("")))


def test_dropout_acts_on_the_inputs_of_the_whole_change(linear):
    """x W + drop(x) (W' - W), at the price of another product with W, in training only."""
    graphdef, base, _, plain = linear
    adapter = dataclasses.replace(plain, method=dataclasses.replace(plain.method, dropout=0.5))
    call = lambda adapter, key: vj.apply(graphdef, base, adapter, X, key=key)
    bare, dropped = jax.jit(lambda key: (call(None, None), call(adapter, key)))(jax.random.key(1))
    kernel = np.asarray(base["kernel"].get_value())
    delta = explicit(kernel, adapter.factors("")) - kernel
    seen = np.linalg.lstsq(delta.T, np.asarray(dropped - bare, np.float64).T, rcond=None)[0].T
    gone, kept = np.abs(seen) < 1e-3, np.abs(seen - 2 * np.asarray(X)) < 1e-3
    assert (gone | kept).all()
    assert 0.2 < (gone & ~kept).mean() < 0.8
    products = lambda adapter, key: str(jax.make_jaxpr(lambda key: call(adapter, key))(key)).count("dot_general")
    assert products(adapter, None) == products(plain, jax.random.key(1)) == products(adapter, jax.random.key(1)) - 1


def test_a_layer_of_rank_zero_is_left_alone_and_does_not_train():
    base = parameters(LaxScanned)[1]
    method = vj.DoRA(rank=2, alpha=4.0, targets="up", rank_pattern={"up": [1, 0, 2]})
    adapter = moved(jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base))
    (site,) = adapter.sites
    kernel = flatten(base)[site.leaf_path]
    delta = np.asarray(jax.jit(lambda: site_delta(adapter, site, kernel))())
    assert not delta[1].any()
    factors = adapter.factors(site.path)
    for layer, rank in ((0, 1), (2, 2)):
        of_rank = {"a": factors["a"][layer][:, :rank], "b": factors["b"][layer][:rank], "m": factors["m"][layer]}
        close(delta[layer], explicit(kernel[layer], of_rank, 4.0 / rank) - kernel[layer])
    loss = lambda t: (site_delta(adapter.with_trainable(t), site, kernel) ** 2).sum()
    gradient = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][site.path]
    assert not any(np.asarray(leaf[1]).any() for leaf in gradient.values())
    assert not np.asarray(gradient["a"])[0, :, 1].any()
    assert all(np.asarray(leaf[2]).any() for leaf in gradient.values())


def test_a_column_of_zeros_gives_zeros_and_no_nan():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, use_bias=False, rngs=rngs))
    base["kernel"].set_value(base["kernel"].get_value().at[:, 2].set(0))
    adapter = jax.jit(lambda base: vj.init(vj.DoRA(rank=2), jax.random.key(0), base))(base)
    loss = lambda t: vj.apply(graphdef, base, adapter.with_trainable(t), X)[:, 2].sum()
    value, gradient = jax.jit(jax.value_and_grad(loss))(adapter.trainable)
    assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": True}, "dora: bias is true; only lora has a bias of B"),
        ({"start": "kaiming_both"}, "dora: start is 'kaiming_both'; it must be zero_b or gaussian"),
        ({"rank": 0}, "dora: rank is 0; it must be at least 1"),
    ],
)
def test_what_it_does_not_have_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vj.DoRA(**options)


def test_it_trains_as_many_numbers_as_are_published():
    """Llama-3.2-3B, query and value, rank 32 (PEFT's method comparison): 9 289 728."""
    block = lambda rngs: nnx.Dict(q=nnx.Linear(3072, 3072, rngs=rngs), v=nnx.Linear(3072, 1024, rngs=rngs))
    stack = lambda: nnx.Dict(layers=nnx.split_rngs(splits=28)(nnx.vmap(block))(nnx.Rngs(0)))
    base = vj.split(nnx.eval_shape(stack))[1]
    adapter = jax.eval_shape(lambda base: vj.init(vj.DoRA(rank=32, targets="q|v"), jax.random.key(0), base), base)
    assert vj.count(adapter) == 9_289_728


def test_random_factors_change_the_model(linear):
    graphdef, base, _, _ = linear
    adapter = random_adapter(vj.DoRA(rank=2), base)
    assert np.abs(vj.apply(graphdef, base, adapter, X) - vj.apply(graphdef, base, None, X)).max() > 1e-2
