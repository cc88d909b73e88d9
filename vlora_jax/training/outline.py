"""A run's train step as shapes with their place on a mesh: all that compiling and planning need."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlora_jax.adapters.adapter import Adapter, count
from vlora_jax.adapters.init import adapter_shapes
from vlora_jax.adapters.quantize import quantized_shapes
from vlora_jax.adapters.trees import Tree
from vlora_jax.distributed.activations import lengths_split
from vlora_jax.distributed.mesh import check_sequence
from vlora_jax.distributed.specs import adapter_specs, base_specs, bytes_per_device, like_parameters, shardings
from vlora_jax.errors import ConfigError
from vlora_jax.models.build import ModelConfig, abstract_model
from vlora_jax.training.config import RunConfig
from vlora_jax.training.loss import LOSSES, Loss, Sums
from vlora_jax.training.optimizers import optimizer
from vlora_jax.training.step import Batch, Subject, TrainState, train_step


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
      ConfigError: lengths are to be split, and this model or mesh does not allow it.
    """
    tensors, loss = placed_tensors(config, mesh, model), LOSSES[task]
    if config.mesh.sequence:
        check_sequence(batch["tokens"].shape[2] if model.family == "decoder" else None, mesh)
        loss = with_lengths_split(loss)
    subject = Subject(tensors.graphdef, tensors.adapter, loss)
    return Outline(config, mesh, model, subject, tensors.tx, tensors.base, tensors.state, batch)


def with_lengths_split(loss: Loss) -> Loss:
    """`loss` of a model whose activations lie along their length over `tensor` between the branches of blocks."""

    def split(model: Any, batch: Batch, train: bool) -> Sums:
        with lengths_split():
            return loss(model, batch, train)

    return split


class Tensors(NamedTuple):
    """What a run holds before a step, as shapes with their place on a mesh; see `Outline`."""

    graphdef: nnx.GraphDef
    adapter: Adapter | None
    tx: optax.GradientTransformation
    base: Tree
    state: TrainState


def placed_tensors(config: RunConfig, mesh: Mesh | AbstractMesh, model: ModelConfig) -> Tensors:
    """A run's tensors on a mesh, which need not be here.

    Raises:
      TargetError: the adapter finds nothing to change.
      ConfigError: the base shall be quantised, and it trains or has nothing that can be.
    """
    if config.quantize is not None and config.adapter is None:
        raise ConfigError(f"quantize {config.quantize} is for a frozen base; without an adapter the model trains")
    graphdef, shapes = abstract_model(model)
    params = quantized_shapes(shapes, config.quantize)
    specs = base_specs(params, mesh)
    params = placed(params, specs, mesh)
    adapter, method = None, config.adapter and config.adapter.for_run(config.steps)
    if method is not None:
        adapter = adapter_shapes(method, params)
        base = params
        trainable, trainable_specs = adapter.trainable, (sharded := adapter_specs(adapter, mesh)).trainable
        frozen, frozen_specs = adapter.frozen, sharded.frozen
    else:
        (trainable, base), (trainable_specs, _) = (nnx.split_state(tree, nnx.Param, ...) for tree in (params, specs))
        frozen, frozen_specs = {}, {}
    tx = optimizer(config.optimizer, config.steps, trainable, adapter)
    state = placed(*state_of(tx, (trainable, frozen), (trainable_specs, frozen_specs)), mesh)
    return Tensors(graphdef, adapter, tx, base, state)


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
    return bytes_per_device(tree, specs_of(tree), mesh)


def specs_of(tree: Tree) -> Tree:
    """Specs of placed shapes."""
    return jax.tree.map(lambda leaf: leaf.sharding.spec, tree)


def placed(shapes: Tree, specs: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Shapes with their place on the mesh."""
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, shapes, shardings(specs, mesh))
