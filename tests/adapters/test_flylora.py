"""FlyLoRA: its sparse projection, its routing token by token, and the rule that balances it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters, trainer
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.errors import ConfigError, ConversionError

X = jnp.asarray(np.random.default_rng(7).normal(size=(9, 12)), jnp.float32)
METHOD = vj.FlyLoRA(rank=8, active=2, alpha=16.0)


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(12, 10, rngs=rngs))
    start = jax.jit(lambda base: vj.init(METHOD, jax.random.key(0), base))(base)
    return graphdef, base, start


def with_d(adapter, d):
    own = adapter.frozen["sites"][""] | {"d": jnp.asarray(d, jnp.float32)}
    return vj.Adapter(moved(adapter).trainable, {"sites": {"": own}, "shared": {}}, adapter.method, adapter.sites)


def by_token(x, factors, method):
    """Δy of every token in turn, and how many tokens went through each rank."""
    a, b, d = (np.asarray(factors[name], np.float64) for name in "abd")
    changes, counts = [], np.zeros(method.rank)
    for token in np.asarray(x, np.float64) @ a:
        score = np.abs(token) + d if method.select == "magnitude" else token + d
        chosen = np.argsort(-score)[: method.active]
        counts[chosen] += 1
        changes.append(method.alpha / method.rank * token[chosen] @ b[chosen])
    return np.stack(changes), counts


@pytest.mark.parametrize("select", ["signed", "magnitude"])
def test_a_token_goes_through_its_best_ranks(linear, select):
    graphdef, base, start = linear
    method = vj.FlyLoRA(rank=8, active=2, alpha=16.0, select=select)
    adapter = with_d(start, np.linspace(-0.1, 0.1, 8))
    adapter = vj.Adapter(adapter.trainable, adapter.frozen, method, adapter.sites)
    out = jax.jit(lambda: vj.apply(graphdef, base, adapter, X) - vj.apply(graphdef, base, None, X))()
    changes, counts = by_token(X, adapter.factors(""), method)
    close(out, changes, 1e-5)
    assert counts.sum() == 9 * 2
    assert len(set(counts)) > 1


def test_every_column_of_the_projection_has_as_many_entries_as_are_active():
    base = parameters(LaxScanned)[1]
    method = vj.FlyLoRA(rank=4, active=2, targets="up|mix")
    adapter = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)
    for site in adapter.sites:
        a = np.asarray(adapter.factors(site.path)["a"])
        np.testing.assert_array_equal((a != 0).sum(-2), method.nonzeros(site.in_dim))
        assert len(np.unique((a != 0).reshape(3, -1), axis=0)) == 3, "each layer draws its own places"
    assert [vj.FlyLoRA().nonzeros(n) for n in (4096, 14336, 2)] == [1024, 3584, 1]


def test_the_entries_are_normal_with_deviation_one_over_the_rank():
    base = parameters(lambda rngs: nnx.Linear(400, 300, rngs=rngs))[1]
    a = np.asarray(jax.jit(lambda base: vj.init(vj.FlyLoRA(), jax.random.key(0), base))(base).factors("")["a"])
    drawn = a[a != 0]
    assert drawn.size == 32 * 100
    np.testing.assert_allclose(drawn.std(), 1 / 32, rtol=0.05)
    assert abs(drawn.mean()) < 0.002


def test_with_all_ranks_active_it_is_lora_with_that_projection(linear):
    graphdef, base, _ = linear
    method = vj.FlyLoRA(rank=8, active=8, alpha=4.0)
    adapter = moved(jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base))
    factors = adapter.factors("")
    lora = vj.init(vj.LoRA(rank=8, alpha=4.0), jax.random.key(0), base)
    lora = lora.with_trainable({"sites": {"": {name: factors[name] for name in "ab"}}, "shared": {}, "full": {}})
    close(*jax.jit(lambda: (vj.apply(graphdef, base, adapter, X), vj.apply(graphdef, base, lora, X)))())


def test_a_token_moves_the_rows_it_went_through_and_no_others(linear):
    graphdef, base, start = linear
    loss = lambda trainable, x: vj.apply(graphdef, base, start.with_trainable(trainable), x).sum()
    slope = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(start.trainable, X[:, None])["sites"][""]["b"]
    for token, rows in zip(X, np.asarray(slope), strict=True):
        chosen = np.argsort(-np.asarray(token @ start.factors("")["a"]))[:2]
        assert set(np.flatnonzero(rows.any(1))) == set(chosen)


def test_llama_31_8b_stores_and_uses_as_many_numbers_as_are_counted():
    shapes = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    block = lambda rngs: nnx.List([nnx.Linear(*shape, rngs=rngs) for shape in shapes])
    base = vj.split(nnx.eval_shape(lambda: nnx.Dict(l=nnx.split_rngs(splits=32)(nnx.vmap(block))(nnx.Rngs(0)))))[1]
    method = vj.FlyLoRA()
    adapter = jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base)
    assert vj.count(adapter) == 44_040_192
    assert sum(site.layers * method.active * site.out_dim for site in adapter.sites) == 11_010_048
    assert sum(site.layers * method.rank * method.nonzeros(site.in_dim) for site in adapter.sites) == 9_961_472


def test_the_rule_moves_d_by_the_tokens_of_the_whole_step(linear):
    """Two micro-batches; the counts of both, by a loop over tokens, say where each d goes."""
    graphdef, base, start = linear
    method = vj.FlyLoRA(rank=8, active=2, alpha=16.0, balance_rate=0.25)
    adapter = vj.Adapter(moved(start).trainable, start.frozen, method, start.sites)
    x = np.random.default_rng(1).normal(size=(2, 5, 3, 12)).astype(np.float32)
    _, counts = by_token(x.reshape(-1, 12), adapter.factors(""), method)
    assert counts.sum() == 60
    step, state = trainer(graphdef, adapter)
    batch = {"x": x, "y": np.zeros((2, 5, 3, 10), np.float32), "id": np.arange(10).reshape(2, 5)}
    state, _ = step(state, base, batch)
    np.testing.assert_allclose(state.frozen["sites"][""]["d"], 0.25 * np.sign(counts.mean() - counts), atol=1e-7)
    np.testing.assert_array_equal(state.frozen["sites"][""]["a"], start.factors("")["a"])


def test_in_a_training_the_load_evens_out(linear):
    """Inputs with a strong direction send most tokens through a few ranks; d spreads them."""
    graphdef, base, start = linear
    method = vj.FlyLoRA(rank=8, active=2, alpha=16.0, balance_rate=0.02)
    adapter = vj.Adapter(start.trainable, start.frozen, method, start.sites)
    rng = np.random.default_rng(2)
    x = (rng.normal(size=(1, 64, 12)) + 2 * rng.normal(size=12)).astype(np.float32)
    target = x @ rng.normal(size=(12, 10)).astype(np.float32)
    batch = {"x": x, "y": target, "id": np.arange(64)[None]}
    step, state = trainer(graphdef, adapter, rate=0.1)
    spread = lambda frozen: by_token(x[0], {"b": start.factors("")["b"]} | frozen["sites"][""], method)[1].var()
    first, losses = spread(state.frozen), []
    for _ in range(60):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
    assert spread(state.frozen) < first / 10
    assert losses[-1] < 0.9 * losses[0]


def test_without_the_probe_nothing_is_counted(linear):
    graphdef, base, start = linear
    program = str(jax.make_jaxpr(lambda x: vj.apply(graphdef, base, start, x))(X))
    assert "custom_vjp" not in program


def test_it_is_not_merged(linear):
    with pytest.raises(ConversionError, match="flylora depends on the input"):
        vj.merge(linear[1], linear[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"active": 0}, "flylora: active is 0; it must be from 1 to the rank 32"),
        ({"active": 33}, "flylora: active is 33; it must be from 1 to the rank 32"),
        ({"balance_rate": -1.0}, "flylora: balance_rate is -1.0; it must be at least 0"),
        ({"select": "best"}, "flylora: select is 'best'; it must be one of signed, magnitude"),
    ],
)
def test_what_has_no_meaning_is_refused(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.FlyLoRA(**options)
