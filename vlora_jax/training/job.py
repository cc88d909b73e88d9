"""From a config to something that can be trained: first as shapes that take no memory, then as arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PRNGKeyArray

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import count
from vlora_jax.adapters.init import init
from vlora_jax.adapters.sites import split
from vlora_jax.adapters.trees import Tree
from vlora_jax.data import digits, pystdlib
from vlora_jax.data.dataset import DataSet, Example
from vlora_jax.data.pipeline import TrainBatches
from vlora_jax.distributed.mesh import check_batch, make_mesh
from vlora_jax.distributed.specs import (
    adapter_specs,
    base_specs,
    batch_sharding,
    bytes_per_device,
    like_parameters,
    shardings,
)
from vlora_jax.errors import CheckpointError, ConfigError, ResumeError
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.models.stack import Stack
from vlora_jax.models.vit import ViT, ViTConfig
from vlora_jax.training.config import ModelConfig, RunConfig
from vlora_jax.training.loss import LOSSES
from vlora_jax.training.optimizers import optimizer
from vlora_jax.training.runs import CHECKPOINTS, best_step, read_config
from vlora_jax.training.step import Batch, Subject, TrainState, train_step
from vlora_jax.vertical.plan import Choice

MODELS: dict[type, Callable[..., nnx.Module]] = {ViTConfig: ViT, DecoderConfig: Decoder}
TRAINABLE, FROZEN, OPTIMIZER, RNG = "trainable", "frozen", "optimizer", "rng"  # trees of a checkpoint


def model_config_of(config: RunConfig) -> ModelConfig:
    """The model of a run: its own, or that of the run it starts from.

    Raises:
      ConfigError: that run trained an adapter, not a model, or its model is another one than `model` asks for.
    """
    if config.init_from is None:
        assert config.model is not None  # RunConfig makes sure
        return config.model
    source = read_config(Path(config.init_from))
    if source.adapter is not None:
        raise ConfigError(
            f"init_from {config.init_from} holds an adapter, not a model; merge it first: "
            f"vlora-jax merge {config.init_from} --out DIRECTORY"
        )
    found = model_config_of(source)
    if config.model is not None and config.model != found:
        differing = [k for k, v in config.model.model_dump().items() if found.model_dump().get(k, v) != v]
        raise ConfigError(f"model differs from that of init_from {config.init_from} in {differing}; set model=null")
    return found


def build(config: ModelConfig, key: PRNGKeyArray) -> nnx.Module:
    """A model with parameters drawn from `key`."""
    return MODELS[type(config)](config, nnx.Rngs(key))


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's graph, and its parameters as shapes."""
    return split(nnx.eval_shape(lambda: build(config, jax.random.key(0))))


def dense_twin(config: ModelConfig) -> int:
    """Parameters of the model without depth sharing."""
    return count(abstract_model(config.model_copy(update={"vertical": None}))[1])


def load_data(config: RunConfig) -> DataSet:
    """The run's data set."""
    if config.data.name == "digits":
        return digits.load(augment=config.data.augment)
    return pystdlib.load(config.data.part, config.data.length)


def check_fit(model: ModelConfig, data: DataSet, length: int | None) -> None:
    """Raises ConfigError if the model cannot read the data or cannot answer it."""
    facts = data.facts
    if isinstance(model, ViTConfig) != (data.task == "classification"):
        raise ConfigError(f"data {data.name} is for {data.task}, which model.family {model.family} cannot learn")
    wrong = [
        f"model.{key} {getattr(model, key)}, but the data has {value}"
        for key, value in facts.items()
        if getattr(model, key) != value and not (key in ("vocabulary", "classes") and getattr(model, key) > value)
    ]
    if isinstance(model, DecoderConfig) and model.max_positions and length and length > model.max_positions:
        wrong.append(f"model.max_positions {model.max_positions}, but windows have {length} tokens")
    if wrong:
        raise ConfigError(f"the model does not fit {data.name}: {'; '.join(wrong)}")


