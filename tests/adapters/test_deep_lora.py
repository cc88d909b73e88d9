"""Deep LoRA: its products and their start, what compression keeps of a wide one's path, and the sizes it counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, moved, parameters, random_adapter
from third_party import LaxScanned

import vlora_jax as vj
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.deep_lora import compress
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError
from vlora_jax.training.optimizers import OptimizerConfig, optimizer

EPSILON = 1e-2


def site(shape, stack=(), path="w", kind="dense"):
    return Site(path, "kernel", kind, stack, shape, (0,), (1,))


def bert(targets):
    """Kernels of BERT-base-cased: 24 of queries and values, 72 of blocks, 74 with pooler and words, 75 with places."""
    square, words = {"q": (768, 768), "v": (768, 768)}, {}
    if targets > 24:
        square |= {"k": (768, 768), "o": (768, 768), "up": (768, 3072), "down": (3072, 768)}
    if targets > 72:
        words |= {"pooler": (768, 768), "words": (28996, 768)}
    if targets > 74:
        words |= {"places": (512, 768)}
    embeds = ("words", "places")
    blocks = [site(shape, (12,), f"layers/{name}") for name, shape in square.items()]
    return blocks + [site(shape, (), name, "embed" if name in embeds else "dense") for name, shape in words.items()]


COUNTS = {  # targets: LoRA r = 8, narrow r = 8, compressed k = 8, wide
    24: (294_912, 296_448, 299_520, 42_467_328),
    72: (1_327_104, 1_331_712, 1_340_928, 169_869_312),
    74: (1_577_504, 1_582_240, 1_591_712, 195_087_360),
    75: (1_587_744, 1_592_544, 1_602_144, 196_004_864),
}


@pytest.mark.parametrize("targets", COUNTS)
def test_it_trains_as_many_numbers_as_its_table_says(targets):
    sites = bert(targets)
    make = lambda method: jax.eval_shape(lambda: vj.init(method, jax.random.key(0), {}, sites))
    lora, narrow, wide = (
        make(method)
        for method in (
            vj.LoRA(rank=8, targets=".*"),
            vj.DeepLoRA(targets=".*"),
            vj.DeepLoRA(form="wide", targets=".*"),
        )
    )
    compressed = jax.eval_shape(lambda wide: compress(wide, wide.trainable), wide)
    assert tuple(vj.count(adapter) for adapter in (lora, narrow, compressed, wide)) == COUNTS[targets]


@pytest.mark.parametrize(
    ("form", "shape", "width"), [("narrow", (9, 6), 2), ("wide", (9, 6), 6), ("widest", (6, 9), 9)]
)
def test_factors_start_orthogonal_times_epsilon_in_every_layer(form, shape, width):
    method = vj.DeepLoRA(form=form, rank=2, epsilon=0.5)
    adapter = jax.jit(lambda: vj.init(method, jax.random.key(0), {}, [site(shape, (3,))]))()
    factors = adapter.factors("w")
    shapes = {"f3": (3, shape[0], width), "f2": (3, width, width), "f1": (3, width, shape[1])}
    assert {name: factor.shape for name, factor in factors.items()} == shapes
    for factor in factors.values():
        values = np.linalg.svd(factor, compute_uv=False)
        close(values, np.full(values.shape, 0.5))
        assert len({layer.tobytes() for layer in np.asarray(factor)}) == 3
    delta = jax.jit(lambda: site_delta(adapter, adapter.sites[0], jnp.zeros((3, *shape))))()
    close(np.linalg.norm(delta, 2, axis=(1, 2)), np.full(3, 0.5**3))


def test_the_default_start_changes_a_kernel_by_a_billionth():
    adapter = jax.jit(lambda: vj.init(vj.DeepLoRA(), jax.random.key(0), {}, [site((12, 10))]))()
    delta = np.linalg.multi_dot([np.float64(adapter.factors("w")[name]) for name in ("f3", "f2", "f1")])
    np.testing.assert_allclose(np.linalg.norm(delta, 2), 1e-9, rtol=1e-5)


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_change_is_the_product_of_all_factors(depth):
    adapter = moved(jax.jit(lambda: vj.init(vj.DeepLoRA(depth=depth, rank=3), jax.random.key(0), {}, [site((6, 5))]))())
    factors = [np.asarray(adapter.factors("w")[f"f{j}"]) for j in range(depth, 0, -1)]
    product = functools.reduce(np.matmul, factors)
    method, merged = adapter.method, adapter.factors("w")
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    delta, out = jax.jit(
        lambda: (
            method.delta(jnp.zeros((6, 5)), merged),
            method.forward(jnp.asarray(x), jnp.zeros((4, 5)), jnp.zeros((6, 5)), merged),
        )
    )()
    close(delta, product)
    close(out, x @ product)
    left, right = method.low_rank((6, 5), merged)
    close(left @ right, product)
    assert left.shape == (6, 3)


def test_depth_two_is_lora_with_a_scale_of_one_but_a_hotter_start():
    made = jax.jit(lambda: vj.init(vj.DeepLoRA(depth=2, rank=32), jax.random.key(0), {}, [site((48, 64))]))()
    assert not made.factors("w")["f2"].any()
    close(np.std(made.factors("w")["f1"]), 1.0, 0.05)
    deep = moved(made)
    lora = Adapter.of(
        vj.LoRA(rank=32, alpha=32.0),
        list(deep.sites),
        trainable={"w": {"a": deep.factors("w")["f2"], "b": deep.factors("w")["f1"]}},
    )
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(48, 64)), jnp.float32)

    @jax.jit
    def slopes():
        of = lambda adapter: jax.value_and_grad(
            lambda t: (site_delta(adapter.with_trainable(t), deep.sites[0], weights * 0) * weights).sum()
        )(adapter.trainable)
        return of(deep), of(lora)

    (value, slope), (again, lora_slope) = slopes()
    close(value, again)
    for ours, theirs in (("f2", "a"), ("f1", "b")):
        close(slope["sites"]["w"][ours], lora_slope["sites"]["w"][theirs])


def orthogonal(rng, rows, columns):
    """EPSILON times a matrix with orthonormal rows or columns, whichever are fewer."""
    tall = np.linalg.qr(rng.normal(size=(max(rows, columns), min(rows, columns))))[0]
    return EPSILON * (tall if rows >= columns else tall.T)


def target(shape, rank=3, seed=0):
    """A kernel of `rank` singular values 3, 2, 1."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(side, rank)))[0] for side in shape)
    return u * np.arange(rank, 0, -1.0) @ v.T


