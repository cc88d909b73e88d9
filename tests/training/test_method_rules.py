"""What the train step does for methods that measure, that choose their gradient, or that follow the run's length."""

import dataclasses
import io
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import parameters
from rich.console import Console

import vlora_jax as vj
from vlora_jax.adapters.deep_lora import compress
from vlora_jax.adapters.method import Factors, Slope
from vlora_jax.adapters.probe import measured
from vlora_jax.training.config import RunConfig, load_config
from vlora_jax.training.job import Job, keys
from vlora_jax.training.loop import train
from vlora_jax.training.optimizers import OptimizerConfig, optimizer
from vlora_jax.training.results import read_run
from vlora_jax.training.step import Subject, evaluate_step, leaf_names, train_step

DESCENT = OptimizerConfig(name="sgd", rate=1.0, schedule="constant", warmup=0, decay=0.0, clip=None, b1=0.0)
X = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
WEIGHT = np.float32([[1, 2, 0], [0.5, 0, 3]])
IDS = np.int32([[7, 8, 9], [10, 11, 12]])


@dataclass(frozen=True, kw_only=True)
class Watching(vj.LoRA):
    """LoRA that counts its tokens, sums its slopes, and notes which micro-batch was the first."""

    def init_site(self, key, site, kernel):
        factors = super().init_site(key, site, kernel)
        return Factors(factors.trainable, {name: jnp.zeros(()) for name in ("tokens", "first", "slope", "weight")})

    def up(self, xa, x, y, kernel, factors):
        change = super().up(xa, x, y, kernel, factors)
        if "seen" not in factors:
            return change
        look = lambda slope, seen, tokens: {
            "tokens": tokens, "first": seen["first"] * tokens, "slope": slope.sum().astype(jnp.float32)
        }  # fmt: skip
        return measured(look, change, factors["seen"], jnp.float32(x.shape[0]))

    def probe(self, step, adapter):
        return {path: {"seen": self.leaves(step, site)} for path, site in adapter.trainable["sites"].items()}

    def leaves(self, step, site):
        stack = site["a"].shape[:-2]
        return {"tokens": jnp.zeros(stack), "first": jnp.full(stack, step + 1.0), "slope": jnp.zeros(stack)}

    def advance(self, step, adapter, grads, opt_state):
        probe = grads["probe"]
        sites = {
            path: seen["seen"] | {"weight": jnp.broadcast_to(probe["weight"], seen["seen"]["tokens"].shape)}
            for path, seen in probe["sites"].items()
        }
        return dataclasses.replace(adapter, frozen=adapter.frozen | {"sites": sites}), opt_state


@dataclass(frozen=True, kw_only=True)
class OddOnly(vj.LoRA):
    """LoRA that learns from examples with an odd number, and from them twice as much."""

    def gradients(self, gradient, adapter, ids):
        slope = gradient(adapter.trainable, (ids % 2).astype(jnp.float32))
        return Slope(jax.tree.map(lambda leaf: 2 * leaf, slope.grads), slope.sums, slope.probe)


def output_loss(model, batch, train):
    """The weighted sum of outputs, linear in the model."""
    out, weight = model(batch["x"]), batch["weight"]
    return {"loss": (weight * out.sum(-1)).sum(), "correct": jnp.float32(0), "weight": weight.sum()}


def one_step(method, make, options=DESCENT):
    """A method's adapter and the state after one step, with the step's metrics."""
    graphdef, base = parameters(make)
    adapter = jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(base)
    start = jax.tree.map(lambda leaf: leaf + 0.25, adapter.trainable)
    subject, adapter = Subject(graphdef, adapter, output_loss), adapter.with_trainable(start)
    tx = optimizer(options, 10, adapter.trainable, adapter)
    state = jax.tree.map(jnp.array, subject.start(adapter, tx, jax.random.key(0)))
    before = jax.tree.map(np.array, adapter.trainable)
    batch = {"x": X, "weight": WEIGHT, "id": IDS}
    return subject, base, before, *train_step(subject, tx)(state, base, batch)


LINEAR = lambda rngs: nnx.Linear(4, 5, rngs=rngs)


class Stacked(nnx.Module):
    """Two stacked layers and a scan over them."""

    def __init__(self, rngs):
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))(rngs)

    def __call__(self, x):
        graphdef, layers = nnx.split(self.layers)
        return jax.lax.scan(lambda h, layer: (jax.checkpoint(nnx.merge(graphdef, layer))(h), None), x, layers)[0]


