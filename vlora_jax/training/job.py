"""From a config to something that can be trained: first as shapes that take no memory, then as arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import Adapter, count
from vlora_jax.adapters.init import init
from vlora_jax.adapters.quantize import quantized_shapes, turned_into
from vlora_jax.adapters.quantized import Form, is_quantized
from vlora_jax.adapters.sites import split
from vlora_jax.adapters.trees import Tree, flatten, replace_leaves, unflatten
from vlora_jax.data import digits, low_rank, pystdlib, text
from vlora_jax.data.dataset import DataSet, Example
from vlora_jax.data.pipeline import TrainBatches
from vlora_jax.distributed import processes
from vlora_jax.distributed.mesh import check_batch, make_mesh
from vlora_jax.distributed.rows import global_batch, local_rows
from vlora_jax.distributed.specs import base_specs, batch_sharding, shardings
from vlora_jax.errors import CheckpointError, ConfigError, ResumeError
from vlora_jax.hub.load import Described, describe, load_model
from vlora_jax.models.build import ModelConfig, abstract_model, build
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.stack import Stack
from vlora_jax.training.config import PretrainedConfig, RunConfig
from vlora_jax.training.optimizers import optimizer
from vlora_jax.training.outline import Outline, outline, placed
from vlora_jax.training.runs import CHECKPOINTS, best_step, read_config
from vlora_jax.training.step import Batch, TrainState, gradient_of
from vlora_jax.vertical.plan import Choice

TRAINABLE, FROZEN, OPTIMIZER, RNG = "trainable", "frozen", "optimizer", "rng"  # trees of a checkpoint


def model_config_of(config: RunConfig) -> ModelConfig:
    """The model of a run: its own, or that of the run it starts from.

    Raises:
      ConfigError: that run trained an adapter, not a model, or its model is another one than `model` asks for.
    """
    if isinstance(config.model, PretrainedConfig):
        return described(config.model).config
    if config.init_from is None:
        assert config.model is not None  # RunConfig makes sure
        return config.model
    source = source_config(config, config.init_from)
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


def source_config(config: RunConfig, init_from: str) -> RunConfig:
    """The config of the run that another starts from.

    Raises:
      ConfigError: it is not there.
    """
    try:
        return read_config(Path(init_from))
    except ConfigError as error:
        raise ConfigError(f"init_from of {config.run_dir}: {error}") from None


def described(section: PretrainedConfig) -> Described:
    """A pretrained model as its files say, before its numbers are read."""
    return describe(section.source, section.dtype, section.head, **section.options())


def tokenizer_source(config: RunConfig) -> str | None:
    """Where the tokenizer of a run's model is; None if the model was not pretrained elsewhere."""
    if isinstance(config.model, PretrainedConfig):
        return str(described(config.model).store.directory)
    return None if config.init_from is None else tokenizer_source(source_config(config, config.init_from))


def dense_twin(config: ModelConfig) -> int:
    """Parameters of the model without depth sharing."""
    return count(abstract_model(config.model_copy(update={"vertical": None}))[1])


def load_data(config: RunConfig) -> DataSet:
    """The run's data set."""
    if config.data.name == "digits":
        section = config.data
        return digits.load(section.augment, section.turns, section.shots, section.shots_seed)
    if config.data.name == "low_rank":
        return low_rank.load(**config.data.model_dump(exclude={"name", "batch"}))
    if config.data.name == "pystdlib":
        return pystdlib.load(config.data.part, config.data.length)
    return warned(config, text.load(config.data, tokenizer_source(config), model_config_of(config)))


def warned(config: RunConfig, data: DataSet) -> DataSet:
    """The data, with a warning if its rows are longer than any that a pretrained model has seen."""
    if not isinstance(config.model, PretrainedConfig) or data.summary is None:
        return data
    most, length = described(config.model).given.get("max_position_embeddings"), data.summary.length
    if not isinstance(most, int) or length <= most:
        return data
    warning = (
        f"rows of {length} tokens, but {config.model.source} was trained on at most {most} (max_position_embeddings)"
    )
    summary = dataclasses.replace(data.summary, warnings=(*data.summary.warnings, warning))
    return dataclasses.replace(data, summary=summary)


def tasks_of(model: ModelConfig) -> tuple[str, ...]:
    """What a model can learn, which its family and its head decide."""
    if model.family == "vit":
        return ("classification",)
    if model.family == "matrix":
        return ("matrix_completion",)
    heads = {"sequence": ("text_classification",), "lm": ("seq2seq" if model.family == "seq2seq" else "next_token",)}
    return heads.get(model.head, ())


def check_task(model: ModelConfig, data: str, task: str) -> None:
    """Raises ConfigError if the model cannot learn the task of a data set of this name."""
    if task not in tasks_of(model):
        raise ConfigError(f"data {data} is for {task}, which model.family {model.family} cannot learn")