def distance(goal, observed, factors, names):
    """½‖ΔW - goal‖² over the observed entries."""
    delta = functools.reduce(jnp.matmul, [factors[name] for name in names])
    return 0.5 * (observed * (delta - goal) ** 2).sum()


@functools.partial(jax.jit, static_argnames=("names", "steps", "rate"))
def descend(factors, goal, observed, relative, names, steps, rate):
    """ΔW after each step of gradient descent, and the last factors; `relative` rates by factor."""
    loss = functools.partial(distance, goal, observed, names=names)

    def step(factors, _):
        delta = functools.reduce(jnp.matmul, [factors[name] for name in names])
        slope = jax.grad(loss)(factors)
        return {name: value - rate * relative[name] * slope[name] for name, value in factors.items()}, delta

    last, path = jax.lax.scan(step, factors, None, steps)
    return path, last


class Race:
    """A wide adapter and what compression makes of it, on the way to one target by gradient descent in float64."""

    def __init__(self, shape, form="wide", observed=1.0, frame_rate=0.0, steps=1500, rate=0.1):
        self.goal, self.steps, self.rate = target(shape), steps, rate
        self.observed = np.float64(np.random.default_rng(7).random(shape) < observed)
        method = vj.DeepLoRA(form=form, rank=6, epsilon=EPSILON, frame_rate=frame_rate)
        width, rng = (min if form == "wide" else max)(shape), np.random.default_rng(1)
        f3, f2, f1 = (orthogonal(rng, *sides) for sides in ((shape[0], width), (width, width), (width, shape[1])))
        self.slope = self.observed * (f3 @ f2 @ f1 - self.goal)  # of the loss at the start, by ΔW
        slopes = {"f3": self.slope @ (f2 @ f1).T, "f2": f3.T @ self.slope @ f1.T, "f1": (f3 @ f2).T @ self.slope}
        self.wide = Adapter.of(
            method, [site(shape)], trainable={"w": jax.tree.map(jnp.asarray, {"f3": f3, "f2": f2, "f1": f1})}
        )
        self.compressed = jax.jit(compress)(self.wide, self.wide.trainable | {"sites": {"w": slopes}})

    def run(self, adapter, **factors):
        method, factors = adapter.method, adapter.factors("w") | factors
        relative = dict.fromkeys(factors, 1.0) | {name: method.frame_rate for name in ("p", "q") if name in factors}
        path, last = descend(
            factors, self.goal, self.observed, relative, names=tuple(method.names), steps=self.steps, rate=self.rate
        )
        return np.asarray(path), last

    def error(self, path):
        return np.linalg.norm(path[-1] - self.goal) / np.linalg.norm(self.goal)