def test_a_probe_measures_and_neither_the_optimiser_nor_the_metrics_know():
    subject, base, before, state, metrics = one_step(Watching(rank=2), LINEAR)
    _, _, same, plain, plain_metrics = one_step(vj.LoRA(rank=2), LINEAR)
    jax.tree.map(np.testing.assert_array_equal, before, same)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.trainable, plain.trainable)
    assert metrics.keys() == plain_metrics.keys()
    np.testing.assert_allclose(metrics["gradient_norm"], plain_metrics["gradient_norm"], rtol=1e-6)
    assert len(metrics["finite"]) == len(leaf_names(state.trainable)) == 3
    seen = state.frozen["sites"][""]
    assert float(seen["tokens"]) == 6  # all of both micro-batches, whatever their weights
    assert float(seen["first"]) == 3  # the first micro-batch's only
    np.testing.assert_allclose(seen["slope"], WEIGHT.sum() * 5, rtol=1e-6)  # not divided by the weight
    np.testing.assert_allclose(seen["weight"], WEIGHT.sum(), rtol=1e-6)

    sums = evaluate_step(subject)(state, base, {"x": X[:1], "weight": WEIGHT[:1]})
    assert np.isfinite(sums["loss"])


def test_every_layer_of_a_stack_has_its_own_probe_also_where_layers_are_computed_again():
    *_, state, _ = one_step(Watching(rank=2), Stacked)
    (seen,) = state.frozen["sites"].values()
    np.testing.assert_array_equal(seen["tokens"], [6, 6])
    assert seen["slope"][0] != seen["slope"][1]


def test_a_method_may_choose_the_gradient_and_its_examples():
    """Of the mean over the odd examples, twice: 2·Σ w x / Σ w times the column sums of s·B."""
    _, _, before, state, metrics = one_step(OddOnly(rank=2, alpha=2.0), LINEAR)
    odd = WEIGHT * (IDS % 2)
    mean = np.einsum("kb,kbi->i", odd, X) / odd.sum()
    a, b = (before["sites"][""][name] for name in "ab")
    np.testing.assert_allclose(state.trainable["sites"][""]["a"], a - 2 * np.outer(mean, b.sum(1)), atol=1e-5)
    np.testing.assert_allclose(state.trainable["sites"][""]["b"], b - 2 * np.outer(mean @ a, np.ones(5)), atol=1e-5)
    np.testing.assert_allclose(metrics["weight"], odd.sum(), rtol=1e-6)


RUN = [
    "model.layers=2", "model.width=16", "model.heads=2", "model.mlp_width=16", "model.vertical=null", "data.batch=32",
    "optimizer.schedule=constant", "optimizer.warmup=0", "adapter.method=adalora", "adapter.rank=2",
    "adapter.target_rank=1", "steps=12", "run_dir=unused",
]  # fmt: skip


def run_config(*overrides: str) -> RunConfig:
    return load_config(None, [*RUN, *overrides])


@pytest.mark.parametrize(("override", "steps"), [("steps=12", 12), ("adapter.steps=40", 40)])
def test_a_method_is_told_how_long_the_run_is_unless_it_says_so_itself(override, steps):
    job = Job.of(run_config(override), jax.devices()[:1])
    assert job.subject.adapter.method.steps == steps
    assert run_config(override).adapter.steps == (40 if steps == 40 else 0)


def test_a_run_whose_method_follows_its_length_keeps_it():
    open_ended = lambda *overrides: "steps" not in run_config(*overrides).identity()
    assert not open_ended()
    assert open_ended("adapter.steps=12")


def finished(run, *overrides, stop_at=None, devices=1):
    """The state after a run of six steps, or after as many as asked for."""
    short = ("steps=6", "evaluate.every=6", "checkpoint.every=100", "log.tensorboard=false", "evaluate.batch=360")
    asked = iter(range(1, 100))
    stop = None if stop_at is None else lambda: next(asked) >= stop_at
    run_config_of = load_config(
        None, [*(each for each in RUN if "adapter" not in each), *short, *overrides, f"run_dir={run}"]
    )
    result = train(run_config_of, Console(file=io.StringIO(), width=200), stop, jax.devices()[:devices])
    return result.state