def check_fit(model: ModelConfig, data: DataSet, length: int | None) -> None:
    """Raises ConfigError if the model cannot read the data or cannot answer it."""
    facts = {key: value for key, value in data.facts.items() if hasattr(model, key)}
    check_task(model, data.name, data.task)
    wrong = [
        f"model.{key} {getattr(model, key)}, but the data has {value}"
        for key, value in facts.items()
        if getattr(model, key) != value and not (key in ("vocabulary", "classes") and getattr(model, key) > value)
    ]
    if isinstance(model, DecoderConfig) and model.max_positions and length and length > model.max_positions:
        wrong.append(f"model.max_positions {model.max_positions}, but windows have {length} tokens")
    if wrong:
        raise ConfigError(f"the model does not fit {data.name}: {'; '.join(wrong)}")


def check_fresh(config: RunConfig, adapter: Adapter) -> None:
    """Raises ConfigError if a new head of a pretrained model would stay at its random start."""
    if isinstance(config.model, PretrainedConfig):
        trained = (*adapter.trainable["full"], *(site.leaf_path for site in adapter.sites))
        frozen = [path for path in described(config.model).plan.fresh if path not in trained]
        if frozen:
            modules = sorted({path.rpartition("/")[0] or path for path in frozen})
            raise ConfigError(
                f"{', '.join(modules)} is new, {config.model.source} has none, and frozen: train it with the adapter, "
                f"adapter.full={modules[0] if len(modules) == 1 else modules}"
            )


