"""AdaLoRA: its formula, its penalty, and the budget that moves, against the rules written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, filled, moved, parameters, trainer

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.adapters.triplets import orthogonality
from vlora_jax.errors import ConfigError

SHORT = vj.AdaLoRA(rank=6, target_rank=2, alpha=3.0, steps=10, warmup=2, final=3)


class Net(nnx.Module):
    """Two stacked layers and one that is not: three modules for the allocator."""

    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs)))(rngs)
        self.out = nnx.Linear(6, 7, rngs=rngs)

    def __call__(self, x):
        graphdef, layers = nnx.split(self.layers)
        body = lambda h, layer: (jnp.tanh(nnx.merge(graphdef, layer)(h)), None)
        return self.out(jax.lax.scan(body, x, layers)[0])


@pytest.fixture(scope="module")
def net():
    graphdef, base = parameters(Net)
    return graphdef, base, jax.jit(lambda base: vj.init(SHORT, jax.random.key(0), base))(base)


def test_a_triplet_is_scaled_by_the_rank_at_the_start():
    base = parameters(lambda rngs: nnx.Linear(6, 5, rngs=rngs))[1]
    adapter = moved(
        jax.jit(lambda base: vj.init(vj.AdaLoRA(rank=4, target_rank=2, alpha=3.0), jax.random.key(0), base))(base)
    )
    a, e, b = (np.asarray(adapter.factors("")[name]) for name in "aeb")
    merged = jax.jit(lambda: vj.merge(base, adapter))()
    close(merged["kernel"].get_value() - base["kernel"].get_value(), 3.0 / (4 + 1e-5) * a @ np.diag(e) @ b)
    assert vj.AdaLoRA(rank=4, target_rank=2, alpha=0.0).scale == 4 / (4 + 1e-5)


def test_it_starts_at_zero_with_small_random_vectors(net):
    for factors in net[2].trainable["sites"].values():
        assert not np.asarray(factors["e"]).any()
        assert 0.01 < np.std(factors["a"]) < 0.03
        assert 0.01 < np.std(factors["b"]) < 0.03


def sites_of(count, *shapes):
    block = lambda rngs: nnx.List([nnx.Linear(*shape, rngs=rngs) for shape in shapes])
    stack = lambda: nnx.Dict(layers=nnx.split_rngs(splits=count)(nnx.vmap(block))(nnx.Rngs(0)))
    return vj.split(nnx.eval_shape(stack))[1]


@pytest.mark.parametrize(
    ("rank", "base", "numbers"),
    [
        (12, (12, *[(768, 768)] * 4, (768, 3072), (3072, 768)), 1_991_520),  # DeBERTa-v3-base, six matrices
        (8, (12, *[(768, 768)] * 4, (768, 3072), (3072, 768)), 1_327_680),
        (12, (32, (4096, 4096), (4096, 4096)), 6_292_224),  # Llama-2-7B, query and value
    ],
)
def test_it_trains_as_many_numbers_as_are_counted(rank, base, numbers):
    base = sites_of(*base)
    adapter = jax.eval_shape(lambda base: vj.init(vj.AdaLoRA(rank=rank), jax.random.key(0), base), base)
    assert vj.count(adapter) == numbers


def test_budgets_are_those_of_peft():
    assert [SHORT.budget(t, 2) for t in range(1, 11)] == [12, 12, 8, 5, 4, 4, 4, 4, 4, 4]
    long = vj.AdaLoRA(rank=12, target_rank=8, steps=1000, warmup=100, final=200)
    assert [long.budget(t, 72) for t in (100, 101, 200, 400, 600, 799)] == [864, 862, 757, 629, 582, 576]


def with_vectors(adapter, a, b):
    sites = {path: f | {"a": a(f["a"]), "b": b(f["b"])} for path, f in adapter.trainable["sites"].items()}
    return adapter.with_trainable(adapter.trainable | {"sites": sites})


def test_the_penalty_is_nothing_for_orthonormal_vectors_and_neither_is_its_slope(net):
    eye = lambda leaf: jnp.broadcast_to(jnp.eye(*leaf.shape[-2:]), leaf.shape)
    adapter = with_vectors(net[2], eye, eye)
    for form in ("norm", "square"):
        of = lambda trainable: orthogonality(adapter.with_trainable(trainable), form)
        value, slope = jax.jit(jax.value_and_grad(of))(adapter.trainable)
        assert value == 0
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(slope))


def test_the_penalty_of_zero_vectors_is_the_root_of_the_rank(net):
    adapter = with_vectors(net[2], jnp.zeros_like, jnp.zeros_like)
    np.testing.assert_allclose(SHORT.penalty(adapter), 0.5 * np.sqrt(6), rtol=1e-6)
    square = vj.AdaLoRA(rank=6, target_rank=2, orthogonality=0.1, penalty_form="square")
    np.testing.assert_allclose(square.penalty(adapter), 0.1 * 6 * 6, rtol=1e-6)  # three layers, A and B, r each


def test_the_penalty_is_that_of_a_loop_over_layers(net):
    adapter = moved(net[2])
    norms = []
    for site in adapter.sites:
        factors = {name: np.asarray(value, np.float64) for name, value in adapter.trainable["sites"][site.path].items()}
        for layer in np.ndindex(*site.stack):
            a, b = factors["a"][layer], factors["b"][layer]
            norms += [np.linalg.norm(a.T @ a - np.eye(6)), np.linalg.norm(b @ b.T - np.eye(6))]
    np.testing.assert_allclose(orthogonality(adapter, "norm"), np.mean(norms), rtol=1e-5)
    np.testing.assert_allclose(orthogonality(adapter, "square"), np.sum(np.square(norms)), rtol=1e-5)


class Allocator:
    """The rules of one model's triplets, layer by layer, in NumPy."""

    def __init__(self, method):
        self.method, self.mean, self.spread, self.alive = method, {}, {}, {}

    def step(self, t, values, grads):
        """`values` and `grads` are `{(layer, name): array}`; returns e after step t, by layer."""
        m, end = self.method, self.method.steps - self.method.final
        if t < end:
            for key, value in values.items():
                importance = abs(value * grads[key])
                self.mean[key] = m.mean_decay * self.mean.get(key, 0) + (1 - m.mean_decay) * importance
                away = abs(importance - self.mean[key])
                self.spread[key] = m.spread_decay * self.spread.get(key, 0) + (1 - m.spread_decay) * away
        layers = sorted({layer for layer, _ in values})
        if t == end or (m.warmup < t < end and t % m.interval == 0):
            entry = {key: self.mean[key] * self.spread[key] for key in values}
            scores = {n: entry[n, "e"] + entry[n, "a"].mean(0) + entry[n, "b"].mean(1) for n in layers}
            surplus = len(layers) * m.rank - m.budget(t, len(layers))
            threshold = np.sort(np.concatenate(list(scores.values())))[surplus - 1] if surplus else -np.inf
            self.alive = {n: scores[n] > threshold for n in layers}
        elif t <= end:
            return {n: values[n, "e"] for n in layers}
        return {n: values[n, "e"] * self.alive[n] for n in layers}


