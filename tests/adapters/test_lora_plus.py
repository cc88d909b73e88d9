"""LoRA+ (arXiv 2402.12354) is LoRA whose B learns faster: `b_rate`, and nothing else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import close, parameters, random_adapter

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError
from vlora_jax.training.optimizers import OptimizerConfig, optimizer, rates

X, Y = (jnp.asarray(np.random.default_rng(seed).normal(size=(8, size)), jnp.float32) for seed, size in ((0, 4), (1, 6)))
CONFIG = OptimizerConfig(rate=0.01, schedule="constant", warmup=0, decay=0.0, clip=None)


def steps(method, graphdef, base, start, tx=None, count=3):
    """What trains, before and after each of some steps on one batch."""
    adapter = vj.Adapter.of(method, list(start.sites), trainable=start.trainable["sites"])
    tx = tx or optimizer(CONFIG, 10, adapter.trainable, adapter)
    loss = lambda trainable: ((vj.apply(graphdef, base, adapter.with_trainable(trainable), X) - Y) ** 2).mean()

    @jax.jit
    def run(trainable):
        state, found = tx.init(trainable), [trainable]
        for _ in range(count):
            updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
            trainable = optax.apply_updates(trainable, updates)
            found.append(trainable)
        return found

    return [tree["sites"][""] for tree in run(adapter.trainable)]


@pytest.fixture(scope="module")
def linear():
    graphdef, base = parameters(lambda rngs: nnx.Linear(4, 6, rngs=rngs))
    return graphdef, base, random_adapter(vj.LoRA(rank=2), base)


def test_a_ratio_of_one_is_lora(linear):
    """Step by step what optax's plain Adam makes of LoRA."""
    one = steps(vj.LoRA(rank=2, b_rate=1.0), *linear)
    plain = steps(vj.LoRA(rank=2), *linear, tx=optax.adam(0.01))
    for ours, theirs in zip(one, plain, strict=True):
        for name in "ab":
            close(ours[name], theirs[name])


def test_a_ratio_speeds_up_b_alone(linear):
    """The first step of Adam is the rate itself; the gradient that A sees is the same."""
    start, first = steps(vj.LoRA(rank=2, b_rate=16.0), *linear, count=1)
    close(np.abs(first["a"] - start["a"]), np.full((4, 2), 0.01), 1e-5)
    close(np.abs(first["b"] - start["b"]), np.full((2, 6), 0.16), 1e-5)


@pytest.mark.parametrize(
    ("method", "fast"),
    [(vj.LoRA(rank=2, b_rate=4.0, bias=True), {"b", "bias"}), (vj.DoRA(rank=2, b_rate=4.0), {"b", "m"})],
)
def test_what_trains_beside_b_is_as_fast_and_other_parameters_are_not(linear, method, fast):
    """As PEFT groups them: B and all vectors of the adapter are fast."""
    base = linear[1]
    adapter = random_adapter(dataclasses.replace(method, full="bias"), base)
    relative = rates(CONFIG, adapter.trainable, adapter)
    assert set(relative) == set(flatten(adapter.trainable))
    assert {path.rpartition("/")[2] for path, rate in relative.items() if rate == 4.0 and "sites" in path} == fast
    assert relative["full/bias"] == 1.0


def test_the_run_s_groups_multiply_with_it(linear):
    adapter = random_adapter(vj.LoRA(rank=2, b_rate=4.0), linear[1])
    relative = rates(CONFIG.model_copy(update={"groups": {"b": 0.5}}), adapter.trainable, adapter)
    assert {path.rpartition("/")[2]: rate for path, rate in relative.items()} == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("ratio", [0.0, -1.0])
def test_a_ratio_must_be_positive(ratio):
    with pytest.raises(ConfigError, match=f"lora: b_rate is {ratio}; it must be positive"):
        vj.LoRA(b_rate=ratio)


def test_where_no_rate_is_given_the_product_of_both_is_lora_s():
    """All of SST-2, draw 0: 50.9 % with LoRA's own rate for A, 80.6 % with a quarter of it."""
    config = OptimizerConfig()
    assert config.resolved(vj.LoRA(rank=2, b_rate=16.0)).rate == config.resolved(vj.LoRA(rank=2)).rate / 4
    assert OptimizerConfig(rate=0.5).resolved(vj.LoRA(rank=2, b_rate=16.0)).rate == 0.5
