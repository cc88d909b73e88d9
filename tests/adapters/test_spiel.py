"""SpIEL: places and values against dense matrices, and whole trainings against the rules written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters, trainer

import vlora_jax as vj
from vlora_jax.adapters.spiel import exchange
from vlora_jax.errors import ConfigError

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 6)), jnp.float32)
LINEAR = lambda rngs: nnx.Linear(6, 7, use_bias=False, rngs=rngs)


def start(method, base):
    return jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)


def test_the_change_is_phi_at_its_places_and_nothing_elsewhere():
    graphdef, base = parameters(LINEAR)
    adapter = moved(start(vj.SpIEL(density=0.2), base))
    values, index = (np.asarray(adapter.factors("")[name]) for name in ("values", "index"))
    assert values.shape == index.shape == (8,)
    change = np.zeros(42, np.float32)
    change[index] = values
    kernel = base["kernel"].get_value()
    close(jax.jit(lambda: vj.merge(base, adapter))()["kernel"].get_value() - kernel, change.reshape(6, 7))
    close(jax.jit(lambda: vj.apply(graphdef, base, adapter, X))(), X @ (kernel + change.reshape(6, 7)), 1e-5)


def test_a_place_of_a_file_is_a_place_of_the_transposed_kernel():
    """The authors' files count o·in + i over (out, in); here it is i·out + o."""
    inputs, outputs = 6, 7
    for file in range(inputs * outputs):
        ours = (file % inputs) * outputs + file // inputs
        assert np.arange(42).reshape(inputs, outputs).T.reshape(-1)[file] == ours


def test_the_slope_of_phi_is_the_dense_slope_at_its_places():
    graphdef, base = parameters(LINEAR)
    adapter = moved(start(vj.SpIEL(density=0.2), base))

    loss = lambda out: (jnp.tanh(out) ** 2).sum()
    merged = vj.merge(base, adapter)["kernel"].get_value()
    dense = jax.jit(jax.grad(lambda kernel: loss(X @ kernel)))(merged)
    sparse = jax.jit(jax.grad(lambda t: loss(vj.apply(graphdef, base, adapter.with_trainable(t), X))))(
        adapter.trainable
    )
    close(sparse["sites"][""]["values"], np.asarray(dense).reshape(-1)[adapter.factors("")["index"]], 1e-5)


def test_places_start_in_order_each_once_and_spread_evenly():
    base = parameters(lambda rngs: nnx.Linear(60, 70, rngs=rngs))[1]
    init = jax.jit(lambda key, base: vj.init(vj.SpIEL(density=0.05), key, base))
    drawn = [np.asarray(init(jax.random.key(seed), base).factors("")["index"]) for seed in range(20)]
    for index in drawn:
        assert index.dtype == np.int32
        assert (np.diff(index) > 0).all()
        assert index[0] >= 0
        assert index[-1] < 4200
    counts = np.histogram(np.concatenate(drawn), bins=10, range=(0, 4200))[0]
    np.testing.assert_allclose(counts, 420, rtol=0.2)


@pytest.mark.parametrize(("number", "total"), [(8 * 2_498_560, 19_988_352)])
def test_llama_2_7b_gets_as_many_values_as_are_counted(number, total):
    shapes = [*[(4096, 4096)] * 4, (4096, 11008), (4096, 11008), (11008, 4096)]
    block = lambda rngs: nnx.List([nnx.Linear(*shape, rngs=rngs) for shape in shapes])
    base = vj.split(nnx.eval_shape(lambda: nnx.Dict(l=nnx.split_rngs(splits=32)(nnx.vmap(block))(nnx.Rngs(0)))))[1]
    adapter = jax.eval_shape(lambda base: vj.init(vj.SpIEL(number=number), jax.random.key(0), base), base)
    counts = adapter.method.counts(list(adapter.sites))
    assert sorted(set(counts.values())) == [51_783, 139_168]
    assert vj.count(adapter) == total