def test_on_a_square_kernel_frozen_frames_follow_the_wide_path_to_epsilon_to_the_n():
    with jax.enable_x64(True):
        race = Race((16, 16))
        frames = race.compressed.factors("w")
        for name in ("p", "q"):
            matrix = frames[name] if name == "p" else frames[name].T
            np.testing.assert_allclose(matrix.T @ matrix, np.eye(6), atol=1e-13)
        (wide, _), (compressed, last) = race.run(race.wide), race.run(race.compressed)
        apart = np.linalg.norm(wide - compressed, 2, axis=(1, 2))
        np.testing.assert_allclose(apart.max(), EPSILON**3, rtol=1e-6)
        assert race.error(wide) < 1e-5
        assert race.error(compressed) < 1e-5
        for name in ("p", "q"):
            np.testing.assert_array_equal(last[name], frames[name])


def test_random_frames_learn_nothing():
    with jax.enable_x64(True):
        race, rng = Race((16, 16)), np.random.default_rng(5)
        p, q = (jnp.asarray(np.linalg.qr(rng.normal(size=(16, 6)))[0]) for _ in range(2))
        path, _ = race.run(race.compressed, p=p, q=q.T)
        assert race.error(path) > 0.9


@pytest.mark.parametrize("form", ["wide", "widest"])
@pytest.mark.parametrize("shape", [(12, 18), (18, 12)])
def test_on_other_shapes_the_longer_side_reaches_the_target_and_the_shorter_stalls(shape, form):
    with jax.enable_x64(True):
        race = Race(shape, form, steps=3000)
        (wide, _), (compressed, _) = race.run(race.wide), race.run(race.compressed)
        assert race.error(wide) < 1e-4
        assert race.error(compressed) < 1e-4
        if form == "widest":
            assert np.linalg.norm(wide - compressed, 2, axis=(1, 2)).max() < 0.01
        frames = race.compressed.factors("w")
        longer = frames["q"].T if shape[1] > shape[0] else frames["p"]
        np.testing.assert_allclose(longer.T @ longer, np.eye(6), atol=1e-13)
        factors = {name: np.asarray(value) / EPSILON for name, value in race.wide.factors("w").items()}
        f3, f2, f1 = (factors[name] for name in ("f3", "f2", "f1"))
        whole = f3 @ f2 @ f1
        if shape[1] > shape[0]:  # the frames of the other side, by NumPy
            u, _, v = np.linalg.svd((race.slope @ (f2 @ f1).T).T, full_matrices=False)
            p = np.linalg.qr(np.hstack([v[:3].T, f3 @ u[:, :3]]))[0]
            q = (whole.T @ p).T
        else:
            u, _, v = np.linalg.svd((f3 @ f2).T @ race.slope, full_matrices=False)
            q = np.linalg.qr(np.hstack([v[:3].T, f1.T @ u[:, :3]]))[0].T
            p = whole @ q.T
        stalled, _ = race.run(race.compressed, p=jnp.asarray(p), q=jnp.asarray(q))
        assert race.error(stalled) > 0.3


def test_frames_that_train_slowly_get_further_where_the_target_is_seen_in_part():
    with jax.enable_x64(True):
        errors = {}
        for gamma in (0.0, 0.1):
            race = Race((16, 16), observed=0.5, frame_rate=gamma, steps=3000)
            errors[gamma] = race.error(race.run(race.compressed)[0])
        errors["wide"] = race.error(race.run(race.wide)[0])
        assert errors["wide"] < errors[0.1] < errors[0.0] - 0.1


@pytest.fixture(scope="module")
def pair():
    """A wide adapter on stacked kernels of both orientations, and a gradient; in float32."""
    base = parameters(LaxScanned)[1]
    method = vj.DeepLoRA(form="wide", rank=2, targets="up|down", full="up/bias")
    wide = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)
    return wide, random_adapter(method, base, 3).trainable


