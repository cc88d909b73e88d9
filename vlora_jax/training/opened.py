"""A model ready to use, from wherever it is: a run, or files of transformers; and adapters for it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.quantize import form_of
from vlora_jax.adapters.trees import Tree
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.errors import BaseMismatchError, ConfigError
from vlora_jax.hub.load import load_model
from vlora_jax.hub.names import Names
from vlora_jax.hub.peft import read_peft
from vlora_jax.hub.peft_read import fingerprint
from vlora_jax.models.build import abstract_model
from vlora_jax.training.config import PretrainedConfig, RunConfig
from vlora_jax.training.job import described, model_config_of, parameters, tokenizer_source
from vlora_jax.training.results import Trained, base_of, read_run
from vlora_jax.training.runs import CONFIG, read_config


@dataclass(frozen=True)
class Opened:
    """A model with its adapters.

    Attributes:
      graphdef, base: the model, as `vlora_jax.split` gives it.
      config: the model's.
      adapters: a run's own adapter, if it trained one.
      tokenizer: where its tokenizer is; None if it was not pretrained elsewhere.
      names: of its parameters in transformers' files; None if it was not read from such.
    """

    graphdef: nnx.GraphDef
    base: Tree
    config: Any
    adapters: list[Adapter]
    tokenizer: str | None
    names: Names | None


def open_model(where: str, step: int | None = None, dtype: str | None = None) -> Opened:
    """A run's model, or one of transformers.

    Args:
      where: a run directory, a directory of model files, a name on the hub, or `package:NAME`.
      step: a run's checkpoint; its best if not given.
      dtype: to read model files as; as stored if not given.

    Raises:
      VloraError: of some kind: nothing usable is there, or an adapter's base cannot be found again.
    """
    if not (Path(where) / CONFIG).is_file():
        if step is not None:
            raise ConfigError(f"{where} is no run, so it has no checkpoint of step {step}")
        path = Path(where)
        if not path.exists() and path.parent != Path() and path.parent.is_dir():  # no name on the hub, then
            read_config(path)
        loaded = load_model(where, dtype=dtype, notify=lambda line: None)
        return Opened(loaded.graphdef, loaded.base, loaded.config, [], str(loaded.directory), loaded.names)
    return opened_run(read_run(Path(where), step))


def opened_run(trained: Trained) -> Opened:
    """The model of a run that was read.

    Raises:
      BaseMismatchError: its adapter's base could not be found again.
    """
    adapters = [] if trained.adapter is None else [trained.adapter]
    model = trained.config.model
    names = described(model).names if isinstance(model, PretrainedConfig) else None
    source = tokenizer_source(trained.config)
    return Opened(trained.graphdef, base_of(trained), trained.model, adapters, source, names)


def open_start(config: RunConfig) -> Opened:
    """The model of a run that has not been started, as it would start."""
    shape = model_config_of(config)
    graphdef, _ = abstract_model(shape)
    base = parameters(config, shape, make_mesh(devices=jax.devices()[:1]))
    names = described(config.model).names if isinstance(config.model, PretrainedConfig) else None
    return Opened(graphdef, base, shape, [], tokenizer_source(config), names)


def open_adapter(where: str, opened: Opened) -> list[Adapter]:
    """The adapters of a run or of a PEFT directory, for a model.

    Raises:
      BaseMismatchError: they were trained on a base with other values than this, where they do not train it whole.
      ConfigError: there is no adapter, or the model has no names by which PEFT's files could be read.
    """
    path = Path(where)
    if not (path / CONFIG).is_file():
        if opened.names is None:
            raise ConfigError(f"{where} is no run directory, and PEFT's files fit only models of transformers")
        return read_peft(path, opened.base, opened.names)
    trained = read_run(path)
    if trained.adapter is None:
        raise ConfigError(f"{where} trained a model, not an adapter; give it as the model")
    adapters = [trained.adapter]
    if trained.base is None or fingerprint(trained.base, adapters) != fingerprint(opened.base, adapters):
        raise BaseMismatchError(
            f"{where}: its adapter was trained on another base than this model{otherwise_held(trained, opened)}"
        )
    return adapters


def otherwise_held(trained: Trained, opened: Opened) -> str:
    """What to say if a run's base and a model are held in different forms; empty if they are not."""
    form, here = trained.config.quantize, form_of(opened.base)
    if form == here:
        return ""
    if form is None:
        return f"; this one is held as {here}: give the adapter's own run, or the model as it was"
    return f"; its base was held as {form}: merge it, or give the run itself as the model"