@dataclass(frozen=True)
class Job:
    """A run, ready to start. Trees hold shapes with their place on the mesh, no numbers.

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
    data: DataSet
    model: ModelConfig
    subject: Subject
    tx: optax.GradientTransformation
    base: Tree
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]

    @classmethod
    def of(cls, config: RunConfig, devices: Sequence[Any] | None = None) -> "Job":
        """Resolve everything that can be without a computation.

        Args:
          config: of the run.
          devices: to run on; all there are if not given.

        Raises:
          VloraError: of some kind: what the config asks for is impossible.
        """
        mesh = make_mesh(**config.mesh.model_dump(), devices=devices)
        check_batch(config.data.batch, mesh)
        model = model_config_of(config)
        data = load_data(config)
        check_fit(model, data, getattr(config.data, "length", None))
        graphdef, params = abstract_model(model)
        specs = base_specs(params, mesh)
        params = placed(params, specs, mesh)
        key = jax.eval_shape(lambda: jax.random.key(0))
        adapter, method = None, config.adapter
        if method is not None:
            adapter = jax.eval_shape(lambda key, base: init(method, key, base), key, params)
            base = params
            trainable, trainable_specs = adapter.trainable, (sharded := adapter_specs(adapter, mesh)).trainable
            frozen, frozen_specs = adapter.frozen, sharded.frozen
        else:
            (trainable, base), (trainable_specs, _) = (
                nnx.split_state(tree, nnx.Param, ...) for tree in (params, specs)
            )
            frozen, frozen_specs = {}, {}
        subject = Subject(graphdef, adapter, LOSSES[data.task])
        tx = optimizer(config.optimizer, config.steps, trainable, adapter)
        opt_state = jax.eval_shape(tx.init, trainable)
        state = TrainState(jax.ShapeDtypeStruct((), "int32"), trainable, frozen, opt_state, key)
        opt_specs = like_parameters(tx, opt_state, trainable_specs)
        state = placed(state, TrainState(P(), trainable_specs, frozen_specs, opt_specs, P()), mesh)
        example = next(TrainBatches(data, config.data.batch, config.accumulate, config.seed))
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=batch_sharding(mesh))
            for name, array in example.items()
        }
        return cls(config, mesh, data, model, subject, tx, base, state, batch)

    @property
    def source_step(self) -> int | None:
        """The step of `init_from` whose parameters this run starts with: its best; None without `init_from`."""
        return None if self.config.init_from is None else best_step(Path(self.config.init_from))

    def parameters(self, source_step: int | None = None) -> Tree:
        """The model's parameters before this run trains: drawn, or read from `init_from`.

        Args:
          source_step: the step of `init_from` to read, as a checkpoint of this run recorded it; its best if not given.

        Raises:
          CheckpointError: that run's checkpoint is torn or does not fit.
        """
        return parameters(self.config, self.model, self.mesh, source_step)

    def start(self) -> tuple[Tree, TrainState]:
        """The frozen base and the state before the first step."""
        _, adapter_key, run_key = keys(self.config.seed)
        params = self.parameters()
        if self.config.adapter is not None:
            method = self.config.adapter
            begin = lambda base, key, run_key: self.subject.start(init(method, key, base), self.tx, run_key)
            return params, self._jit(begin)(params, adapter_key, run_key)
        trainable, rest = nnx.split_state(params, nnx.Param, ...)
        begin = lambda params, run_key: self.subject.start(params, self.tx, run_key)
        return rest, self._jit(begin)(trainable, run_key)

    def _jit(self, function: Callable) -> Callable:
        return jax.jit(function, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state))

    def step(self) -> Callable:
        """The compiled train step's jitted function; the state comes out where it went in."""
        where = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        return train_step(self.subject, self.tx, (where, NamedSharding(self.mesh, P())))

    def place(self, batch: Example) -> Batch:
        """A batch on the devices."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def trees(self, state: TrainState) -> dict[str, Tree]:
        """What a checkpoint keeps of a state. Never the frozen base."""
        rng = {"key": jax.random.key_data(state.key)}
        return {TRAINABLE: state.trainable, FROZEN: state.frozen, OPTIMIZER: state.opt_state, RNG: rng}

    def restored(self, saved: checkpoint.Saved) -> TrainState:
        """The state of a checkpoint.

        Raises:
          CheckpointError: names, shapes or dtypes differ, or a value is not finite.
        """
        if OPTIMIZER not in saved.trees:
            raise CheckpointError(
                f"{self.config.run_dir} holds parameters only: nothing to continue. Start from it with init_from"
            )
        read = lambda name, like: checkpoint.restore(like, saved.trees[name], f"checkpoint {saved.step}, {name}")
        key = jax.random.wrap_key_data(saved.trees[RNG]["key"])
        step = jax.numpy.int32(saved.step)
        return TrainState(
            jax.device_put(step, self.state.step.sharding),
            read(TRAINABLE, self.state.trainable),
            read(FROZEN, self.state.frozen),
            read(OPTIMIZER, self.state.opt_state),
            jax.device_put(key, self.state.key.sharding),
        )

    def check_data(self, saved: checkpoint.Saved) -> None:
        """Raises ResumeError if the data is not what the run was started on."""
        if saved.metadata["data_fingerprint"] != self.data.fingerprint:
            raise ResumeError(
                f"{self.data.name} is not the data that this run was started on (its fingerprint was "
                f"{saved.metadata['data_fingerprint']}, is {self.data.fingerprint}); start in another run_dir"
            )

    @cached_property
    def choices(self) -> list[Choice]:
        """How each shared kernel of a vertical model is applied in training, and what decided it."""
        model = nnx.merge(self.subject.graphdef, self._whole())
        tokens = (
            self.batch["tokens"].shape[1:] if "tokens" in self.batch else (self.batch["image"].shape[1], patches(model))
        )
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
        return [choice for stack in stacks for choice in stack.choices(tokens[0] * tokens[1] // ways, True)]

    def _whole(self) -> Tree:
        if self.config.adapter is not None:
            return self.base
        return nnx.merge_state(self.state.trainable, self.base)

    @property
    def model_parameters(self) -> int:
        """Parameters of the model, whether they train or not."""
        return count(self._whole())

    def bytes(self) -> dict[str, int]:
        """Bytes on one device: of the base, of what trains, and of the optimiser."""
        parts = {"base": self.base, "trained": self.state.trainable, "optimizer": self.state.opt_state}
        if self.config.adapter is None:
            parts.pop("base")
        where = lambda tree: jax.tree.map(lambda leaf: leaf.sharding.spec, tree)
        return {name: bytes_per_device(tree, where(tree), self.mesh) for name, tree in parts.items()}


def keys(seed: int) -> tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray]:
    """Of the model's start, the adapter's start, and the training."""
    return tuple(jax.random.split(jax.random.key(seed), 3))


def patches(model: Any) -> int:
    """Positions that a Vision Transformer's layers see."""
    return model.positions.shape[0]


def placed(shapes: Tree, specs: Tree, mesh: Mesh) -> Tree:
    """Shapes with their place on the mesh."""
    place = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return jax.tree.map(place, shapes, shardings(specs, mesh))


def parameters(config: RunConfig, model: ModelConfig, mesh: Mesh, source_step: int | None = None) -> Tree:
    """A run's parameters before it trains; see `Job.parameters`."""
    shapes = abstract_model(model)[1]
    shapes = placed(shapes, base_specs(shapes, mesh), mesh)
    if config.init_from is not None:
        source = Path(config.init_from)
        step = best_step(source) if source_step is None else source_step
        saved = checkpoint.read(source / CHECKPOINTS, step, (TRAINABLE,))
        return checkpoint.restore(shapes, saved.trees[TRAINABLE], f"{source}, checkpoint {step}")
    draw = jax.jit(
        lambda key: split(build(model, key))[1], out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes)
    )
    return draw(keys(config.seed)[0])
