"""Schedules, updates, decay, clipping and rates of groups, against their formulas in NumPy."""

import math

import jax
import numpy as np
import pytest
from flax import nnx

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import TargetError
from vlora_jax.models.vit import ViT, ViTConfig
from vlora_jax.training.optimizers import OptimizerConfig, decayed, optimizer, schedule
from vlora_jax.vertical.config import Vertical

PLAIN = {"name": "sgd", "b1": 0.0, "rate": 0.5, "schedule": "constant", "warmup": 0, "decay": 0.0, "clip": None}
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in {"kernel": (3, 2), "bias": (2,)}.items()}
FIRST, LAST = (jax.tree.map(lambda leaf: RNG.normal(size=leaf.shape).astype(np.float32), PARAMS) for _ in range(2))
GRADIENTS = [FIRST, jax.tree.map(lambda leaf: -0.15 * leaf, FIRST), LAST]  # the shares decide the second one's sign


def rates_at(steps, **options):
    config = OptimizerConfig(rate=0.5, **options)
    return jax.jit(jax.vmap(schedule(config, 110)))(np.array(steps))


@pytest.mark.parametrize(
    ("name", "quarter", "end"),
    [
        ("cosine", 0.05 + 0.45 * (1 + math.cos(math.pi / 4)) / 2, 0.05),
        ("linear", 0.5 - 0.45 / 4, 0.05),
        ("constant", 0.5, 0.5),
    ],
)
def test_a_schedule_warms_up_and_comes_down_to_its_end(name, quarter, end):
    found = rates_at([0, 3, 10, 35, 60, 110, 500], schedule=name, warmup=10, end=0.1)
    np.testing.assert_allclose(found, [0, 0.15, 0.5, quarter, (0.5 + end) / 2, end, end], rtol=1e-6)


def test_a_schedule_without_warmup_starts_at_its_peak():
    np.testing.assert_allclose(rates_at([0, 55, 110], schedule="linear", warmup=0), [0.5, 0.25, 0], atol=1e-7)


def test_a_warmup_longer_than_the_run_still_reaches_the_peak():
    np.testing.assert_allclose(rates_at([0, 55, 110], warmup=1000), [0, 0.25, 0.5], rtol=1e-6)


def updated(config, gradients, params=PARAMS, adapter=None):
    """Parameters after one step a gradient."""
    tx = optimizer(OptimizerConfig(**config), 10, params, adapter)

    def steps(params, gradients):
        state, found = tx.init(params), []
        for gradient in gradients:
            updates, state = tx.update(gradient, state, params)
            params = jax.tree.map(lambda p, u: p + u, params, updates)
            found.append(params)
        return found

    return jax.jit(steps)(params, gradients)


def adamw(m, v, g, t):
    m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
    return m, v, (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3)


def lion(m, v, g, t):
    return 0.95 * m + 0.05 * g, v, np.sign(0.8 * m + 0.2 * g)


def sgd(m, v, g, t):
    return (m := g + 0.8 * m), v, m


def adafactor(m, v, g, t):
    keep = 1 - t**-0.8
    v = keep * v + (1 - keep) * g**2
    return m, v, g / np.sqrt(v)


@pytest.mark.parametrize("rule", [adamw, lion, sgd, adafactor], ids=lambda rule: rule.__name__)
def test_updates_follow_the_papers_and_decay_is_decoupled(rule):
    """Three steps p ← p - rate · (direction + decay · p), the last term for the kernel only."""
    config = PLAIN | {"name": rule.__name__, "b1": 0.8, "b2": 0.95, "eps": 1e-3, "rate": 0.1, "decay": 0.3}
    found = updated(config, GRADIENTS)
    for name, decay in (("kernel", 0.3), ("bias", 0.0)):
        p, m, v = np.float64(PARAMS[name]), 0.0, 0.0
        for t, gradient in enumerate(GRADIENTS, 1):
            m, v, direction = rule(m, v, np.float64(gradient[name]), t)
            p = p - 0.1 * (direction + decay * p)
            np.testing.assert_allclose(found[t - 1][name], p, rtol=1e-5)


