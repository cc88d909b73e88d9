"""BiLoRA: its hypergradient against a closed form, finite differences and the limit of no inner step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters, squared_error, trainer

import vlora_jax as vj
from vlora_jax.adapters.method import Slope
from vlora_jax.errors import ConfigError
from vlora_jax.training.loss import next_token

RNG = np.random.default_rng(7)
FREE = {"orthogonality": 0.0, "rank": 2, "alpha": 2.0}  # s = 1


def toy(values, rng=RNG):
    """An adapter of one site with these tensors, and losses of two sets of examples: quadratics of all of them.

    L_j(w) = ½ wᵀ H_j w + g_jᵀ w, with w = (A, B, e) in one row.
    """
    site = vj.Site("s", "kernel", "dense", (), (2, 3), (0,), (1,))
    parts = {"a": (2, 2), "b": (2, 3), "e": (2,)}
    size = sum(int(np.prod(shape)) for shape in parts.values())
    h, g = rng.normal(size=(2, size, size)), rng.normal(size=(2, size))
    h = h + h.transpose(0, 2, 1)
    ends = np.cumsum([int(np.prod(shape)) for shape in parts.values()])[:-1]
    unpack = lambda w: {n: p.reshape(s) for (n, s), p in zip(parts.items(), jnp.split(w, ends), strict=True)}
    pack = lambda tree: jnp.concatenate([tree["sites"]["s"][name].reshape(-1) for name in parts])
    tree = lambda w: {"sites": {"s": unpack(w)}, "shared": {}, "full": {}}
    adapter = vj.Adapter.of(values, [site], trainable={"s": unpack(jnp.asarray(rng.normal(size=size), jnp.float32))})

    def loss(w, level):
        return 0.5 * w @ jnp.asarray(h[level], w.dtype) @ w + jnp.asarray(g[level], w.dtype) @ w

    def gradient(trainable, chosen=None):
        """Every example belongs to the set that its weight says: 1 − weight of the only id."""
        level = lambda w, share: share * loss(w, 1) + (1 - share) * loss(w, 0)
        w, share = pack(trainable), (0.5 if chosen is None else chosen[0, 1] / chosen.sum())
        sums = {"loss": level(w, share), "correct": jnp.zeros(()), "weight": jnp.ones(())}
        return Slope(tree(jax.grad(level)(w, share)), sums, {})

    return adapter, gradient, h, g, np.asarray(pack(adapter.trainable), np.float64)


def two_ids(method):
    """Numbers of one example of D1 and one of D2."""
    upper = np.asarray(method.in_upper(jnp.arange(100)))
    return jnp.array([[int(np.argmin(upper)), int(np.argmax(upper))]])


@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_the_hypergradient_is_that_of_the_closed_form_and_of_finite_differences(eta):
    method = vj.BiLoRA(inner_rate=eta, **FREE)
    adapter, gradient, h, g, w = toy(method)
    ids = two_ids(method)
    slope = jax.jit(lambda adapter: method.gradients(gradient, adapter, ids))(adapter)
    found = {name: np.asarray(value).reshape(-1) for name, value in slope.grads["sites"]["s"].items()}
    vectors, values = np.arange(10), np.arange(10, 12)

    def ahead(w):
        """W with V after one step down L1."""
        w = w.copy()
        w[vectors] -= eta * (h[0] @ w + g[0])[vectors]
        return w

    def upper_loss(e):
        at = ahead(np.concatenate([w[vectors], e]))
        return 0.5 * at @ h[1] @ at + g[1] @ at

    lower = h[0] @ w + g[0]
    close(np.concatenate([found["a"], found["b"]]), lower[vectors], 1e-5)
    at = h[1] @ ahead(w) + g[1]
    closed = at[values] - eta * h[0][np.ix_(values, vectors)] @ at[vectors]
    close(found["e"], closed, 1e-5)
    step = 1e-5 * np.eye(2)
    e = w[values]
    differences = [(upper_loss(e + d) - upper_loss(e - d)) / 2e-5 for d in step]
    np.testing.assert_allclose(closed, differences, rtol=1e-6, atol=1e-6)
    if eta == 0:  # each level takes the other as it is
        close(found["e"], (h[1] @ w + g[1])[values], 1e-5)


def test_the_inner_step_feels_the_penalty():
    """V1 is where the loss and the penalty pull; the optimiser's gradient of V is without it, the step adds it."""
    method = vj.BiLoRA(inner_rate=0.1, **(FREE | {"orthogonality": 0.7}))
    adapter, gradient, h, g, w = toy(method)
    ids = two_ids(method)
    slope = jax.jit(lambda adapter: method.gradients(gradient, adapter, ids))(adapter)
    pull = jax.grad(lambda t: method.penalty(adapter.with_trainable(t)))(adapter.trainable)["sites"]["s"]
    pull = np.concatenate([np.asarray(pull[name]).reshape(-1) for name in "ab"])
    lower, vectors, values = h[0] @ w + g[0], np.arange(10), np.arange(10, 12)
    at = w.copy()
    at[vectors] -= 0.1 * (lower[vectors] + pull)
    at = h[1] @ at + g[1]
    found = slope.grads["sites"]["s"]
    close(found["e"], at[values] - 0.1 * h[0][np.ix_(values, vectors)] @ at[vectors], 1e-5)
    close(np.asarray(found["a"]).reshape(-1), lower[:4], 1e-5)
    assert np.abs(pull).max() > 0.1