@dataclass(frozen=True)
class Job(Outline):
    """A run, ready to start. Trees hold shapes with their place on the mesh, no numbers."""

    data: DataSet

    @classmethod
    def of(cls, config: RunConfig, devices: Sequence[Any] | None = None, data: DataSet | None = None) -> "Job":
        """Resolve everything that can be without a computation.

        Args:
          config: of the run.
          devices: to run on; all there are if not given.
          data: the run's, where it has been read already.

        Raises:
          VloraError: of some kind: what the config asks for is impossible.
        """
        mesh = make_mesh(**config.mesh.sizes, devices=devices)
        check_batch(config.data.batch, mesh)
        model = model_config_of(config)
        data = load_data(config) if data is None else data
        check_fit(model, data, getattr(config.data, "length", None))
        example = next(TrainBatches(data, config.data.batch, config.accumulate, config.seed))
        batch = {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=batch_sharding(mesh))
            for name, array in example.items()
        }
        shapes = outline(config, mesh, model, data.task, batch)
        if shapes.subject.adapter is not None:
            check_fresh(config, shapes.subject.adapter)
        return cls(**vars(shapes), data=data)

    def with_config(self, config: RunConfig) -> "Job":
        """The job of a run that differs in its seed, its length and its optimiser's numbers only."""
        adapter, trainable = self.subject.adapter, self.state.trainable
        tx = optimizer(config.optimizer, config.steps, trainable, adapter)
        opt_state = unflatten(jax.eval_shape(tx.init, trainable), flatten(self.state.opt_state))
        state = dataclasses.replace(self.state, opt_state=opt_state)
        return dataclasses.replace(self, config=config, tx=tx, state=state)

    @property
    def source_step(self) -> int | None:
        """The step of `init_from` whose parameters this run starts with: its best; None without `init_from`."""
        if self.config.init_from is None:
            return None
        return processes.decided("init_from", lambda: best_step(Path(self.config.init_from or "")))

    def parameters(self, source_step: int | None = None) -> Tree:
        """The model's parameters before this run trains: drawn, or read from `init_from`.

        Args:
          source_step: the step of `init_from` to read, as a checkpoint of this run recorded it; its best if not given.

        Raises:
          CheckpointError: that run's checkpoint is torn or does not fit.
        """
        return parameters(self.config, self.model, self.mesh, source_step)

    def start(self, params: Tree = None, begin: Callable | None = None) -> tuple[Tree, TrainState]:
        """The frozen base and the state before the first step.

        Args:
          params: `parameters()`, where they are there already.
          begin: `beginning` of a job that differs in its seed and its optimiser's numbers only: it is compiled once.
        """
        _, adapter_key, run_key = keys(self.config.seed)
        params = self.parameters() if params is None else params
        begin = self.beginning if begin is None else begin
        if self.subject.adapter is not None:
            return params, begin(params, adapter_key, run_key, self.opening_batch())
        trainable, rest = nnx.split_state(params, nnx.Param, ...)
        return rest, begin(trainable, adapter_key, run_key, None)

    def opening_batch(self) -> Batch | None:
        """The first batch, where the adapter's start is made of its gradient."""
        adapter, config = self.subject.adapter, self.config
        if adapter is None or adapter.method.opening == adapter.method:
            return None
        rows = local_rows(config.data.batch, self.mesh)
        return self.place(next(TrainBatches(self.data, config.data.batch, config.accumulate, config.seed, rows)))

    @cached_property
    def beginning(self) -> Callable[[Tree, PRNGKeyArray, PRNGKeyArray, Batch | None], TrainState]:
        """`(parameters that the start reads, key of the adapter, key of the training, batch) → state`, compiled.

        The batch is `opening_batch`'s.
        """
        subject = self.subject

        def begin(params: Tree, adapter_key: PRNGKeyArray, run_key: PRNGKeyArray, batch: Batch | None) -> TrainState:
            if subject.adapter is None:
                return subject.start(params, self.tx, run_key)
            method = subject.adapter.method
            adapter = init(method.opening, adapter_key, params)
            if batch is not None:
                opening = dataclasses.replace(subject, adapter=adapter)
                slopes = gradient_of(opening, adapter.trainable, adapter.frozen, params, batch)
                adapter = method.opened(adapter, slopes)
            return subject.start(adapter, self.tx, run_key)

        return jax.jit(begin, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.state))

    def place(self, batch: Example) -> Batch:
        """A batch on the devices."""
        return global_batch(batch, self.mesh)

    def places(self) -> dict[str, dict[str, Any]]:
        """Where the tensors of a checkpoint belong on this mesh, by tree and path."""
        parts = {TRAINABLE: self.state.trainable, FROZEN: self.state.frozen, OPTIMIZER: self.state.opt_state}
        where = {name: {path: leaf.sharding for path, leaf in flatten(tree).items()} for name, tree in parts.items()}
        return where | {RNG: {"key": self.state.key.sharding}}

    def trees(self, state: TrainState) -> dict[str, Tree]:
        """What a checkpoint keeps of a state. Never the frozen base."""
        rng = {"key": jax.random.key_data(state.key)}
        return {TRAINABLE: state.trainable, FROZEN: state.frozen, OPTIMIZER: state.opt_state, RNG: rng}

    def restored(self, saved: checkpoint.Saved) -> TrainState:
        """The state of a checkpoint.

        Raises:
          CheckpointError: the run was not trained here, names, shapes or dtypes differ, or a value is not finite.
        """
        if OPTIMIZER not in saved.trees:
            model = self.config.adapter is None
            what, way = ("parameters", "Start from it") if model else ("an adapter", "Merge it and start from that")
            raise CheckpointError(f"{self.config.run_dir} holds {what} only: nothing to continue. {way} with init_from")
        read = lambda name, like: checkpoint.restore(like, saved.trees[name], f"checkpoint {saved.step}, {name}")
        key = jax.random.wrap_key_data(saved.trees[RNG]["key"])
        step = np.int32(saved.step)
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
        model = nnx.merge(self.subject.graphdef, self.whole())
        tokens = (
            self.batch["tokens"].shape[1:] if "tokens" in self.batch else (self.batch["image"].shape[1], patches(model))
        )
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
        return [choice for stack in stacks for choice in stack.choices(tokens[0] * tokens[1] // ways, True)]


def keys(seed: int) -> tuple[PRNGKeyArray, PRNGKeyArray, PRNGKeyArray]:
    """Of the model's start, the adapter's start, and the training."""
    return tuple(jax.random.split(jax.random.key(seed), 3))


def patches(model: Any) -> int:
    """Positions that a Vision Transformer's layers see."""
    return model.positions.shape[0]


def parameters(config: RunConfig, model: ModelConfig, mesh: Mesh, source_step: int | None = None) -> Tree:
    """A run's parameters before it trains; see `Job.parameters`."""
    shapes = abstract_model(model)[1]
    shapes = placed(shapes, base_specs(shapes, mesh), mesh)
    if isinstance(config.model, PretrainedConfig):
        return pretrained_parameters(config.model, mesh, keys(config.seed)[0], config.quantize)
    read = whole_parameters(config, model, shapes, source_step)
    if config.quantize is None:
        return read
    held = quantized_shapes(shapes, config.quantize)
    places, leaves = flatten(shardings(base_specs(held, mesh), mesh)), flatten(read)
    packed = {path: turned_into(leaves[path], there) for path, there in places.items() if is_quantized(there)}
    return replace_leaves(read, packed)


def pretrained_parameters(section: PretrainedConfig, mesh: Mesh, key: PRNGKeyArray, form: Form | None) -> Tree:
    """Parameters from the files of transformers; `key` draws a new head."""
    options: dict[str, Any] = section.options() | {"quantize": form, "key": key, "notify": lambda line: None}
    return load_model(section.source, mesh, section.dtype, section.head, **options).base


def whole_parameters(config: RunConfig, model: ModelConfig, shapes: Tree, source_step: int | None) -> Tree:
    """Parameters of `init_from`, or drawn, before they are quantised."""
    if config.init_from is not None:
        source = Path(config.init_from)
        step = processes.decided("init_from", lambda: best_step(source)) if source_step is None else source_step
        where = {TRAINABLE: {path: leaf.sharding for path, leaf in flatten(shapes).items()}}
        saved = checkpoint.read(source / CHECKPOINTS, step, (TRAINABLE,), where)
        return checkpoint.restore(shapes, saved.trees[TRAINABLE], f"{source}, checkpoint {step}")
    draw = jax.jit(
        lambda key: split(build(model, key))[1], out_shardings=jax.tree.map(lambda leaf: leaf.sharding, shapes)
    )
    return draw(keys(config.seed)[0])
