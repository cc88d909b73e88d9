"""The train step: the loss is differentiated with respect to what trains, and nothing else.

The base goes in, is never returned and never differentiated. A step is one compiled program with donated state.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.bind import bind
from vlora_jax.adapters.method import Method, Slope
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.training.loss import Loss, Sums

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step.

    Attributes:
      step: updates done.
      trainable: what the loss is differentiated by: `adapter.trainable`, or all parameters of the model.
      frozen: `adapter.frozen`, which a method's own rule may change; empty without an adapter.
      opt_state: of optax.
      key: of dropout.

    In place of arrays, leaves may also be their shapes or specs.
    """

    step: Any
    trainable: Tree
    frozen: Tree
    opt_state: Tree
    key: Any


@dataclass(frozen=True)
class Subject:
    """What is trained: a model as a whole, or an adapter on a frozen one.

    Attributes:
      graphdef: the model's graph.
      adapter: a template for its method and sites; None to train all parameters.
      loss: sums of a model's loss over a batch.
    """

    graphdef: nnx.GraphDef
    adapter: Adapter | None
    loss: Loss

    def adapter_of(self, trainable: Tree, frozen: Tree) -> Adapter:
        """The adapter with these tensors."""
        return dataclasses.replace(self.adapter, trainable=trainable, frozen=frozen)  # type: ignore[type-var]

    def model(self, trainable: Tree, frozen: Tree, base: Tree, key: PRNGKeyArray | None = None) -> nnx.Module:
        """The model, ready to call.

        Args:
          base: frozen parameters; without an adapter, the variables that are no parameters.
          key: switches dropout on.
        """
        if self.adapter is None:
            return nnx.merge(self.graphdef, trainable, base)
        return bind(self.graphdef, base, self.adapter_of(trainable, frozen), key=key)

    def start(self, params: Tree, tx: optax.GradientTransformation, key: PRNGKeyArray) -> TrainState:
        """The state before the first step, `params` being an `Adapter` or all parameters."""
        trainable, frozen = (params.trainable, params.frozen) if isinstance(params, Adapter) else (params, {})
        return TrainState(jnp.int32(0), trainable, frozen, tx.init(trainable), key)


def gradient_of(subject: Subject, trainable: Tree, frozen: Tree, base: Tree, batch: Batch) -> Tree:
    """The gradient of the summed loss over all micro-batches by what trains, without dropout."""

    def loss(trainable: Tree, micro: Batch) -> Array:
        return subject.loss(subject.model(trainable, frozen, base), micro, True)["loss"]

    def accumulate(total: Tree, micro: Batch) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, jax.grad(loss)(trainable, micro)), None

    return jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, trainable), batch)[0]


def train_step(
    subject: Subject, tx: optax.GradientTransformation, out_shardings: Any = None
) -> Callable[[TrainState, Tree, Batch], tuple]:
    """`updated`, compiled, the state donated.

    Args:
      out_shardings: of state and metrics, so that a state stays where it was put on a mesh.
    """
    return jax.jit(updated(subject, tx), donate_argnums=0, out_shardings=out_shardings)


