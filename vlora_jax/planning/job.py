"""A run as shapes on a mesh, from its config and an architecture: no weights, no tokenizer, no data of the user's."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.shapes import Shapes, example_shapes
from vlora_jax.distributed.mesh import check_batch
from vlora_jax.distributed.specs import batch_sharding
from vlora_jax.hub.architecture import architecture
from vlora_jax.models.build import ModelConfig
from vlora_jax.training.config import PretrainedConfig, RunConfig
from vlora_jax.training.job import check_task, load_data, model_config_of
from vlora_jax.training.outline import Outline, bytes_of, outline


def planned(config: RunConfig, mesh: Mesh, model: Path | None = None) -> Outline:
    """The train step of a run, the one that training compiles.

    Args:
      model: the `config.json` of a pretrained model.

    Raises:
      VloraError: of some kind: what the config asks for is impossible.
    """
    check_batch(config.data.batch, mesh)
    chosen = model_of(config, model)
    task, shapes = batch_of(config, chosen)
    check_task(chosen, config.data.name, task)
    lead = (config.accumulate, config.data.batch)
    where = batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=where) for name, (shape, dtype) in shapes.items()
    }
    return outline(config, mesh, chosen, task, batch)


def model_of(config: RunConfig, model: Path | None) -> ModelConfig:
    """The model that a run trains or adapts."""
    if isinstance(config.model, PretrainedConfig) and model is not None:
        section = config.model
        return architecture(model, section.head, section.dtype, **section.options())
    return model_config_of(config)


def batch_of(config: RunConfig, model: ModelConfig) -> tuple[str, Shapes]:
    """The task, and the arrays of one example; sets that come with the library are looked at."""
    if isinstance(config.data, DatasetConfig):
        return example_shapes(config.data, model)
    data = load_data(config)
    return data.task, {name: (array.shape, array.dtype) for name, array in data.train[0].items()}


def lasting_bytes(shapes: Outline) -> dict[str, int]:
    """Bytes on one device of what is there before a step: base, adapter, optimizer, batch."""
    state = shapes.state
    trees = {"base": shapes.base, "adapter": (state.trainable, state.frozen)}
    if shapes.config.adapter is None:
        trees = {"base": (shapes.base, state.trainable), "adapter": ()}
    trees |= {"optimizer": state.opt_state, "batch": shapes.batch}
    return {name: bytes_of(tree, shapes.mesh) for name, tree in trees.items()}
