"""The train step: what it differentiates, adds up, refuses, draws and keeps."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from programs import equations, filled, parameters

import vlora_jax as vj
from vlora_jax.adapters.trees import flatten
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.models.vit import ViT, ViTConfig
from vlora_jax.training.loss import classification, next_token
from vlora_jax.training.optimizers import OptimizerConfig, optimizer
from vlora_jax.training.step import Subject, evaluate_step, leaf_names, train_step
from vlora_jax.vertical.config import Vertical

ADAM = OptimizerConfig(rate=0.01, schedule="constant", warmup=0, decay=0.0, clip=None)
DESCENT = ADAM.model_copy(update={"name": "sgd", "rate": 1.0, "b1": 0.0})  # a step is minus the gradient
TINY = {"width": 16, "heads": 2, "mlp_width": 20, "layers": 2}
KERNELS = {(16, 16), (16, 20), (20, 16), (23, 16)}  # of the decoder, the embedding among them
KERNELS |= {shape[::-1] for shape in KERNELS}
X = np.random.default_rng(0).normal(size=(2, 3, 6)).astype(np.float32)


def start(subject, tx, params, seed=0):
    """A new state, on arrays of its own: a step takes them away."""
    return jax.tree.map(jnp.array, subject.start(params, tx, jax.random.key(seed)))


def random_adapter(method, base):
    return filled(jax.eval_shape(lambda base: vj.init(method, jax.random.key(0), base), base), seed=1)


def moves(before, after):
    """By how much each trained leaf has gone down."""
    after = flatten(after.trainable)
    return {path: leaf - np.asarray(after[path]) for path, leaf in flatten(before).items()}


def product_shapes(step, *arguments):
    """Shapes of all matrix products of a step."""
    program = jax.make_jaxpr(step)(*arguments)
    return {e.outvars[0].aval.shape for e in equations(program) if e.primitive.name == "dot_general"}


@dataclass(frozen=True)
class Case:
    """A decoder with LoRA and a norm trained whole, and a batch whose rows have 7, 1, 3 and 0 tokens to learn from."""

    subject: Subject
    tx: object
    step: object
    base: object
    adapter: object
    batch: dict

    def state(self):
        return start(self.subject, self.tx, self.adapter)


@pytest.fixture(scope="module")
def lora():
    config = DecoderConfig(**TINY, vocabulary=23, gated=False, rotary_theta=None)
    graphdef, base = parameters(lambda rngs: Decoder(config, rngs))
    base = jax.tree.map(jnp.asarray, base)
    adapter = random_adapter(vj.LoRA(rank=3, targets="q|down", full="norm"), base)
    tokens = np.random.default_rng(1).integers(0, 23, (1, 4, 8)).astype(np.int32)
    mask = np.arange(7) < np.array([7, 1, 3, 0])[:, None]
    batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "mask": mask[None], "id": np.arange(4)[None]}
    subject = Subject(graphdef, adapter, next_token)
    tx = optimizer(DESCENT, 10, adapter.trainable, adapter)
    return Case(subject, tx, train_step(subject, tx), base, adapter, batch)


def test_micro_batches_equal_one_batch_whatever_their_weights(lora):
    """Eight tokens in the first, three in the second: a mean of means would weigh the second too much."""
    halves = jax.tree.map(lambda array: array.reshape(2, 2, *array.shape[2:]), lora.batch)
    assert [int(half.sum()) for half in halves["mask"]] == [8, 3]
    (one, metrics), (two, split_metrics) = (lora.step(lora.state(), lora.base, batch) for batch in (lora.batch, halves))
    whole, added = (moves(lora.adapter.trainable, state) for state in (one, two))
    for path, gradient in whole.items():
        assert np.abs(gradient).max() > 1e-4, path
        np.testing.assert_allclose(added[path], gradient, atol=2e-6, err_msg=path)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], split_metrics[name], rtol=1e-5, err_msg=name)
    assert metrics["weight"] == 11


def test_the_base_stays_and_no_gradient_is_computed_for_it(lora):
    before = jax.tree.map(np.array, lora.base)
    state, metrics = lora.step(lora.state(), lora.base, lora.batch)
    jax.tree.map(np.testing.assert_array_equal, lora.base, before)
    returned = {leaf.shape for leaf in jax.tree.leaves((state, metrics))}
    assert not {leaf.shape for path, leaf in flatten(lora.base).items() if "norm" not in path} & returned
    assert not KERNELS & product_shapes(lora.step, lora.state(), lora.base, lora.batch)
    whole, tx = Subject(lora.subject.graphdef, None, next_token), optimizer(DESCENT, 10, lora.base, None)
    trained = product_shapes(train_step(whole, tx), start(whole, tx, lora.base), {}, lora.batch)
    assert len(KERNELS & trained) >= 4, "trained as a whole, the model has a gradient of each kernel"


def test_the_optimiser_keeps_moments_of_what_trains_and_of_nothing_else(lora):
    tx = optimizer(ADAM, 10, lora.adapter.trainable, lora.adapter)
    state = jax.eval_shape(lambda: lora.subject.start(lora.adapter, tx, jax.random.key(0)))
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.dtype == jnp.float32]
    assert sum(leaf.size for leaf in moments) == 2 * vj.count(lora.adapter)


def test_metrics_are_of_the_whole_step(lora):
    """Loss and accuracy against the evaluation of the same batch, the norm against the step that was taken."""
    sums = evaluate_step(lora.subject)(lora.state(), lora.base, lora.batch)
    state, metrics = lora.step(lora.state(), lora.base, lora.batch)
    np.testing.assert_allclose(metrics["loss"], sums["loss"] / 11, rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], sums["correct"] / 11, rtol=1e-6)
    norm = np.sqrt(sum((leaf**2).sum() for leaf in moves(lora.adapter.trainable, state).values()))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    assert metrics["finite"].all()
    assert state.step == 1


class Fragile(nnx.Module):
    """`a · x + √b`, whose gradient by b is infinite at 0."""

    def __init__(self):
        self.a, self.b = nnx.Param(jnp.zeros(3)), nnx.Param(jnp.zeros(2))


def fragile_loss(model, batch, train):
    losses = batch["x"] @ model.a.get_value() + jnp.sqrt(model.b.get_value()).sum()
    return {"loss": losses.sum(), "correct": jnp.float32(0), "weight": jnp.float32(len(losses))}


def test_a_step_that_is_not_finite_changes_nothing_and_names_what_it_was():
    """Good, a loss that overflows in the second micro-batch, a gradient alone; then good again, as if nothing was."""
    graphdef, shapes = vj.split(nnx.eval_shape(Fragile))
    subject = Subject(graphdef, None, fragile_loss)
    tx = optimizer(ADAM, 10, shapes, None)
    step = train_step(subject, tx)
    params = filled(shapes)
    params["b"] = params["b"].replace(np.float32([1, 2]))
    good = {"x": X[..., :3], "id": np.zeros((2, 3), np.int32)}
    bad = good | {"x": good["x"].copy()}
    bad["x"][1, 2, 0] = np.inf
    names = leaf_names(params)
    wrong = lambda metrics: [name for name, fine in zip(names, metrics["finite"], strict=True) if not fine]
    host = lambda state: jax.tree.map(np.array, dataclasses.replace(state, key=jax.random.key_data(state.key)))

    state, metrics = step(start(subject, tx, params), {}, good)
    assert wrong(metrics) == []
    before = host(state)
    assert before.step == 1
    state, metrics = step(state, {}, bad)
    assert wrong(metrics) == ["the loss", "the gradient of a"]
    jax.tree.map(np.testing.assert_array_equal, host(state), before)

    params["b"] = params["b"].replace(np.float32([1, 0]))
    broken = start(subject, tx, params)
    before = host(broken)
    broken, metrics = step(broken, {}, good)
    assert wrong(metrics) == ["the gradient of b"]
    jax.tree.map(np.testing.assert_array_equal, host(broken), before)

    state, metrics = step(state, {}, good)
    assert wrong(metrics) == []
    assert state.step == 2


@dataclass(frozen=True, kw_only=True)
class Ruled(vj.LoRA):
    """LoRA with a penalty ½‖B‖², and a rule of its own that halves A after every step and counts in frozen tensors."""

    def init(self, key, sites, base):
        adapter = super().init(key, sites, base)
        return dataclasses.replace(adapter, frozen=adapter.frozen | {"shared": {"steps": jnp.zeros(())}})

    def penalty(self, adapter):
        return sum((site["b"] ** 2).sum() / 2 for site in adapter.trainable["sites"].values())

    def advance(self, step, adapter, grads, opt_state):
        ((path, site),) = adapter.trainable["sites"].items()
        halved = adapter.trainable | {"sites": {path: site | {"a": site["a"] / 2}}}
        frozen = adapter.frozen | {"shared": {"steps": adapter.frozen["shared"]["steps"] + step + 10}}
        return dataclasses.replace(adapter, trainable=halved, frozen=frozen), opt_state


def output_loss(model, batch, train):
    """The weighted sum of outputs, linear in the model."""
    out, weight = model(batch["x"]), batch["weight"]
    return {"loss": (weight[:, None] * out).sum(), "correct": weight.sum(), "weight": weight.sum()}


def linear_subject(method):
    graphdef, base = parameters(lambda rngs: nnx.Linear(6, 5, rngs=rngs))
    adapter = random_adapter(method, base)
    return Subject(graphdef, adapter, output_loss), base, adapter


WEIGHT = np.float32([[1, 2, 0], [0.5, 0, 3]])


def test_a_method_s_penalty_and_rule_act_once_a_step():
    subject, base, adapter = linear_subject(Ruled(rank=2, alpha=3.0))
    step = train_step(subject, optimizer(DESCENT, 10, adapter.trainable, adapter))
    state = start(subject, optimizer(DESCENT, 10, adapter.trainable, adapter), adapter)
    a, b = (np.float64(adapter.trainable["sites"][""][name]) for name in "ab")
    frozen = adapter.frozen["shared"]["steps"]
    state, metrics = step(state, base, {"x": X, "weight": WEIGHT, "id": np.zeros((2, 3), np.int32)})

    kernel, bias = (np.float64(base[name].get_value()) for name in ("kernel", "bias"))
    mean = np.einsum("kb,kbi->i", WEIGHT, X) / 6.5
    loss = (mean @ (kernel + 1.5 * a @ b) + bias).sum()
    np.testing.assert_allclose(metrics["loss"], loss + (b**2).sum() / 2, rtol=1e-5)
    after = state.trainable["sites"][""]
    np.testing.assert_allclose(after["a"], (a - 1.5 * np.outer(mean, b.sum(1))) / 2, atol=1e-6)
    np.testing.assert_allclose(after["b"], -1.5 * np.outer(mean @ a, np.ones(5)), atol=1e-6)  # less the penalty's b
    np.testing.assert_allclose(state.frozen["shared"]["steps"], frozen + 10)


def test_dropout_differs_over_steps_and_micro_batches_and_is_off_in_evaluation():
    subject, base, adapter = linear_subject(vj.LoRA(rank=2, alpha=3.0, dropout=0.5))
    still = OptimizerConfig(name="sgd", rate=1e-30, schedule="constant", warmup=0)
    tx = optimizer(still, 10, adapter.trainable, adapter)
    step = train_step(subject, tx)
    batch = {"x": np.stack([X[0], X[0]]), "id": np.zeros((2, 3), np.int32)}
    first, second = (batch | {"weight": np.float32(np.outer(row, [1, 1, 1]))} for row in ([1, 0], [0, 1]))

    def losses(seed):
        state = start(subject, tx, adapter, seed)
        state, one = step(state, base, first)
        state, two = step(state, base, first)
        return float(one["loss"]), float(two["loss"])

    _, micro = step(start(subject, tx, adapter), base, second)
    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1), float(micro["loss"])}) == 5

    evaluate, state = evaluate_step(subject), start(subject, tx, adapter)
    sums = evaluate(state, base, {name: array[:1] for name, array in first.items()})
    a, b = (adapter.trainable["sites"][""][name] for name in "ab")
    outputs = X[0] @ (base["kernel"].get_value() + 1.5 * a @ b) + base["bias"].get_value()
    np.testing.assert_allclose(sums["loss"], outputs.sum(), rtol=1e-5)


def test_a_vertical_model_trains_as_a_whole_in_one_program():
    """Detached: the base kernels have a gradient from their compound's first layer, and so has every increment."""
    config = ViTConfig(**TINY, image=4, classes=3, vertical=Vertical(size=2))
    graphdef, params = parameters(lambda rngs: ViT(config, rngs))
    traces = []

    def counted(model, batch, train):
        traces.append(train)
        return classification(model, batch, train)

    subject = Subject(graphdef, None, counted)
    tx = optimizer(DESCENT, 10, params, None)
    step, state = train_step(subject, tx), start(subject, tx, params)
    images = np.random.default_rng(1).uniform(-1, 1, (3, 1, 5, 4, 4, 1)).astype(np.float32)
    traced, gradients = [], []
    for image in images:
        batch = {"image": jnp.asarray(image), "label": np.int32([[0, 1, 2, 1, 0]]), "id": np.int32([range(5)])}
        given = state
        state, metrics = step(given, {}, batch)
        assert metrics["finite"].all()
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((given.trainable, given.opt_state)))
        assert not batch["image"].is_deleted()
        traced.append(len(traces))
        gradients.append(moves(params, state))
    assert traced[0] == traced[2], "nothing was traced again"
    assert sum(path.startswith("layers/increments/lora/") for path in gradients[0]) == 2 * 6
    still = {path for path, gradient in gradients[0].items() if np.abs(gradient).max() < 1e-6}
    assert still <= {"layers/block/attn/k/bias"}, "which no softmax sees"