def test_gradients_are_clipped_by_the_norm_of_all_of_them():
    norm = math.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in GRADIENTS[0].values()))
    for clip, kept in ((norm / 4, 0.25), (norm * 4, 1.0)):
        (found,) = updated(PLAIN | {"clip": clip}, GRADIENTS[:1])
        for name, leaf in PARAMS.items():
            np.testing.assert_allclose(found[name], leaf - 0.5 * kept * GRADIENTS[0][name], rtol=1e-5)


@pytest.fixture(scope="module")
def base():
    config = ViTConfig(width=16, heads=2, mlp_width=24, layers=2, vertical=Vertical(size=2))
    return vj.split(nnx.eval_shape(lambda: ViT(config, nnx.Rngs(0))))[1]


def test_biases_and_norm_scales_do_not_decay(base):
    """Also stacked ones, which look like matrices, and those that are trained whole beside an adapter."""
    adapter = jax.eval_shape(
        lambda base: vj.init(vj.LoRA(rank=2, full=["head", "norm"]), jax.random.key(0), base), base
    )
    for tree, of, spared in ((base, None, 14), (adapter.trainable, adapter, 3)):
        mask = flatten(decayed(tree, of))
        assert mask.keys() == flatten(tree).keys()
        kept = [path for path, decays in mask.items() if not decays]
        assert len(kept) == spared
        assert {path.split("/")[-1] for path in kept} == {"bias", "scale"}
        assert not {"bias", "scale"} & {path.split("/")[-1] for path in mask if path not in kept}


def test_decay_takes_no_adapter_from_where_it_changes_nothing():
    """A scale that starts at 1, and a start in the kernel, stay where they are without a gradient; LoRA's A shrinks."""
    base = vj.split(nnx.Linear(6, 6, rngs=nnx.Rngs(0)))[1]
    shrinking = {}
    for method in (vj.LoRA(rank=2), vj.IA3(), vj.DoRA(rank=2), vj.PiSSA(rank=2), vj.VeRA(rank=2), vj.DeLoRA(rank=2)):
        adapter = vj.init(method, jax.random.key(0), base)
        zero = jax.tree.map(np.zeros_like, adapter.trainable)
        (found,) = updated(PLAIN | {"decay": 0.5}, [zero], adapter.trainable, adapter)
        after, before = flatten(found), flatten(adapter.trainable)
        shrinking[method.name] = {path.rsplit("/", 1)[-1] for path in after if (after[path] != before[path]).any()}
    assert shrinking == {"lora": {"a"}, "ia3": set(), "dora": {"a"}, "pissa": set(), "vera": set(), "delora": set()}


def ones(shapes):
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


def test_groups_have_rates_of_their_own(base):
    """B learns 8 times as fast (LoRA+); patterns of the config multiply that, one after the other."""
    method = vj.LoRA(rank=2, targets="attention", b_rate=8.0, full="head")
    adapter = jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base)
    groups = {"full": 0.5, "attn/q": 3.0, "a": 0.25}
    trainable = ones(adapter.trainable)
    (found,) = updated(PLAIN | {"groups": groups}, [trainable], trainable, adapter)
    expected = {"full/head/bias": 0.5, "full/head/kernel": 0.5}
    for site in ("q", "k", "v", "o"):
        factor = 3.0 if site == "q" else 1.0
        expected |= {f"sites/layers/block/attn/{site}/a": 0.25 * factor}
        expected |= {f"sites/layers/block/attn/{site}/b": 8 * factor}
    moved = {path: (1 - leaf) / 0.5 for path, leaf in flatten(found).items()}
    assert moved.keys() == expected.keys()
    for path, leaf in moved.items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-6, err_msg=path)


def test_groups_of_a_model_trained_whole():
    (found,) = updated(PLAIN | {"groups": {"bias": 0.1}}, GRADIENTS[:1])
    np.testing.assert_allclose(found["bias"], PARAMS["bias"] - 0.05 * GRADIENTS[0]["bias"], rtol=1e-6)
    np.testing.assert_allclose(found["kernel"], PARAMS["kernel"] - 0.5 * GRADIENTS[0]["kernel"], rtol=1e-6)


def test_a_group_that_matches_nothing_is_refused():
    with pytest.raises(TargetError, match=r"^optimizer.groups 'kernle' matches nothing; nearest: kernel, bias$"):
        optimizer(OptimizerConfig(groups={"kernle": 0.1}), 10, PARAMS, None)