def test_amounts_fall_as_the_schedule_says():
    linear = vj.SpIEL(steps=100)
    assert linear.amounts(1000) == [1000, 150, 110, 70, 30]  # at 5, 25, 45, 65, 85
    cosine = vj.SpIEL(steps=100, schedule="cosine").amounts(1000)
    assert cosine == [1000, *(int(1000 * 0.2 * (1 + np.cos(np.pi * t / 100)) / 2) for t in (25, 45, 65, 85))]
    assert [t for t in range(1, 50) if bool(linear.names(jnp.int32(t)))] == [1, 20, 40]


def exchanged(amount, values, index, candidate, total):
    """The rule as the paper's code states it, on Python sets; returns `{dropped place: grown place}` in order."""
    order = sorted(range(len(index)), key=lambda i: (abs(values[i]), i))[:amount]
    dropped = [int(index[i]) for i in order]
    remaining = set(map(int, index)) - set(dropped)
    valid = [j for j in range(len(candidate)) if int(candidate[j]) not in remaining]
    best = sorted(valid, key=lambda j: (-abs(total[j]), j))[:amount]
    grown = [int(candidate[j]) for j in best]
    both = set(dropped) & set(grown)
    dropped = [place for place in dropped if place not in both]
    grown = [place for place in grown if place not in both]
    return dict(zip(dropped, grown, strict=False))


def test_an_exchange_is_that_of_sets():
    rng = np.random.default_rng(0)
    run = jax.jit(exchange)
    sizes = set()
    for _ in range(60):
        k = 6
        index, candidate = (rng.permutation(16)[:k].astype(np.int32) for _ in range(2))
        values, total = (rng.normal(size=k).astype(np.float32) for _ in range(2))
        values[rng.integers(k)] = 0.0
        amount = int(rng.integers(0, k + 1))
        slots, sources, moves = run(jnp.int32(amount), values, index, candidate, total)
        pairs = {int(index[s]): int(candidate[c]) for s, c, m in zip(slots, sources, moves, strict=True) if m}
        assert pairs == exchanged(amount, values, index, candidate, total)
        after = np.array(index)
        after[np.asarray(slots)[np.asarray(moves)]] = candidate[np.asarray(sources)[np.asarray(moves)]]
        assert len(set(after.tolist())) == k
        sizes.add(len(pairs))
    assert {0, 1, 2, 3} <= sizes


class Oracle:
    """A training of one kernel (6, 7) with `SpIEL` by dense slopes, loops and float64."""

    def __init__(self, method, kernel, index, rate):
        self.method, self.kernel, self.rate = method, np.float64(kernel), rate
        self.index, self.values = list(map(int, index)), np.zeros(len(index))
        self.m, self.v, self.t, self.moved = np.zeros(len(index)), np.zeros(len(index)), 0, []

    def dense(self):
        change = np.zeros(42)
        change[self.index] = self.values
        return self.kernel + change.reshape(6, 7)

    def step(self, x, y):
        """One step on micro-batches `(K, n, 6)`."""
        self.t, method, k = self.t + 1, self.method, len(self.index)
        slopes = [a.T @ (a @ self.dense() - b) for a, b in zip(np.float64(x), np.float64(y), strict=True)]
        slope = sum(slopes).reshape(-1) / (x.shape[0] * x.shape[1])
        if self.t == 1 or self.t % method.every == 0:
            self.candidate = list(map(int, np.argsort(-np.abs(slopes[0].reshape(-1)), kind="stable")[:k]))
            self.sum, self.square, self.number = np.zeros(k), np.zeros(k), 0
        else:
            seen = slope[self.candidate]
            self.sum, self.square, self.number = self.sum + seen, self.square + seen**2, self.number + 1
        g = slope[self.index]
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        ahead = (self.m / (1 - 0.9**self.t)) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        self.values = self.values - self.rate * ahead
        if self.t % method.every == method.collect:
            first = self.t == method.collect
            share = 1.0 if first else method.reselect * (1 - self.t / method.steps)
            pairs = exchanged(int(k * share), self.values, self.index, self.candidate, self.sum)
            for old, new in pairs.items():
                slot, source = self.index.index(old), self.candidate.index(new)
                self.index[slot], self.values[slot] = new, 0.0
                self.m[slot] = self.sum[source] / self.number * (1 - 0.9**self.t)
                self.v[slot] = self.square[source] / self.number * (1 - 0.999**self.t)
            self.moved.append(len(pairs))