def test_the_split_is_by_number_and_of_its_share():
    method = vj.BiLoRA(upper=0.2)
    ids = jnp.arange(5000, dtype=jnp.int32)
    upper = np.asarray(method.in_upper(ids))
    assert set(upper) == {0, 1}
    np.testing.assert_allclose(upper.mean(), 0.2, atol=0.002)
    np.testing.assert_array_equal(method.in_upper(ids.reshape(50, 100)[::-1]), upper.reshape(50, 100)[::-1])


class Net(nnx.Module):
    """Two layers and a tanh, so that the levels' second derivatives are not constant."""

    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


@pytest.fixture(scope="module")
def net():
    graphdef, base = parameters(Net)
    adapter = moved(jax.jit(lambda base: vj.init(vj.BiLoRA(**FREE), jax.random.key(0), base))(base))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 10, 4)).astype(np.float32)
    batch = {"x": x, "y": rng.normal(size=(2, 10, 3)).astype(np.float32), "id": np.arange(20).reshape(2, 10)}
    return graphdef, base, adapter, batch


def on(adapter, **options):
    return dataclasses.replace(adapter, method=dataclasses.replace(adapter.method, **options))


def test_a_step_of_a_real_model_takes_the_gradient_of_the_unrolled_loss(net):
    """Descent with rate 1 goes by the gradients; E's is that of L2(V − η∇L1, E), differentiated as a whole."""
    graphdef, base, adapter, batch = net
    adapter, eta = on(adapter, inner_rate=0.3), 0.3
    upper = np.asarray(adapter.method.in_upper(jnp.asarray(batch["id"]))).reshape(-1)
    assert 0 < upper.sum() < 20
    flat = {name: jnp.asarray(value).reshape(20, *value.shape[2:]) for name, value in batch.items()}

    def mean(trainable, weight):
        sums = squared_error(
            lambda x: vj.apply(graphdef, base, adapter.with_trainable(trainable), x), flat | {"weight": weight}, True
        )
        return sums["loss"] / sums["weight"]

    def split(trainable):
        of = lambda keep: {
            path: {n: v for n, v in f.items() if (n == "e") == keep} for path, f in trainable["sites"].items()
        }
        return of(False), of(True)

    def join(vectors, values):
        return {"sites": {path: vectors[path] | values[path] for path in vectors}, "shared": {}, "full": {}}

    def unrolled(values):
        vectors = split(adapter.trainable)[0]
        slope = jax.grad(lambda v: mean(join(v, values), 1 - upper))(vectors)
        ahead = jax.tree.map(lambda v, g: v - eta * g, vectors, slope)
        return mean(join(ahead, values), upper)

    vectors, values = split(adapter.trainable)
    by_vectors, by_values = jax.jit(
        lambda: (jax.grad(lambda v: mean(join(v, values), 1 - upper))(vectors), jax.grad(unrolled)(values))
    )()
    before = jax.tree.map(np.array, adapter.trainable)
    step, state = trainer(graphdef, adapter, name="sgd", rate=1.0, b1=0.0)
    state, metrics = step(state, base, batch)
    for path, expected in join(by_vectors, by_values)["sites"].items():
        for name, slope in expected.items():
            close(before["sites"][path][name] - state.trainable["sites"][path][name], slope, 2e-6)
    assert metrics["weight"] == 20