def by_layer(adapter, tree):
    """`{(layer, name): array}` of the tensors of sites."""
    return {
        ((site.path, *layer), name): np.asarray(value, np.float64)[layer]
        for site in adapter.sites
        for name, value in tree["sites"][site.path].items()
        for layer in np.ndindex(*site.stack)
    }


@pytest.mark.parametrize("interval", [1, 2])
def test_importance_budget_and_masks_follow_the_rules_for_a_whole_run(net, interval):
    method = vj.AdaLoRA(rank=6, target_rank=2, steps=12, warmup=2, final=3, interval=interval)
    adapter, rules = moved(net[2]), Allocator(method)
    advance = jax.jit(lambda step, adapter, grads: method.advance(step, adapter, grads, ())[0])
    for step in range(12):
        noise = filled(adapter.trainable, seed=50 + step)  # the optimiser's step, by which a triplet comes back
        adapter = adapter.with_trainable(jax.tree.map(jnp.add, adapter.trainable, noise))
        grads = filled(adapter.trainable, seed=90 + step)
        expected = rules.step(step + 1, by_layer(adapter, adapter.trainable), by_layer(adapter, grads))
        adapter = advance(jnp.int32(step), adapter, grads)
        for (layer, name), value in by_layer(adapter, adapter.trainable).items():
            if name == "e":
                close(value, expected[layer])
        assert rules.alive or step + 1 < 4
    alive = by_layer(adapter, adapter.frozen)
    assert sum(value.sum() for (_, name), value in alive.items() if name == "alive") == 3 * 2
    assert not any(value.any() for (_, name), value in alive.items() if name != "alive"), "cleared at the end"


