"""VeRA: the numbers that torch draws, what sites of different sizes share, and how few numbers train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import close, moved, parameters

import vlora_jax as vj
from vlora_jax.adapters.torch_draws import TorchDraws
from vlora_jax.adapters.vera import peft_projections
from vlora_jax.errors import ConfigError

X = jnp.asarray(np.random.default_rng(7).normal(size=(5, 4)), jnp.float32)


def site(name, in_dim, out_dim, layers=1):
    return vj.Site(name, "kernel", "dense", (layers,), (in_dim, out_dim), (0,), (1,))


UNIFORM = {0: (0.4963, 0.7682, 0.0885, 0.1320, 0.3074, 0.6341), 42: (0.8823, 0.9150, 0.3829, 0.9593, 0.3904, 0.6009)}


@pytest.mark.parametrize(("key", "expected"), UNIFORM.items())
def test_a_key_gives_the_numbers_of_torch_rand(key, expected):
    np.testing.assert_allclose(TorchDraws(key).uniform(0, 1, (6,)), expected, atol=5e-5)


def test_a_stream_goes_on_and_keys_count_modulo_2_to_the_32():
    whole, parts = TorchDraws(7).words(10), TorchDraws(7 + 2**32)
    np.testing.assert_array_equal(whole, np.concatenate([parts.words(3), parts.words(7)]))


GOLDEN = {
    (0, 4, 6, 5): (
        (-0.00748682, 0.5364436, -0.82304513, -0.735939, -0.38515437, 0.26815736),
        (-0.1974085, 0.12959528, 1.1089774, -1.1361595),
    ),
    (0, 256, 768, 768): (
        (-0.00066175, 0.04741536, -0.0727476, -0.06504843),
        (0.00154069, -0.09968074, 0.00014626, 0.14285375),
    ),
}


@pytest.mark.parametrize(("of", "expected"), GOLDEN.items())
def test_peft_s_projections_are_drawn_bit_for_bit(of, expected):
    """The first row of each in the orientation of files; values printed to eight digits."""
    for matrix, row in zip(peft_projections(*of), expected, strict=True):
        np.testing.assert_allclose(np.asarray(matrix, np.float64).T[0, : len(row)], row, rtol=6e-8, atol=5.1e-9)


def test_the_whole_projections_are_the_published_ones():
    sums = [float(np.asarray(matrix, np.float64).sum()) for matrix in peft_projections(0, 256, 768, 768)]
    np.testing.assert_allclose(sums, (30.848905270, -3.608192625), rtol=0, atol=1e-8)


def test_every_draw_is_rounded_once():
    """Against exact arithmetic by fractions; rounding the product first would differ in about half of the entries."""
    low, high = np.float32(-0.3), np.float32(0.3)
    unit = (TorchDraws(5).words(500) & 0xFFFFFF).astype(np.float64) * 2.0**-24
    drawn, width = TorchDraws(5).uniform(-0.3, 0.3, (500,)), np.float32(high - low)
    exact = unit.astype(np.longdouble) * np.longdouble(width) + np.longdouble(low)
    np.testing.assert_array_equal(drawn, exact.astype(np.float32))
    twice = (unit.astype(np.float32) * width).astype(np.float32) + low
    assert 0.2 < (twice != drawn).mean() < 0.8


@pytest.mark.parametrize("projection", ["peft", "jax"])
def test_the_product_has_the_same_size_at_any_rank(projection):
    """E[(A B)²] = 4 / max_in (uniform in ±√(6/max_in) and ±√(6/r))."""
    for rank in (16, 256):
        method = vj.VeRA(rank=rank, projection=projection)
        shared = method.init(jax.random.key(0), [site("q", 96, 80)], {}).shared
        a, b = np.asarray(shared["projection_a"]), np.asarray(shared["projection_b"])
        assert np.abs(a).max() <= np.sqrt(6 / 96)
        assert np.abs(b).max() <= np.sqrt(6 / rank)
        assert abs(((a @ b) ** 2).mean() * 96 / 4 - 1) < 0.15


@pytest.fixture(scope="module")
def two():
    """Kernels (4, 9) and (7, 3) on the same x, padded; rank 5 is above both smaller sides."""
    graphdef, base = parameters(lambda rngs: nnx.Dict(q=nnx.Linear(4, 9, rngs=rngs), v=nnx.Linear(7, 3, rngs=rngs)))
    method = vj.VeRA(rank=5, targets="q|v")
    return graphdef, base, method, vj.init(method, jax.random.key(0), base)


def explicit(adapter, path, in_dim, out_dim):
    a, b = (np.asarray(adapter.shared[f"projection_{name}"], np.float64) for name in "ab")
    d, out = (np.asarray(adapter.factors(path)[name], np.float64) for name in "db")
    return a[:in_dim] @ np.diag(d) @ b[:, :out_dim] @ np.diag(out)


def test_sites_use_the_first_rows_and_columns_of_one_pair(two):
    _, base, method, start = two
    assert {name: leaf.shape for name, leaf in start.shared.items()} == {"projection_a": (7, 5), "projection_b": (5, 9)}
    assert not start.trainable["shared"]
    adapter = moved(start)
    merged = vj.merge(base, adapter)
    for path, sides in (("q", (4, 9)), ("v", (7, 3))):
        change = np.asarray(merged[path]["kernel"].get_value()) - np.asarray(base[path]["kernel"].get_value())
        close(change, explicit(adapter, path, *sides))
        factors = adapter.factors(path) | adapter.shared
        left, right = method.low_rank(sides, factors)
        close(left @ right, explicit(adapter, path, *sides))
        x = jnp.asarray(np.random.default_rng(1).normal(size=(5, sides[0])), jnp.float32)
        close(method.forward(x, x @ jnp.ones(sides), jnp.ones(sides), factors), x @ explicit(adapter, path, *sides))


def test_shapes_of_files_are_as_peft_gives_them():
    """Torch layers (100, 20) and (80, 50): vera_A (r, 50), vera_B (100, r)."""
    adapter = vj.VeRA(rank=3).init(jax.random.key(0), [site("q", 20, 100), site("v", 50, 80)], {})
    assert adapter.shared["projection_a"].T.shape == (3, 50)
    assert adapter.shared["projection_b"].T.shape == (100, 3)


def test_gradients_are_those_of_the_formula(two):
    _, _, method, start = two
    factors = moved(start).factors("q") | start.shared
    target = jnp.asarray(np.random.default_rng(2).normal(size=(5, 9)), jnp.float32)
    loss = lambda own: (method.forward(X, X @ jnp.ones((4, 9)), jnp.ones((4, 9)), factors | own) * target).sum()
    ours = jax.grad(loss)({name: factors[name] for name in "db"})
    a, b = np.asarray(factors["projection_a"])[:4], np.asarray(factors["projection_b"])[:, :9]
    d, out = np.asarray(factors["d"]), np.asarray(factors["b"])
    g = np.asarray(X).T @ np.asarray(target)  # of ΔW
    close(ours["d"], np.einsum("ir,io,ro,o->r", a, g, b, out), 1e-5)
    close(ours["b"], np.einsum("ir,io,ro,r->o", a, g, b, d), 1e-5)


def test_a_wider_site_changes_the_projections_of_all():
    small, large = ([site("q", 4, 9)], [site("q", 4, 9), site("up", 8, 9)])
    a = [vj.VeRA(rank=2).init(jax.random.key(0), sites, {}).shared["projection_a"] for sites in (small, large)]
    assert np.abs(a[0] - a[1][:4]).max() > 1e-2
    same = vj.VeRA(rank=2, max_in=8, max_out=12)
    first, second = (same.init(jax.random.key(seed), sites, {}).shared for seed, sites in enumerate((small, large)))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert first["projection_b"].shape == (2, 12)


@pytest.mark.parametrize("projection", ["peft", "jax"])
def test_projections_depend_on_their_own_key_alone(projection):
    draw = lambda key, seed: (
        (
            vj.VeRA(rank=2, projection=projection, projection_key=key).init(jax.random.key(seed), [site("q", 4, 9)], {})
        ).shared
    )
    jax.tree.map(np.testing.assert_array_equal, draw(3, 0), draw(3, 1))
    assert np.abs(draw(3, 0)["projection_a"] - draw(4, 0)["projection_a"]).max() > 1e-2


def linears(width, inner, gated):
    pairs = dict.fromkeys("qkvo", (width, width)) | {"up": (width, inner), "down": (inner, width)}
    return pairs | ({"gate": (width, inner)} if gated else {})


def query_value(layers, width, out=None):
    return {"q": (width, width), "v": (width, out or width)}, layers


COUNTS = [  # sites and layers, rank, trained numbers
    *((query_value(12, 768), rank, n) for rank, n in ((1, 18_456), (16, 18_816), (256, 24_576), (1024, 43_008))),
    *((query_value(24, 1024), rank, n) for rank, n in ((1, 49_200), (16, 49_920), (256, 61_440), (1024, 98_304))),
    (query_value(36, 1280), 1024, 165_888),
    ((linears(768, 3072, False), 12), 1024, 156_672),
    ((linears(1024, 4096, False), 24), 256, 258_048),
    ((linears(4096, 11008, True), 32), 1024, 1_589_248),
    ((linears(4096, 11008, True), 32), 256, 1_417_216),
    ((linears(5120, 13824, True), 40), 1024, 2_416_640),
    (query_value(28, 3072, 1024), 256, 129_024),
    (({"q": (768, 768), "v": (768, 768), "up": (768, 3072)}, 12), 8, 55_584),
    *((query_value(96, 12288), rank, n) for rank, n in ((1, 2_359_488), (16, 2_362_368), (256, 2_408_448))),
]


@pytest.mark.parametrize(("model", "rank", "expected"), COUNTS)
def test_it_trains_as_many_numbers_as_are_published(model, rank, expected):
    kernels, layers = model
    sites = [site(name, *shape, layers) for name, shape in kernels.items()]
    method = vj.VeRA(rank=rank, projection="jax")
    assert vj.count(jax.eval_shape(lambda: method.init(jax.random.key(0), sites, {}))) == expected


def test_the_head_counts_when_it_is_trained_whole():
    """RoBERTa-base, rank 8, query, value and intermediate, with its classifier of two classes: 647 714."""
    shape = lambda *sides: jax.ShapeDtypeStruct(sides, jnp.float32)
    head = {
        "dense": {"kernel": shape(768, 768), "bias": shape(768)},
        "out": {"kernel": shape(768, 2), "bias": shape(2)},
    }
    sites = [site(name, 768, out, 12) for name, out in (("q", 768), ("v", 768), ("up", 3072))]
    method = vj.VeRA(rank=8, projection="jax", full="classifier")
    init = lambda base: vj.init(method, jax.random.key(0), base, sites)
    assert vj.count(jax.eval_shape(init, {"classifier": head})) == 647_714


def test_frozen_projections_are_of_the_published_size():
    """Llama-3.2-3B, query and value, rank 256: 1 572 864."""
    method = vj.VeRA(projection="jax")
    adapter = jax.eval_shape(lambda: method.init(jax.random.key(0), [site("q", 3072, 3072), site("v", 3072, 1024)], {}))
    assert sum(leaf.size for leaf in adapter.frozen["shared"].values()) == 1_572_864


def test_dropout_acts_on_the_input_of_a_only():
    one = vj.split(nnx.Linear(4, 9, rngs=nnx.Rngs(0)))
    adapter = moved(vj.init(vj.VeRA(rank=5, dropout=0.5), jax.random.key(0), one[1]))
    bare, plain = (vj.apply(*one, each, X) for each in (None, adapter))
    dropped = vj.apply(*one, adapter, X, key=jax.random.key(1))
    change = explicit(adapter, "", 4, 9)
    seen = np.linalg.lstsq(change.T, np.asarray(dropped - bare, np.float64).T, rcond=None)[0].T  # the x that A has seen
    gone, kept = np.abs(seen) < 1e-3, np.abs(seen - 2 * np.asarray(X)) < 1e-3
    assert (gone | kept).all()
    assert 0.2 < (gone & ~kept).mean() < 0.8
    close(plain - bare, np.asarray(X) @ change, 1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "vera: rank is 0; it must be a whole number of at least 1"),
        ({"max_in": 2.5}, "vera: max_in is 2.5; it must be a whole number of at least 1"),
        ({"max_out": 8}, "vera: max_out is 8; q needs 9, raise it or exclude the site"),
        ({"dropout": 1.0}, "vera: dropout is 1.0; it must be at least 0 and below 1"),
        ({"projection": "torch"}, "vera: projection is 'torch'; it must be one of peft, jax"),
    ],
)
def test_what_it_cannot_do_is_refused(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.VeRA(**options).init(jax.random.key(0), [site("q", 4, 9)], {})


def test_rows_of_a_batch_may_each_have_their_own():
    """Adapters of one key and equal sides have the same A and B; only vectors differ."""
    graphdef, base = vj.split(nnx.Linear(4, 9, rngs=nnx.Rngs(0)))
    start = vj.init(vj.VeRA(rank=5), jax.random.key(0), base)
    adapters = [moved(start, seed) for seed in (1, 2)]
    x = X[:3, None]
    out = vj.bind(graphdef, base, vj.stack_adapters(adapters), rows=jnp.array([1, -1, 0]))(x)
    for row, adapter in enumerate((adapters[1], None, adapters[0])):
        close(out[row], vj.apply(graphdef, base, adapter, x[row]))