def batch_of(rng, micros=1, examples=12):
    x = rng.normal(size=(micros, examples, 6)).astype(np.float32)
    return {
        "x": x,
        "y": rng.normal(size=(micros, examples, 7)).astype(np.float32),
        "id": np.zeros((micros, examples), int),
    }


def test_a_training_is_that_of_the_oracle_step_by_step():
    """Three selections, two micro-batches a step: places, values and both moments."""
    graphdef, base = parameters(LINEAR)
    method = vj.SpIEL(density=0.3, every=6, collect=2, reselect=0.9, steps=40)
    adapter = start(method, base)
    oracle = Oracle(method, base["kernel"].get_value(), adapter.factors("")["index"], 0.05)
    step, state = trainer(graphdef, adapter, rate=0.05)
    rng = np.random.default_rng(3)
    for _ in range(16):
        batch = batch_of(rng, micros=2)
        oracle.step(batch["x"], batch["y"])
        state, metrics = step(state, base, batch)
        assert metrics["finite"].all()
        np.testing.assert_array_equal(state.frozen["sites"][""]["index"], oracle.index)
        close(state.trainable["sites"][""]["values"], oracle.values, 2e-5)
        moments = state.opt_state[1]
        close(moments.mu["sites"][""]["values"], oracle.m, 2e-5)
        close(moments.nu["sites"][""]["values"], oracle.v, 2e-5)
        assert len(set(np.asarray(state.frozen["sites"][""]["index"]).tolist())) == 12
    assert len(oracle.moved) == 3
    assert min(oracle.moved) > 0


def test_with_every_place_it_is_full_fine_tuning():
    graphdef, base = parameters(LINEAR)
    sparse = start(vj.SpIEL(density=1.0, every=4, collect=2, steps=9), base)
    full = vj.init(vj.Selective(full="kernel"), jax.random.key(0), base)
    kernel, rng = base["kernel"].get_value(), np.random.default_rng(4)
    (one, ours), (two, theirs) = trainer(graphdef, sparse), trainer(graphdef, full)
    for _ in range(7):
        batch = batch_of(rng)
        ours, theirs = one(ours, base, batch)[0], two(theirs, base, batch)[0]
    change = np.zeros(42, np.float32)
    change[np.asarray(ours.frozen["sites"][""]["index"])] = ours.trainable["sites"][""]["values"]
    close(kernel + change.reshape(6, 7), theirs.trainable["full"]["kernel"], 1e-5)


def test_it_finds_the_few_places_that_matter():
    """The target differs from the kernel in six places; places start elsewhere, and end there."""
    graphdef, base = parameters(LINEAR)
    adapter = start(vj.SpIEL(number=6, every=10, collect=4, steps=60, reselect=0.5), base)
    rng = np.random.default_rng(5)
    free = np.setdiff1d(np.arange(42), adapter.factors("")["index"])
    wanted = rng.choice(free, 6, replace=False)
    change = np.zeros(42, np.float32)
    change[wanted] = rng.choice([-1.0, 1.0], 6)
    target = np.asarray(base["kernel"].get_value()) + change.reshape(6, 7)
    step, state = trainer(graphdef, adapter, rate=0.05)
    losses = []
    for _ in range(60):
        batch = batch_of(rng, examples=32)
        state, metrics = step(state, base, batch | {"y": batch["x"] @ target})
        losses.append(float(metrics["loss"]))
    assert set(np.asarray(state.frozen["sites"][""]["index"]).tolist()) == set(wanted.tolist())
    assert losses[-1] < 0.01 * losses[0]