def test_without_a_surplus_nothing_is_cut_and_ties_are_cut_together(net):
    same = vj.AdaLoRA(rank=6, target_rank=6, steps=10)
    ones = lambda tree: jax.tree.map(jnp.ones_like, tree)
    adapter = net[2].with_trainable(ones(net[2].trainable))
    kept = jax.jit(lambda: same.advance(jnp.int32(4), adapter, ones(adapter.trainable), ())[0])()
    assert all(np.asarray(f["e"]).all() for f in kept.trainable["sites"].values())
    tied = jax.jit(lambda: SHORT.advance(jnp.int32(4), adapter, ones(adapter.trainable), ())[0])()
    assert not any(np.asarray(f["e"]).any() for f in tied.trainable["sites"].values())


def test_a_training_keeps_the_budget_of_every_step(net):
    graphdef, base, start = net
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(2, 8, 6)), "y": rng.normal(size=(2, 8, 7))}
    batch = {name: np.float32(value) for name, value in batch.items()} | {"id": np.arange(16).reshape(2, 8)}
    step, state = trainer(graphdef, start)
    left, losses, supports = [], [], []
    for _ in range(10):
        state, metrics = step(state, base, batch)
        support = {path: np.asarray(f["e"]) != 0 for path, f in state.trainable["sites"].items()}
        left.append(sum(int(each.sum()) for each in support.values()))
        losses.append(float(metrics["loss"]))
        supports.append(np.concatenate([each.reshape(-1) for each in support.values()]))
    assert left == [SHORT.budget(t, 3) for t in range(1, 11)] == [18, 18, 12, 8, 6, 6, 6, 6, 6, 6]
    assert losses[-1] < losses[0]
    out = vj.apply(graphdef, base, start, jnp.asarray(batch["x"]))
    error = 0.5 * float(((out - batch["y"]) ** 2).sum()) / 16
    np.testing.assert_allclose(losses[0], error + 0.5 * orthogonality(start, "norm"), rtol=1e-5)
    np.testing.assert_array_equal(supports[6:], [supports[6]] * 4)
    assert all(np.asarray(f["a"]).all() for f in state.trainable["sites"].values()), "A stays where e is cut"


def test_a_rule_without_the_length_of_the_run_is_refused(net):
    method, adapter = vj.AdaLoRA(rank=6, target_rank=2), net[2]
    with pytest.raises(ConfigError, match="adalora: steps is 0 and no run has filled it in"):
        method.advance(jnp.int32(0), adapter, adapter.trainable, ())
    assert method.for_run(7).steps == 7
    assert SHORT.for_run(7) == SHORT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "adalora: rank is 0; it must be at least 1"),
        ({"target_rank": 13}, "adalora: target_rank 13 is above the rank 12 at the start"),
        ({"interval": 0}, "adalora: interval is 0; it must be at least 1"),
        ({"orthogonality": -0.1}, "adalora: orthogonality is -0.1; it must be at least 0"),
        ({"mean_decay": 1.0}, "adalora: mean_decay is 1.0; it must be at least 0 and below 1"),
        ({"steps": 10, "warmup": 6, "final": 4}, "adalora: warmup 6 and final 4 leave none of 10 steps"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vj.AdaLoRA(**options)


def test_a_rank_above_the_kernel_is_refused():
    base = parameters(lambda rngs: nnx.Linear(4, 9, rngs=rngs))[1]
    with pytest.raises(ConfigError, match="adalora: rank 12 is above the smaller side, 4"):
        vj.init(vj.AdaLoRA(), jax.random.key(0), base)


def test_other_leaves_are_left_alone(net):
    adapter = moved(net[2])
    grads = filled(adapter.trainable, seed=3)
    after = jax.jit(lambda: SHORT.advance(jnp.int32(5), adapter, grads, ())[0])()
    for path, leaf in flatten(adapter.trainable).items():
        if not path.endswith("/e"):
            np.testing.assert_array_equal(flatten(after.trainable)[path], leaf)
