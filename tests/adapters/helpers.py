"""Arrays without compilation: shapes by abstract evaluation, values by NumPy."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vlora_jax as vj
from vlora_jax.adapters.method import Factors, SiteMethod
from vlora_jax.adapters.trees import flatten, unflatten
from vlora_jax.training.optimizers import OptimizerConfig, optimizer
from vlora_jax.training.step import Subject, train_step


def mostly_slow(names: Any, quick: Any) -> list:
    """Parameters of a test that takes a while for each: all but the quick ones are for `make slow`."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def filled(shapes: Any, seed: int, scale: float = 0.3) -> Any:
    """`shapes` with normal random values in every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype), shapes)


def parameters(make: Any, seed: int = 0) -> tuple[nnx.GraphDef, Any]:
    """Graph and random parameters of the NNX model that `make(rngs)` builds."""
    graphdef, shapes = vj.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return graphdef, filled(shapes, seed)


def random_adapter(method: vj.Method, base: Any, seed: int = 1, sites: list[vj.Site] | None = None) -> vj.Adapter:
    """An adapter of `method` with random values in every tensor."""
    return filled(jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base, sites), base), seed)


def moved(adapter: vj.Adapter, seed: int = 2) -> vj.Adapter:
    """`adapter` with random values added to everything that trains."""
    noise = filled(adapter.trainable, seed)
    return adapter.with_trainable(jax.tree.map(lambda a, b: jnp.asarray(np.add(a, b)), adapter.trainable, noise))


def stacked_sites(layers: int, **shapes: tuple[int, int]) -> list[vj.Site]:
    """A dense site of that many layers for each name and its `(in, out)`."""
    return [vj.Site(name, "kernel", "dense", (layers,), shape, (0,), (1,)) for name, shape in shapes.items()]


def trained_numbers(method: vj.Method, sites: list[vj.Site]) -> int:
    """How many numbers a method trains on sites, without an array; for methods that don't read the base."""
    return vj.count(jax.eval_shape(lambda: vj.init(method, jax.random.key(0), {}, sites)))


def started(adapter: vj.Adapter) -> vj.Adapter:
    """`adapter` as training starts: all that trains is zero, but for LoRA's A."""
    flat = flatten(adapter.trainable)
    zero = {path: leaf if path.endswith("/a") else jnp.zeros_like(leaf) for path, leaf in flat.items()}
    return adapter.with_trainable(unflatten(adapter.trainable, zero))


def close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Equal to `tolerance`, relative to the largest value."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


@dataclass(frozen=True, kw_only=True)
class Gain(SiteMethod):
    """ΔW = g·Σc·W: g of each layer, c shared by all; a forward by `y` and a delta by the kernel agree.

    There are as many c as the stacked models here have layers: taking one for each layer would go unnoticed elsewhere.
    """

    name = "gain"

    def init(self, key, sites, base):
        adapter = super().init(key, sites, base)
        return dataclasses.replace(adapter, frozen={"sites": {}, "shared": {"c": jnp.ones(3)}})

    def init_site(self, key, site, kernel):
        return Factors({"g": jnp.zeros(1)})

    def forward(self, x, y, kernel, factors):
        return (factors["g"] * factors["c"].sum()).astype(y.dtype) * y

    def delta(self, kernel, factors):
        return factors["g"] * factors["c"].sum() * kernel


def squared_error(model: Any, batch: dict[str, Any], train: bool) -> dict[str, Any]:
    """½‖model(x) − y‖² of every example, which `weight` counts."""
    weight = batch.get("weight", jnp.ones(batch["x"].shape[0]))
    losses = 0.5 * ((model(batch["x"]) - batch["y"]) ** 2).reshape(len(weight), -1).sum(-1)
    return {"loss": (weight * losses).sum(), "correct": jnp.float32(0), "weight": weight.sum()}


def trainer(graphdef: Any, adapter: vj.Adapter, loss: Any = squared_error, **options: Any) -> tuple[Any, Any]:
    """The library's train step for an adapter, and the state before the first; AdamW unless `options` say else."""
    config = OptimizerConfig(
        **{"rate": 0.01, "schedule": "constant", "warmup": 0, "decay": 0.0, "clip": None} | options
    )
    tx, subject = optimizer(config, 100, adapter.trainable, adapter), Subject(graphdef, adapter, loss)
    return train_step(subject, tx), jax.tree.map(jnp.array, subject.start(adapter, tx, jax.random.key(0)))
