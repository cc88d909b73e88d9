"""A run's train step as shapes with their place on a mesh: all that compiling and planning need."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlora_jax.adapters.adapter import count
from vlora_jax.adapters.init import init
from vlora_jax.adapters.trees import Tree
from vlora_jax.distributed.specs import adapter_specs, base_specs, bytes_per_device, like_parameters, shardings
from vlora_jax.models.build import ModelConfig, abstract_model
from vlora_jax.training.config import RunConfig
from vlora_jax.training.loss import LOSSES
from vlora_jax.training.optimizers import optimizer
from vlora_jax.training.step import Subject, TrainState, train_step


@dataclass(frozen=True)
class Outline:
    """Shapes with their place on the mesh, no numbers; neither weights nor data are read for them.

    Attributes:
      model: the model's config.
      subject: what is trained.
      tx: how.
      base: what stays as it is: all parameters under an adapter; else the variables that are no parameters.
      state: what changes.
      batch: one training step's input.
    """

    config: RunConfig
    mesh: Mesh
    model: ModelConfig
    subject: Subject
    tx: optax.GradientTransformation
    base: Tree
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]

    def step(self) -> Any:
        """The train step, jitted; the state comes out where it went in."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return train_step(self.subject, self.tx, (where, NamedSharding(self.mesh, P())))

    def whole(self) -> Tree:
        """All of the model's parameters, whether they train or not."""
        if self.config.adapter is not None:
            return self.base
        return nnx.merge_state(self.state.trainable, self.base)

    @property
    def model_parameters(self) -> int:
        """Parameters of the model, whether they train or not."""
        return count(self.whole())

    def bytes(self) -> dict[str, int]:
        """Bytes on one device: of the base, of what trains, and of the optimiser."""
        parts = {"base": self.base, "trained": self.state.trainable, "optimizer": self.state.opt_state}
        if self.config.adapter is None:
            parts.pop("base")
        return {name: bytes_of(tree, self.mesh) for name, tree in parts.items()}


def outline(
    config: RunConfig, mesh: Mesh, model: ModelConfig, task: str, batch: dict[str, jax.ShapeDtypeStruct]
) -> Outline:
    """The step of a run on this model, which learns `task` from batches of these shapes.

    Raises:
      TargetError: the adapter finds nothing to change.
    """
    graphdef, params = abstract_model(model)
    specs = base_specs(params, mesh)
    params = placed(params, specs, mesh)
    key = jax.eval_shape(lambda: jax.random.key(0))
    adapter, method = None, config.adapter and config.adapter.for_run(config.steps)
    if method is not None:
        adapter = jax.eval_shape(lambda key, base: init(method, key, base), key, params)
        base = params
        trainable, trainable_specs = adapter.trainable, (sharded := adapter_specs(adapter, mesh)).trainable
        frozen, frozen_specs = adapter.frozen, sharded.frozen
    else:
        (trainable, base), (trainable_specs, _) = (nnx.split_state(tree, nnx.Param, ...) for tree in (params, specs))
        frozen, frozen_specs = {}, {}
    subject = Subject(graphdef, adapter, LOSSES[task])
    tx = optimizer(config.optimizer, config.steps, trainable, adapter)
    state = placed(*state_of(tx, (trainable, frozen), (trainable_specs, frozen_specs)), mesh)
    return Outline(config, mesh, model, subject, tx, base, state, batch)


def state_of(
    tx: optax.GradientTransformation, tensors: tuple[Tree, Tree], specs: tuple[Tree, Tree]
) -> tuple[TrainState, TrainState]:
    """A state's shapes and specs.

    Args:
      tensors: shapes of what trains, and of what is frozen beside it.
      specs: of the same.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    opt_state = jax.eval_shape(tx.init, tensors[0])
    opt_specs = like_parameters(tx, opt_state, specs[0])
    shapes = TrainState(jax.ShapeDtypeStruct((), "int32"), *tensors, opt_state, key)
    return shapes, TrainState(P(), *specs, opt_specs, P())


def bytes_of(tree: Tree, mesh: Mesh) -> int:
    """Bytes of placed shapes on one device."""
    return bytes_per_device(tree, jax.tree.map(lambda leaf: leaf.sharding.spec, tree), mesh)


def placed(shapes: Tree, specs: Tree, mesh: Mesh) -> Tree:
    """Shapes with their place on the mesh."""
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, shapes, shardings(specs, mesh))