def test_joint_training_is_the_plain_gradient(net):
    graphdef, base, adapter, batch = net
    step, state = trainer(graphdef, on(adapter, joint=True), name="sgd", rate=1.0, b1=0.0)
    plain = dataclasses.replace(
        adapter, method=vj.AdaLoRA(rank=2, target_rank=2, alpha=2.0, orthogonality=0.0, steps=9)
    )
    state, metrics = step(state, base, batch)
    loss = lambda t: squared_error(
        lambda x: vj.apply(graphdef, base, plain.with_trainable(t), x),
        {name: jnp.asarray(value).reshape(20, *value.shape[2:]) for name, value in batch.items()}, True,
    )["loss"] / 20  # fmt: skip
    slope = jax.jit(jax.grad(loss))(adapter.trainable)["sites"]
    for path, factors in slope.items():
        for name, value in factors.items():
            close(adapter.trainable["sites"][path][name] - state.trainable["sites"][path][name], value, 1e-4)
    np.testing.assert_allclose(metrics["loss"], loss(adapter.trainable), rtol=1e-4)


def test_a_training_lowers_the_loss_of_both_levels(net):
    graphdef, base, adapter, batch = net
    start = jax.jit(lambda base: vj.init(adapter.method, jax.random.key(0), base))(base)
    upper = np.asarray(adapter.method.in_upper(jnp.asarray(batch["id"])))
    step, state = trainer(graphdef, start, rate=0.05)

    def levels(trainable):
        flat = {name: jnp.asarray(value).reshape(20, *value.shape[2:]) for name, value in batch.items()}
        model = lambda x: vj.apply(graphdef, base, start.with_trainable(trainable), x)
        sums = [squared_error(model, flat | {"weight": w.reshape(-1)}, True) for w in (1 - upper, upper)]
        return jnp.stack([each["loss"] / each["weight"] for each in sums])

    levels = jax.jit(levels)
    before = np.asarray(levels(state.trainable))
    for _ in range(40):
        state, metrics = step(state, base, batch)
        assert metrics["finite"].all()
    assert (np.asarray(levels(state.trainable)) < before).all()


def test_the_chunked_loss_of_text_can_be_unrolled():
    """Its own backward pass is differentiated once more: the step of a language model is finite and moves e."""
    from vlora_jax.models.decoder import Decoder, DecoderConfig

    config = DecoderConfig(width=8, heads=2, mlp_width=8, layers=2, vocabulary=11, gated=False, rotary_theta=None)
    graphdef, base = parameters(lambda rngs: Decoder(config, rngs))
    adapter = moved(jax.jit(lambda base: vj.init(vj.BiLoRA(rank=2, targets="q"), jax.random.key(0), base))(base))
    tokens = np.random.default_rng(1).integers(0, 11, (1, 8, 6)).astype(np.int32)
    mask = np.ones((1, 8, 5), bool)
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "mask": mask, "id": np.arange(8)[None]}
    before = jax.tree.map(np.array, adapter.trainable)
    step, state = trainer(graphdef, adapter, next_token)
    state, metrics = step(state, base, batch)
    assert metrics["finite"].all()
    moves = jax.tree.map(lambda a, b: np.abs(a - b).max(), before["sites"], state.trainable["sites"])
    assert all(value > 1e-4 for value in jax.tree.leaves(moves))


def test_values_may_be_a_softmax():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    method = vj.BiLoRA(rank=3, alpha=6.0, values="softmax")
    start = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)
    x = jnp.ones((1, 4))
    np.testing.assert_array_equal(vj.apply(graphdef, base, start, x), vj.apply(graphdef, base, None, x))
    adapter = moved(start)
    a, e, b = (np.asarray(adapter.factors("")[name]) for name in "aeb")
    share = np.exp(e) / np.exp(e).sum()
    merged = jax.jit(lambda: vj.merge(base, adapter))()["kernel"].get_value()
    close(merged - base["kernel"].get_value(), 2.0 * a @ np.diag(share) @ b)


def test_it_trains_as_many_numbers_as_are_counted():
    base = vj.split(nnx.eval_shape(lambda: nnx.Linear(768, 768, rngs=nnx.Rngs(0))))[1]
    adapter = jax.eval_shape(lambda base: vj.init(vj.BiLoRA(), jax.random.key(0), base), base)
    groups = adapter.method.groups(adapter)["sites"][""]
    of = lambda group: sum(leaf.size for name, leaf in adapter.trainable["sites"][""].items() if groups[name] == group)
    assert (of("vectors"), of("values")) == (12_288, 8)
    assert vj.BiLoRA(value_rate=3.0).rates() == {"values": 3.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"upper": 0.0}, "bilora: upper is 0.0; it must be above 0 and below 1"),
        ({"inner_rate": -1.0}, "bilora: inner_rate is -1.0; it must be at least 0"),
        ({"value_rate": 0.0}, "bilora: value_rate is 0.0; it must be positive"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vj.BiLoRA(**options)