def test_every_layer_of_a_stack_is_compressed_by_its_own_gradient(pair):
    wide, gradient = pair
    compressed = jax.jit(compress)(wide, gradient)
    for each in wide.sites:
        factors, slopes = wide.factors(each.path), gradient["sites"][each.path]
        for layer in range(3):
            f1, f2, f3 = (np.float64(factors[name][layer]) / 1e-3 for name in ("f1", "f2", "f3"))
            g1, g3 = (np.float64(slopes[name][layer]) for name in ("f1", "f3"))
            if each.out_dim >= each.in_dim:
                u, _, v = np.linalg.svd(g1)
                basis = np.linalg.qr(np.stack([v[0], f1.T @ u[:, 0]], 1))[0]
                product = f3 @ f2 @ f1 @ basis @ basis.T
            else:
                u, _, v = np.linalg.svd(g3.T)
                basis = np.linalg.qr(np.stack([v[0], f3 @ u[:, 0]], 1))[0]
                product = basis @ basis.T @ f3 @ f2 @ f1
            ours = {name: np.asarray(value[layer]) for name, value in compressed.factors(each.path).items()}
            close(ours["p"] @ ours["q"], product, 1e-5)  # in which the signs of bases cancel
            for j in (1, 2, 3):
                close(ours[f"m{j}"], 1e-3 * np.eye(2))
    np.testing.assert_array_equal(
        compressed.trainable["full"]["blocks/up/bias"], wide.trainable["full"]["blocks/up/bias"]
    )


def test_frames_learn_at_their_own_rate_or_are_frozen(pair):
    wide, gradient = pair
    config = OptimizerConfig(name="sgd", b1=0.0, rate=0.1, schedule="constant", warmup=0, decay=0.0, clip=None)
    updates = {}
    for gamma in (0.25, 0.0):
        method = vj.DeepLoRA(form="wide", rank=2, targets="up|down", full="up/bias", frame_rate=gamma)
        adapter = jax.eval_shape(compress, Adapter(wide.trainable, wide.frozen, method, wide.sites), gradient)
        tx = optimizer(config, 10, adapter.trainable, adapter)
        ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), adapter.trainable)
        updates = flatten(tx.update(ones, tx.init(ones), ones)[0])
        frames = [path for path in updates if path.endswith(("/p", "/q"))]
        assert len(frames) == (4 if gamma else 0)
        for path, update in updates.items():
            close(update, np.full(update.shape, -0.1 * (gamma if path in frames else 1.0)))
        kept = adapter.frozen["sites"].get("blocks/up", {})
        assert sorted(kept) == ([] if gamma else ["p", "q"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 1}, "deep_lora: depth is 1; it must be at least 2"),
        ({"rank": 0}, "deep_lora: rank is 0; it must be at least 1"),
        ({"form": "compressed", "depth": 2}, "deep_lora: depth is 2; it must be at least 3"),
        ({"form": "compressed", "rank": 3}, "deep_lora: rank is 3; it must be even in the compressed form"),
        ({"form": "deep"}, "deep_lora: form is 'deep'; it must be one of narrow, wide, widest, compressed"),
        ({"epsilon": 0.0}, "deep_lora: epsilon is 0.0; it must be positive"),
        ({"frame_rate": -0.1}, "deep_lora: frame_rate is -0.1; it must not be negative"),
    ],
)
def test_impossible_options_are_refused_by_name(unchecked, options, message):
    with pytest.raises(ConfigError, match=message):
        vj.DeepLoRA(**options)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"rank": 5}, "dense", r"deep_lora: rank 5 is above the smaller side, 4, of w \(6, 4\)"),
        ({"form": "compressed"}, "dense", "form compressed starts from a gradient, as training does"),
        ({"form": "widest"}, "embed", r"form widest on the embedding w \(6, 4\); exclude it"),
    ],
)
def test_what_does_not_fit_a_site_is_refused(options, kind, message):
    with pytest.raises(ConfigError, match=message):
        vj.init(vj.DeepLoRA(targets=".*", **options), jax.random.key(0), {}, [site((6, 4), kind=kind)])


def test_only_wide_adapters_are_compressed():
    make = lambda method: jax.eval_shape(lambda: vj.init(method, jax.random.key(0), {}, [site((6, 4))]))
    for method, message in (
        (vj.LoRA(rank=2), "compress takes deep_lora of form wide or widest, not lora"),
        (vj.DeepLoRA(rank=2), "compress takes deep_lora of form wide or widest, not deep_lora, form narrow"),
        (vj.DeepLoRA(form="wide", rank=3), "deep_lora: rank is 3; it must be even in the compressed form"),
        (vj.DeepLoRA(form="wide", rank=6), "deep_lora: rank 6 is above the smaller side, 4, of w"),
    ):
        adapter = make(method)
        with pytest.raises(ConfigError, match=message):
            jax.eval_shape(compress, adapter, adapter.trainable)