SPIEL = ("adapter.method=spiel", "adapter.density=0.2", "adapter.every=3", "adapter.collect=2")


@pytest.mark.slow
def test_a_rule_goes_on_where_a_stopped_run_left_it(tmp_path):
    """Places, candidates and sums are saved with the rest, whole numbers as such."""
    whole = finished(tmp_path / "whole", *SPIEL)
    finished(tmp_path / "parts", *SPIEL, stop_at=4)
    parts = finished(tmp_path / "parts", *SPIEL)
    for one, other in zip(
        *(jax.tree.leaves((s.trainable, s.frozen, s.opt_state)) for s in (whole, parts)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    (index, *_) = (own["index"] for own in whole.frozen["sites"].values())
    assert index.dtype == jnp.int32


@pytest.mark.slow
def test_what_is_measured_on_several_devices_is_measured_of_all(tmp_path):
    fly = ("adapter.method=flylora", "adapter.rank=4", "adapter.active=1", "optimizer.rate=1e-4")
    one = finished(tmp_path / "one", *fly)
    two = finished(tmp_path / "two", *fly, "mesh.data=2", devices=2)
    for path, own in one.frozen["sites"].items():
        assert np.abs(own["d"]).max() > 1e-4
        close = np.isclose(own["d"], two.frozen["sites"][path]["d"], atol=1e-6)
        assert close.mean() > 0.95, "but for tokens on the edge between two ranks"


MATRIX = [
    "model.family=matrix", "model.rows=12", "model.columns=16", "data.name=low_rank", "data.rows=12", "data.columns=16",
    "data.rank=2", "data.observed=0.8", "adapter.method=deep_lora", "adapter.form=compressed", "adapter.rank=4",
    "optimizer.rate=1e-2", "optimizer.schedule=constant", "optimizer.warmup=0", "optimizer.decay=0", "steps=300",
    "evaluate.every=300", "evaluate.metric=loss", "evaluate.batch=1", "checkpoint.every=150", "log.tensorboard=false",
]  # fmt: skip


def test_a_start_that_is_made_of_a_gradient_is_made_of_the_first_batch_s():
    """By NumPy: the wide start, the slope of the squared error of the entries that are seen, and what compresses it."""
    job = Job.of(load_config(None, [*MATRIX, "run_dir=unused"]), jax.devices()[:1])
    with jax.set_mesh(job.mesh):
        base, state = job.start()
    method, (path,) = job.subject.adapter.method, state.trainable["sites"]
    wide = jax.jit(lambda key, base: vj.init(method.opening, key, base))(keys(0)[1], base)
    f3, f2, f1 = (np.asarray(wide.factors(path)[name], np.float64) for name in ("f3", "f2", "f1"))
    entries = job.data.train[0]
    slope = entries["mask"] * (f3 @ f2 @ f1 - entries["targets"])
    slopes = {"f3": slope @ (f2 @ f1).T, "f2": f3.T @ slope @ f1.T, "f1": (f3 @ f2).T @ slope}
    gradients = {"sites": {path: {name: np.float32(1e6 * leaf) for name, leaf in slopes.items()}}, "full": {}}
    expected = jax.jit(compress)(wide, gradients)
    found = job.subject.adapter_of(state.trainable, state.frozen)
    assert found.method == expected.method == method
    for name in ("p", "q"):
        one, other = (np.asarray(adapter.factors(path)[name]) for adapter in (found, expected))
        span = lambda frame, flip=name == "q": (
            frame.T @ np.linalg.pinv(frame.T) if flip else frame @ np.linalg.pinv(frame)
        )
        np.testing.assert_allclose(span(one), span(other), atol=1e-4)


def test_a_run_from_such_a_start_learns_goes_on_and_can_be_looked_at(tmp_path):
    """Zeros have a loss of about 1; frames of another gradient leave 0.76."""
    config = load_config(None, [*MATRIX, f"run_dir={tmp_path / 'run'}"])
    quietly = lambda stop: train(config, Console(file=io.StringIO()), stop, jax.devices()[:1])
    asked = iter(range(150))
    assert quietly(lambda: next(asked, None) is None).stopped
    result = quietly(None)
    assert result.progress.last["loss"] < 0.3
    for path, own in read_run(tmp_path / "run").adapter.trainable["sites"].items():
        np.testing.assert_array_equal(own["m1"], result.state.trainable["sites"][path]["m1"])
