"""IA³: which side is scaled, what becomes of the bias, and how few numbers train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters

import vlora_jax as vj
from vlora_jax.errors import ConfigError, TargetError

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)


@pytest.fixture(scope="module")
def block():
    """Square layers with a bias, so that a wrong side gives no error of shapes."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
            self.bare = nnx.Linear(4, 3, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.bare(self.down(jnp.tanh(self.up(x))))

    graphdef, base = parameters(Block)
    start = vj.init(vj.IA3(feedforward="down"), jax.random.key(0), base)
    return graphdef, base, start, moved(start)


def read(base, path):
    leaves = base[path]
    return tuple(np.asarray(leaves[name].get_value(), np.float64) for name in ("kernel", "bias") if name in leaves)


def test_it_scales_outputs_with_their_bias_and_inputs_without(block):
    """By NumPy: l ⊙ (x W + b), and (l ⊙ x) W + b where inputs are scaled."""
    graphdef, base, _, adapter = block
    (up, up_bias), (down, down_bias), (bare,) = (read(base, path) for path in ("up", "down", "bare"))
    l_up, l_down, l_bare = (np.asarray(adapter.factors(p)[n], np.float64) for p, n in
                            (("up", "l_out"), ("down", "l_in"), ("bare", "l_out")))  # fmt: skip
    h = np.tanh(l_up * (np.asarray(X, np.float64) @ up + up_bias))
    expected = l_bare * (((l_down * h) @ down + down_bias) @ bare)
    out = jax.jit(lambda: (vj.apply(graphdef, base, adapter, X), vj.apply(graphdef, vj.merge(base, adapter), None, X)))
    for each in out():
        close(each, expected)


def test_the_merged_bias_is_scaled_where_outputs_are(block):
    _, base, _, adapter = block
    merged = vj.merge(base, adapter)
    close(read(merged, "up")[1], adapter.factors("up")["l_out"] * read(base, "up")[1])
    np.testing.assert_array_equal(read(merged, "down")[1], read(base, "down")[1])
    close(read(merged, "down")[0], np.asarray(adapter.factors("down")["l_in"])[:, None] * read(base, "down")[0])


def test_gradients_are_those_of_the_formula(block):
    _, base, _, _ = block
    (kernel, bias), cotangent = read(base, "up"), np.random.default_rng(3).normal(size=(5, 4))
    only = vj.init(vj.IA3(targets="up"), jax.random.key(0), base)
    method, factors = only.method, only.factors("up")
    y = jnp.asarray(X @ kernel, jnp.float32)
    loss = lambda l_out: (method.forward(X, y, jnp.asarray(kernel), factors | {"l_out": l_out}) * cotangent).sum()
    close(jax.grad(loss)(factors["l_out"]), ((np.asarray(X) @ kernel + bias) * cotangent).sum(0), 1e-5)
    other = vj.init(vj.IA3(targets="up", feedforward="up"), jax.random.key(0), base)
    loss = lambda l_in: (other.method.forward(X, y, jnp.asarray(kernel, jnp.float32), {"l_in": l_in}) * cotangent).sum()
    close(jax.grad(loss)(other.factors("up")["l_in"]), (np.asarray(X) * (cotangent @ kernel.T)).sum(0), 1e-5)


@pytest.mark.parametrize("feedforward", [None, ".*"])
def test_an_embedding_s_columns_or_rows_are_scaled(feedforward):
    graphdef, base = parameters(lambda rngs: nnx.Embed(7, 4, rngs=rngs))
    adapter = moved(vj.init(vj.IA3(targets=".*", feedforward=feedforward), jax.random.key(0), base))
    table = np.asarray(base["embedding"].get_value())
    (scale,) = adapter.trainable["sites"][""].values()
    expected = table * (scale if feedforward is None else np.asarray(scale)[:, None])
    close(vj.apply(graphdef, base, adapter, jnp.arange(7)), expected)
    close(vj.merge(base, adapter)["embedding"].get_value(), expected)


def test_it_trains_one_number_an_output_or_input():
    """Llama-7B, keys, values and the last layer of the MLP: 32 · (4096 + 4096 + 11008)."""
    site = lambda name, *shape: vj.Site(name, "kernel", "dense", (32,), shape, (0,), (1,))
    sites = [site("k", 4096, 4096), site("v", 4096, 4096), site("down", 11008, 4096)]
    adapter = jax.eval_shape(lambda: vj.IA3(feedforward="down").init(jax.random.key(0), sites, {}))
    assert vj.count(adapter) == 614_400
    assert jax.tree.map(jnp.shape, adapter.trainable["sites"]) == {
        "k": {"l_out": (32, 4096)},
        "v": {"l_out": (32, 4096)},
        "down": {"l_in": (32, 11008)},
    }


def test_what_it_cannot_do_is_refused(block):
    _, base, _, _ = block
    with pytest.raises(TargetError, match="ia3: feedforward: target 'gate' matches nothing"):
        vj.init(vj.IA3(feedforward="gate"), jax.random.key(0), base)
    site = vj.Site("up", "kernel", "dense", (3,), (4, 4), (0,), (1,))
    with pytest.raises(ConfigError, match=r"ia3: up/bias is \(4,\), not \(3, 4\) with layers first; exclude up, or"):
        vj.IA3().init(jax.random.key(0), [site], {"up": {"bias": jnp.zeros(4)}})


def test_biases_with_axes_of_their_own_are_scaled_too():
    """Flax's attention keeps biases as (heads, features of a head)."""
    make = lambda rngs: nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
    graphdef, base = parameters(make)
    adapter = moved(vj.init(vj.IA3(targets="query|value|out", feedforward="out"), jax.random.key(0), base))
    assert adapter.factors("query")["bias"].shape == (4,)
    x = X[None]
    out = jax.jit(lambda: [vj.apply(graphdef, *of, x) for of in ((base, adapter), (vj.merge(base, adapter), None))])
    close(*out())