def test_layers_of_a_stack_choose_for_themselves():
    class Tower(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(6, 6, rngs=rngs)))(rngs)

        def __call__(self, x):
            graphdef, layers = nnx.split(self.layers)
            return jax.lax.scan(lambda h, layer: (jnp.tanh(nnx.merge(graphdef, layer)(h)), None), x, layers)[0]

    graphdef, base = parameters(Tower)
    adapter = start(vj.SpIEL(density=0.2, every=5, collect=2, steps=9), base)
    before = np.asarray(adapter.factors("layers")["index"])
    rng, kernels = np.random.default_rng(6), base["layers"]["kernel"].get_value()
    step, state = trainer(graphdef, adapter)
    batch = batch_of(rng)
    batch["y"] = batch["y"][..., :6]
    loss = lambda kernels, x, y: 0.5 * ((
        jnp.tanh(jnp.tanh(x @ kernels[0] + base["layers"]["bias"][0]) @ kernels[1] + base["layers"]["bias"][1]) - y
    ) ** 2).sum()  # fmt: skip
    dense = np.abs(np.asarray(jax.jit(jax.grad(loss))(kernels, batch["x"][0], batch["y"][0]))).reshape(2, -1)
    state, _ = step(state, base, batch)
    named = np.asarray(state.frozen["sites"]["layers"]["candidate"])
    for layer in range(2):
        assert set(named[layer].tolist()) == set(np.argsort(-dense[layer])[:7].tolist())
    state, _ = step(state, base, batch)
    after = np.asarray(state.frozen["sites"]["layers"]["index"])
    for layer in range(2):
        assert set(after[layer].tolist()) == set(named[layer].tolist()), "at first all may move"
    assert (before != after).any(axis=1).all()


@pytest.mark.parametrize("name", ["lion", "sgd", "adafactor"])
def test_other_optimisers_train_it_too(name):
    graphdef, base = parameters(LINEAR)
    adapter = start(vj.SpIEL(density=0.3, every=4, collect=2, steps=9), base)
    step, state = trainer(graphdef, adapter, name=name)
    before, batch = np.asarray(adapter.factors("")["index"]), batch_of(np.random.default_rng(8))
    state, _ = step(state, base, batch)
    state, metrics = step(state, base, batch)
    assert metrics["finite"].all()
    changed = before != np.asarray(state.frozen["sites"][""]["index"])
    assert changed.any()
    if name != "adafactor":
        moment = state.opt_state[1].mu if name == "lion" else state.opt_state[1].trace
        np.testing.assert_array_equal(np.asarray(moment["sites"][""]["values"])[changed], 0)


def test_a_rule_without_the_length_of_the_run_is_refused():
    base = parameters(LINEAR)[1]
    adapter = start(vj.SpIEL(density=0.2), base)
    with pytest.raises(ConfigError, match="spiel: steps is 0 and no run has filled it in"):
        adapter.method.advance(jnp.int32(0), adapter, {}, ())
    assert adapter.method.for_run(70).steps == 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "spiel: density is 0.0; it must be above 0 and at most 1"),
        ({"collect": 20}, "spiel: collect is 20; it must be from 2 to below every, 20"),
        ({"collect": 1}, "spiel: collect is 1; it must be from 2 to below every, 20"),
        ({"reselect": 1.5}, "spiel: reselect is 1.5; it must be from 0 to 1"),
        ({"number": -1}, "spiel: number is -1; it must be at least 0"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        vj.SpIEL(**options)


def test_more_values_than_entries_are_refused():
    base = parameters(LINEAR)[1]
    with pytest.raises(ConfigError, match="spiel: number 43 is above the 42 entries"):
        vj.init(vj.SpIEL(number=43), jax.random.key(0), base)
