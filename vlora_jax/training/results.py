"""What a run has learnt, read back from its directory, and written as ordinary parameters."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import yaml
from flax import nnx
from pydantic import Discriminator, TypeAdapter

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import Adapter, count
from vlora_jax.adapters.bind import apply
from vlora_jax.adapters.init import adapter_shapes
from vlora_jax.adapters.merge import merge
from vlora_jax.adapters.trees import Tree
from vlora_jax.data.pipeline import held_out_batches
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.errors import BaseMismatchError, CheckpointError, ConfigError, ConversionError, VloraError
from vlora_jax.models.build import ModelConfig, abstract_model
from vlora_jax.training.config import RunConfig
from vlora_jax.training.job import FROZEN, TRAINABLE, load_data, parameters
from vlora_jax.training.runs import CHECKPOINTS, CONFIG, best_step, read_config, steps_of
from vlora_jax.vertical.expand import expand


@dataclass(frozen=True)
class Trained:
    """A checkpoint of a run.

    Attributes:
      model: the model's config.
      graphdef, base: the model as from `vlora_jax.split`: what was trained, or what an adapter is for. `base` is
        None where it could not be found again.
      adapter: None if the model itself was trained.
      missing: why `base` is None.
      class_names: of the classes that it tells apart; None where they have none.
      about: what was saved beside the checkpoint's tensors: fingerprints, versions, progress.
    """

    run: Path
    config: RunConfig
    model: ModelConfig
    graphdef: nnx.GraphDef
    base: Tree | None
    adapter: Adapter | None
    step: int
    missing: str = ""
    class_names: tuple[str, ...] | None = None
    about: dict[str, Any] = field(default_factory=dict)


def read_run(run: Path, step: int | None = None) -> Trained:
    """A run's checkpoint.

    Args:
      run: its directory.
      step: the best one by the held-out metric if not given.

    Raises:
      ConfigError: the directory is no run.
      CheckpointError: there is no whole checkpoint, or none of this step.
    """
    config = read_config(run)
    there = steps_of(run)
    if step is not None and step not in there:
        raise CheckpointError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, there)) or 'none'}")
    step = best_step(run) if step is None else step
    saved = checkpoint.read(run / CHECKPOINTS, step, (TRAINABLE, FROZEN))
    model = TypeAdapter(Annotated[ModelConfig, Discriminator("family")]).validate_python(saved.metadata["model"])
    graphdef, shapes = abstract_model(model)
    what = f"{run}, checkpoint {step}"
    class_names = tuple(saved.metadata.get("class_names") or ()) or None
    if config.adapter is None:
        base = checkpoint.restore(shapes, saved.trees[TRAINABLE], what)
        return Trained(run, config, model, graphdef, base, None, step, class_names=class_names, about=saved.metadata)
    adapter = _adapter(config, shapes, saved, what)
    base, missing = None, ""
    try:
        base = parameters(config, model, make_mesh(devices=jax.devices()[:1]), saved.metadata["source_step"])
        found = checkpoint.fingerprint(base)
        if found != saved.metadata["base_fingerprint"]:
            raise BaseMismatchError(f"{config.init_from or 'the seed'} gives another base than {run} was trained on")
    except VloraError as error:
        base, missing = None, str(error)
    return Trained(run, config, model, graphdef, base, adapter, step, missing, class_names, saved.metadata)


def _adapter(config: RunConfig, shapes: Tree, saved: checkpoint.Saved, what: str) -> Adapter:
    """The adapter of a checkpoint."""
    assert config.adapter is not None
    method = config.adapter.for_run(config.steps)
    adapter = adapter_shapes(method, shapes)
    return dataclasses.replace(
        adapter,
        trainable=checkpoint.restore(adapter.trainable, saved.trees[TRAINABLE], what),
        frozen=checkpoint.restore(adapter.frozen, saved.trees[FROZEN], what),
    )


def adapters_of(trained: Trained) -> list[tuple[int, Adapter]]:
    """The adapters of all whole checkpoints of a run that trained one, by step, oldest first.

    Raises:
      ConfigError: the run trained a model.
    """
    if trained.adapter is None:
        raise ConfigError(f"{trained.run} trained a model, not an adapter, whose checkpoints could be followed")
    shapes, directory = abstract_model(trained.model)[1], trained.run / CHECKPOINTS
    whole = [step for step in steps_of(trained.run) if checkpoint.fault_of(directory / str(step)) is None]
    read = lambda step: checkpoint.read(directory, step, (TRAINABLE, FROZEN))
    return [(step, _adapter(trained.config, shapes, read(step), f"{trained.run}, checkpoint {step}")) for step in whole]


def base_of(trained: Trained) -> Tree:
    """A run's base.

    Raises:
      BaseMismatchError: it could not be found again.
    """
    if trained.base is None:
        raise BaseMismatchError(f"{trained.run}: the adapter's base is needed: {trained.missing}")
    return trained.base


def ordinary(trained: Trained) -> tuple[nnx.GraphDef, Tree]:
    """A run's model as ordinary dense parameters: vertical stacks expanded, adapters merged.

    Raises:
      BaseMismatchError: an adapter's base cannot be found again.
      ConversionError: the method cannot be merged.
    """
    graphdef, params = expand(trained.graphdef, base_of(trained))
    return graphdef, params if trained.adapter is None else merge(params, trained.adapter)


def write_adapter(trained: Trained, out: Path, made_from: Mapping[str, Any]) -> Trained:
    """Write a run that holds an adapter at step 0 and was trained elsewhere; returns it as it is read back.

    Args:
      trained: its adapter, of any method that has a config, takes the place of its config's.
      made_from: what to say of its origin.

    Raises:
      ResourceError: the directory is not empty.
      BaseMismatchError: the base cannot be found again.
    """
    checkpoint.refuse_used(out)
    adapter = trained.adapter
    assert adapter is not None  # callers made it
    config = RunConfig.model_validate(trained.config.plain() | {"adapter": adapter.method})
    trees = {TRAINABLE: adapter.trainable, FROZEN: adapter.frozen}
    found = checkpoint.fingerprint(base_of(trained))
    write_start(dataclasses.replace(trained, config=config), out, trees, made_from, base_fingerprint=found)
    return read_run(out)


def write_start(
    trained: Trained, out: Path, trees: Mapping[str, Tree], made_from: Mapping[str, Any], base_fingerprint: str | None
) -> None:
    """Write a run directory whose only checkpoint is one of step 0."""
    config = trained.config.model_copy(update={"run_dir": str(out)})
    about = {
        "config": config.plain(),
        "model": trained.model.model_dump(mode="json"),
        "base_fingerprint": base_fingerprint,
        "source_step": trained.about.get("source_step"),
        "data_fingerprint": trained.about.get("data_fingerprint"),
        "class_names": trained.class_names,
        "best": None,
        "made_from": dict(made_from),
    }
    saver = checkpoint.Checkpoints(out / CHECKPOINTS)
    saver.save(0, dict(trees), about)
    saver.close()
    (out / CONFIG).write_text(yaml.safe_dump(config.plain(), sort_keys=False), encoding="utf-8")


@dataclass(frozen=True)
class Written:
    """What `write_ordinary` did.

    Attributes:
      parameters: numbers of the written model.
      gap: largest difference of a logit from the model as it was trained, over a batch of held-out examples.
      largest: the largest logit, to compare the gap with.
      examples: in that batch.
    """

    out: Path
    parameters: int
    gap: float
    largest: float
    examples: int


def write_ordinary(trained: Trained, out: Path) -> Written:
    """Write a run's model as ordinary dense parameters, into a directory that `init_from` takes.

    Raises:
      ResourceError: the directory is not empty.
      BaseMismatchError: an adapter's base cannot be found again.
      ConversionError: the method cannot be merged, or the merged logits are not finite.
    """
    checkpoint.refuse_used(out)
    graphdef, params = ordinary(trained)
    data = load_data(trained.config)
    batch = next(held_out_batches(data, min(32, len(data.held_out))))
    inputs = [jnp.asarray(batch[name])[0] for name in ("image", "tokens", "decoder_tokens") if name in batch]
    before = jax.jit(functools.partial(apply, trained.graphdef))(trained.base, trained.adapter, *inputs)
    after = jax.jit(functools.partial(apply, graphdef))(params, None, *inputs)
    if not jnp.isfinite(after).all():
        raise ConversionError(f"{out}: the merged model's logits are not finite")
    model = trained.model.model_copy(update={"vertical": None})
    config = trained.config.model_copy(update={"model": model, "init_from": None, "adapter": None, "quantize": None})
    about = {"source_step": None, "data_fingerprint": data.fingerprint}
    made_from = {"run": str(trained.run), "step": trained.step}
    whole = dataclasses.replace(trained, config=config, model=model, about=about)
    write_start(whole, out, {TRAINABLE: params}, made_from, base_fingerprint=None)
    gap, largest = float(jnp.abs(after - before).max()), float(jnp.abs(before).max())
    return Written(out, count(params), gap, largest, len(inputs[0]))
