"""SARA and Mo-SARA: the rank rule on known singular values, the formulas against NumPy, and training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters, trainer

import vlora_jax as vj
from vlora_jax.errors import ConfigError, ConversionError

RNG = np.random.default_rng(7)
X = jnp.asarray(RNG.normal(size=(5, 6)), jnp.float32)
SIGMA = np.float32([8, 4, 2, 1, 0.5, 0.5])  # of a sum of 16: shares 1/2, 3/4, 7/8, 15/16, …


def kernel_of(sigma):
    """A kernel (6, 7) with these singular values."""
    p, q = (np.linalg.qr(RNG.normal(size=(n, n)))[0] for n in (6, 7))
    return jnp.asarray(p @ np.diag(sigma) @ q[:6], jnp.float32)


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(6, 7, rngs=rngs))
    base["kernel"].set_value(kernel_of(SIGMA))
    return graphdef, base


def start(method, base):
    return jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)


@pytest.mark.parametrize(("share", "kept"), [(0.01, 1), (0.51, 1), (0.9, 3), (1.0, 5)])
def test_as_many_directions_as_stay_below_the_share(linear, share, kept):
    """Σ σ up to the k-th is below η Σσ; of a share of 1 all but the last."""
    adapter = start(vj.SARA(rank=6, share=share), linear[1])
    np.testing.assert_array_equal(adapter.factors("")["alive"], np.arange(6) < kept)
    fitted = vj.SARA(rank=6, share=share).fitted(linear[1])
    exact = start(fitted, linear[1])
    assert vj.count(exact) == kept * (6 + 7 + 1)
    assert np.asarray(exact.factors("")["alive"]).all()


def test_more_share_never_means_fewer_directions():
    sigma = np.sort(RNG.exponential(size=(4, 30)).astype(np.float32))[:, ::-1]
    counts = np.stack([vj.SARA(share=share).count(jnp.asarray(sigma)) for share in np.linspace(0.01, 1, 25)])
    assert (np.diff(counts, axis=0) >= 0).all()
    assert counts.min() == 1
    by_loop = [sum(sigma[0, : i + 1].sum() < 0.5 * sigma[0].sum() for i in range(30))]
    assert vj.SARA(share=0.5).count(jnp.asarray(sigma[0])) == max(by_loop[0], 1)


def test_each_layer_of_a_stack_has_its_own_rank_and_nothing_beyond_it_trains():
    block = lambda rngs: nnx.Linear(6, 7, rngs=rngs)
    stack = lambda rngs: nnx.Dict(layers=nnx.split_rngs(splits=2)(nnx.vmap(block))(rngs))
    base = parameters(stack)[1]
    base["layers"]["kernel"].set_value(jnp.stack([kernel_of(SIGMA), kernel_of(np.ones(6, np.float32))]))
    method = vj.SARA(rank=6, share=0.8).fitted(base)
    adapter = moved(start(method, base))
    (site,) = adapter.sites
    np.testing.assert_array_equal(adapter.factors(site.path)["alive"], [[1, 1, 0, 0], [1, 1, 1, 1]])
    loss = lambda trainable: (
        vj.merge(base, adapter.with_trainable(trainable))["layers"]["kernel"].get_value() ** 2
    ).sum()
    slope = jax.jit(jax.grad(loss))(adapter.trainable)["sites"][site.path]
    assert not np.asarray(slope["a"])[0, :, 2:].any()
    assert not np.asarray(slope["values"])[0, 2:].any()
    assert np.asarray(slope["b"])[1].all()


def test_the_change_is_the_product_of_three(linear):
    graphdef, base = linear
    adapter = moved(start(vj.SARA(rank=6, share=0.9), base))
    a, values, b, alive = (np.asarray(adapter.factors("")[name]) for name in ("a", "values", "b", "alive"))
    out = jax.jit(lambda: vj.apply(graphdef, base, adapter, X) - vj.apply(graphdef, base, None, X))()
    close(out, np.asarray(X) @ a[:, :3] @ np.diag(values[:3]) @ b[:3], 1e-5)
    assert alive.sum() == 3


def test_it_trains_as_many_numbers_as_are_counted():
    base = vj.split(nnx.eval_shape(lambda: nnx.Linear(768, 768, rngs=nnx.Rngs(0))))[1]
    count = lambda method: vj.count(jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base))
    assert count(vj.SARA(rank=10)) == 15_370
    assert count(vj.MoSARA(rank=10, experts=5)) == 833


def test_a_mixture_is_the_formula_token_by_token(linear):
    graphdef, base = linear
    adapter = moved(start(vj.MoSARA(rank=5, share=0.9, experts=3), base))
    f = {name: np.asarray(value, np.float64) for name, value in adapter.factors("").items()}
    expected = []
    for x in np.asarray(X, np.float64):
        xa = x @ f["p"][:, :3]
        gate = np.exp(xa @ f["w1"][:3] @ f["w2"])
        mixed = (gate / gate.sum()) @ f["values"][:, :3]
        expected.append(f["v"] * ((xa * mixed) @ f["q"][:3]))
    out = jax.jit(lambda: vj.apply(graphdef, base, adapter, X) - vj.apply(graphdef, base, None, X))()
    close(out, np.stack(expected), 1e-5)


def test_one_expert_whose_gate_is_open_rescales_the_largest_directions(linear):
    """With v = 1 and λ = σ the change is x times the best approximation of the kernel of that rank."""
    graphdef, base = linear
    adapter = start(vj.MoSARA(rank=4, share=0.95, experts=1), base)
    own = adapter.trainable["sites"][""] | {"v": jnp.ones(7)}
    adapter = adapter.with_trainable(adapter.trainable | {"sites": {"": own}})
    p, sigma, q = np.linalg.svd(np.asarray(base["kernel"].get_value()), full_matrices=False)
    out = jax.jit(lambda: vj.apply(graphdef, base, adapter, X) - vj.apply(graphdef, base, None, X))()
    close(out, np.asarray(X) @ (p[:, :4] * sigma[:4]) @ q[:4], 1e-5)
    half = adapter.with_trainable({"sites": {"": own | {"values": own["values"] / 2}}, "shared": {}, "full": {}})
    close(jax.jit(lambda: vj.apply(graphdef, base, half, X) - vj.apply(graphdef, base, None, X))(), out / 2, 1e-5)


@pytest.mark.parametrize("method", [vj.SARA(rank=4, share=0.95), vj.MoSARA(rank=4, share=0.95)], ids=lambda m: m.name)
def test_a_training_lowers_the_loss_and_leaves_what_is_frozen(linear, method):
    graphdef, base = linear
    adapter = start(method, base)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 16, 6)).astype(np.float32)
    batch = {"x": x, "y": rng.normal(size=(1, 16, 7)).astype(np.float32), "id": np.arange(16)[None]}
    step, state = trainer(graphdef, adapter, rate=0.05)
    losses = []
    for _ in range(12):
        state, metrics = step(state, base, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.95 * losses[0]
    jax.tree.map(np.testing.assert_array_equal, state.frozen, adapter.frozen)


def test_a_mixture_is_not_merged(linear):
    with pytest.raises(ConversionError, match="mosara depends on the input"):
        vj.merge(linear[1], start(vj.MoSARA(rank=4), linear[1]))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (vj.SARA, {"rank": 0}, "sara: rank is 0; it must be at least 1"),
        (vj.SARA, {"share": 0.0}, "sara: share is 0.0; it must be above 0 and at most 1"),
        (vj.SARA, {"rank_pattern": {"q": 0}}, r"sara: rank_pattern\['q'\] is 0; it must be at least 1"),
        (vj.MoSARA, {"experts": 0}, "mosara: experts is 0; it must be at least 1"),
    ],
)
def test_what_has_no_meaning_is_refused(method, options, message):
    with pytest.raises(ConfigError, match=message):
        method(**options)


def test_a_rank_above_the_kernel_is_refused(linear):
    with pytest.raises(ConfigError, match="sara: rank 16 is above the smaller side, 6"):
        vj.init(vj.SARA(), jax.random.key(0), linear[1])