def updated(subject: Subject, tx: optax.GradientTransformation) -> Callable[[TrainState, Tree, Batch], tuple]:
    """`(state, base, batch) → (state, metrics)`, a pure function: one step.

    Arrays of the batch are `(micro-batches, examples, …)`. Losses are summed over all micro-batches and divided by
    the sum of their weights, so that K micro-batches equal one batch, whatever their weights. A step whose loss or
    gradient is not finite changes nothing; `metrics["finite"]` says which: the loss first, then the trained
    leaves in the order of `leaf_names`.
    """

    def step(state: TrainState, base: Tree, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), batch["id"].shape[0])
        adapter = None if subject.adapter is None else subject.adapter_of(state.trainable, state.frozen)
        probe = {} if adapter is None else adapter.method.probe(state.step, adapter)
        silent = jax.tree.map(jnp.zeros_like, probe)

        def sums_of(trainable: Tree, probe: Tree, micro: Batch, key: PRNGKeyArray) -> tuple[Array, Sums]:
            model = subject.model(trainable, _with_probe(state.frozen, probe), base, key)
            sums = subject.loss(model, micro, True)
            return sums["loss"], sums

        slope_of = jax.grad(sums_of, argnums=(0, 1), has_aux=True)

        def gradient(trainable: Tree, chosen: Array | None = None) -> Slope:
            examples = batch if chosen is None else batch | {"weight": chosen * batch.get("weight", 1.0)}

            def accumulate(total: tuple, inputs: tuple) -> tuple[tuple, None]:
                return jax.tree.map(jnp.add, total, slope_of(trainable, silent, *inputs)), None

            first = slope_of(trainable, probe, jax.tree.map(lambda leaf: leaf[0], examples), keys[0])
            rest = jax.tree.map(lambda leaf: leaf[1:], (examples, keys))
            ((grads, measured), sums), _ = jax.lax.scan(accumulate, first, rest) if len(keys) > 1 else (first, None)
            weight = _divisor(sums)
            return Slope(jax.tree.map(lambda g: g / weight.astype(g.dtype), grads), sums, measured)

        slope = (
            gradient(state.trainable) if adapter is None else adapter.method.gradients(gradient, adapter, batch["id"])
        )
        grads, sums, weight = slope.grads, slope.sums, _divisor(slope.sums)
        loss = sums["loss"] / weight
        if adapter is not None and type(adapter.method).penalty is not Method.penalty:
            penalty, pull = jax.value_and_grad(_penalty)(state.trainable, adapter)
            loss, grads = loss + penalty, jax.tree.map(jnp.add, grads, pull)
        flags = [jnp.isfinite(loss)] + [jnp.isfinite(leaf).all() for leaf in flatten(grads).values()]
        finite = jnp.stack(flags)
        measured = {"probe": {"sites": slope.probe, "weight": weight}} if probe else {}
        new = _update(subject, tx, state, grads, measured)
        state = jax.tree.map(lambda new, old: jnp.where(finite.all(), new, old), new, state)
        metrics = {"loss": loss, "accuracy": sums["correct"] / weight, "weight": sums["weight"]}
        return state, metrics | {"gradient_norm": optax.tree.norm(grads), "finite": finite}

    return step


def _divisor(sums: Sums) -> Array:
    """The weight by which sums become means."""
    return jnp.maximum(sums["weight"], 1e-8)


def _with_probe(frozen: Tree, probe: Tree) -> Tree:
    """An adapter's frozen tensors with a method's probe among those of its sites."""
    if not probe:
        return frozen
    sites = {path: frozen["sites"].get(path, {}) | leaves for path, leaves in probe.items()}
    return frozen | {"sites": frozen["sites"] | sites}


def _penalty(trainable: Tree, adapter: Adapter) -> Array:
    return jnp.asarray(adapter.method.penalty(adapter.with_trainable(trainable)), jnp.float32)


def _update(
    subject: Subject, tx: optax.GradientTransformation, state: TrainState, grads: Tree, measured: Tree
) -> TrainState:
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    if subject.adapter is None:
        trainable = optax.apply_updates(state.trainable, updates)
        return TrainState(state.step + 1, trainable, state.frozen, opt_state, state.key)
    adapter = subject.adapter_of(state.trainable, state.frozen)
    updates = adapter.method.allow(adapter, updates)
    trainable: Any = optax.apply_updates(state.trainable, updates)
    adapter, opt_state = adapter.method.advance(
        state.step, adapter.with_trainable(trainable), grads | measured, opt_state
    )
    return TrainState(state.step + 1, adapter.trainable, adapter.frozen, opt_state, state.key)


def leaf_names(trainable: Tree) -> list[str]:
    """What each entry of `metrics["finite"]` is about."""
    return ["the loss", *(f"the gradient of {path}" for path in flatten(trainable))]


def evaluate_step(subject: Subject) -> Callable[[TrainState, Tree, Batch], Sums]:
    """`evaluated`, compiled."""
    return jax.jit(evaluated(subject))


def evaluated(subject: Subject) -> Callable[[TrainState, Tree, Batch], Sums]:
    """`(state, base, batch) → sums`, a pure function; arrays of the batch are `(1, examples, …)`."""

    def step(state: TrainState, base: Tree, batch: Batch) -> Sums:
        model = subject.model(state.trainable, state.frozen, base)
        return subject.loss(model, jax.tree.map(lambda leaf: leaf[0], batch), False)

    return step
