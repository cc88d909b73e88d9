"""Runs on models of transformers: adapters in and out as PEFT files, merged models out."""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import ValidationError

from vlora_jax import checkpoint
from vlora_jax.adapters.bind import apply
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.hub import save
from vlora_jax.hub.names import Names
from vlora_jax.hub.peft import Exported, as_lora, read_peft, write_peft
from vlora_jax.hub.peft_file import find, read_json, read_tensors
from vlora_jax.hub.peft_read import base_form
from vlora_jax.models.build import ModelConfig, abstract_model
from vlora_jax.models.matrix import MatrixConfig
from vlora_jax.models.vit import ViTConfig
from vlora_jax.training.config import PretrainedConfig, RunConfig, load_config
from vlora_jax.training.job import described, model_config_of, parameters
from vlora_jax.training.reading import explain
from vlora_jax.training.results import Trained, base_of, ordinary, write_adapter

HEADS = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token", "CAUSAL_LM": "lm", "SEQ_2_SEQ_LM": "lm"}  # by PEFT's task_type
CLASSIFIER = re.compile(r"\.(classifier|score|classifier\.out_proj)\.weight$")


def pretrained(config: RunConfig) -> PretrainedConfig:
    """The model section of a run on a model of transformers.

    Raises:
      ConversionError: the run's model is another one.
    """
    if not isinstance(config.model, PretrainedConfig):
        raise ConversionError(
            f"{config.run_dir}: its model is not from files of transformers (model.family=pretrained), so that its "
            f"parameters have no names there"
        )
    return config.model


def names_of_run(config: RunConfig) -> Names:
    """Transformers' names of a run's parameters."""
    return described(pretrained(config)).names


def source_of(adapter: Path) -> str:
    """The base that a PEFT adapter's config names.

    Raises:
      ConfigError: it names none.
    """
    source = read_json(find(adapter)[0]).get("base_model_name_or_path")
    if not source:
        raise ConfigError(f"{adapter} does not name its base; give it with --base")
    return source


def head_of(adapter: Path, head: str | None = None) -> dict[str, Any]:
    """The head that a PEFT adapter was trained with, if it is not given, and its classes, where its files tell."""
    head = HEADS.get(str(read_json(find(adapter)[0]).get("task_type"))) if head is None else head
    if head not in ("sequence", "token", "image"):
        return {"head": head}
    shapes = {name: tensor.shape for name, tensor in read_tensors(find(adapter)[1])[0].items()}
    classes = [shape[0] for name, shape in shapes.items() if CLASSIFIER.search(name)]
    return {"head": head, "classes": classes[0] if classes else None}


def read_adapter(
    adapter: Path,
    model: Mapping[str, Any],
    overrides: tuple[str, ...] = (),
    *,
    fresh: bool = False,
    any_base: bool = False,
) -> Trained:
    """A PEFT adapter with its base, as if it were a run.

    Args:
      model: fields of the run's model section, `{"source": …, "head": …}`.
      overrides: of other sections, such as `data`, for `vlora-jax eval`; without `quantize` the base is held as the
        file says that it was.
      fresh: allow an adapter that changes nothing yet.
      any_base: allow one that we wrote for another base.

    Raises:
      AdapterFileError: see `read_peft`.
      ConfigError: a field of the model section or an override is impossible.
      ConversionError: the adapter is several in one.
    """
    try:
        section = PretrainedConfig(**model)
    except ValidationError as error:
        raise ConfigError(explain(error, PretrainedConfig)) from None
    start = load_config(None, overrides).model_copy(update={"model": section})
    if start.quantize is None and not any_base:
        start = start.model_copy(update={"quantize": base_form(adapter)})
    shape = model_config_of(start)
    base = parameters(start, shape, make_mesh(devices=jax.devices()[:1]), None)
    adapters = read_peft(adapter, base, names_of_run(start), fresh=fresh, any_base=any_base)
    if len(adapters) > 1:
        kinds = " and ".join(each.method.name for each in adapters)
        raise ConversionError(f"{adapter} holds {kinds}; a run holds one adapter: use vlora_jax.read_peft in Python")
    return Trained(adapter, start, shape, abstract_model(shape)[0], base, adapters[0], 0)


def import_adapter(
    adapter: Path, out: Path, model: Mapping[str, Any], overrides: tuple[str, ...] = (), **options: bool
) -> Trained:
    """Make a run directory of a PEFT adapter; what reads runs reads it, but for what needs the data it was trained on.

    The arguments are those of `read_adapter`.

    Raises:
      AdapterFileError, ConfigError, ConversionError: see `read_adapter`.
      ResourceError: the directory is not empty.
    """
    checkpoint.refuse_used(out)
    trained = read_adapter(adapter, model, overrides, **options)
    return write_adapter(trained, out, {"peft": str(adapter)})


def export_adapter(
    trained: Trained, out: Path, *, plain: bool = False, max_rank: int = 16, limit: float = 1.0
) -> tuple[Exported, dict[str, np.ndarray]]:
    """Write a run's adapter as a PEFT directory.

    Args:
      plain: as one LoRA that serving stacks take, see `as_lora`, with `max_rank` and `limit`.

    Returns:
      What was written, and what a plain LoRA leaves out of each site's change.

    Raises:
      ConversionError: the run has no adapter, its model has no names in transformers, or PEFT cannot express it.
      BaseMismatchError: the run's base cannot be found again.
      ResourceError: the directory is not empty.
    """
    checkpoint.refuse_used(out)
    if trained.adapter is None:
        raise ConversionError(f"{trained.run} trained its model, not an adapter; vlora-jax merge writes models")
    section, names = pretrained(trained.config), names_of_run(trained.config)
    base, adapter, residuals = base_of(trained), trained.adapter, {}
    if plain:
        adapter, residuals = as_lora(base, adapter, max_rank, limit)
    return write_peft(out, adapter, base, names, base_name=section.source), residuals


@dataclass(frozen=True)
class Merged:
    """What `write_merged` wrote; the largest difference of a logit and the largest logit, on random inputs."""

    written: save.Written
    gap: float
    largest: float


def write_merged(trained: Trained, out: Path) -> Merged:
    """Write a run's model, its adapter merged, as transformers keeps it.

    Raises:
      ConversionError: the adapter cannot be merged, or the merged logits are not finite.
      BaseMismatchError: the run's base cannot be found again.
      ResourceError: the directory is not empty.
    """
    checkpoint.refuse_used(out)
    section = pretrained(trained.config)
    graphdef, params = ordinary(trained)
    inputs = probe(trained.model)
    before = jax.jit(functools.partial(apply, trained.graphdef))(base_of(trained), trained.adapter, *inputs)
    after = jax.jit(functools.partial(apply, graphdef))(params, None, *inputs)
    if not jnp.isfinite(after).all():
        raise ConversionError(f"{out}: the merged model's logits are not finite")
    written = save.save(out, graphdef, params, like=section.source, class_names=trained.class_names)
    return Merged(written, float(jnp.abs(after - before).max()), float(jnp.abs(before).max()))


def probe(model: ModelConfig, rows: int = 4, length: int = 16) -> tuple[jax.Array, ...]:
    """Random inputs of a model: images or tokens, twice for an encoder–decoder."""
    rng = np.random.default_rng(0)
    assert not isinstance(model, MatrixConfig)  # which no file of transformers holds
    if isinstance(model, ViTConfig):
        return (jnp.asarray(rng.normal(size=(rows, model.image, model.image, model.channels)), jnp.float32),)
    tokens = lambda: jnp.asarray(rng.integers(0, model.vocabulary, (rows, length)), jnp.int32)
    return (tokens(), tokens()) if model.family == "seq2seq" else (tokens(),)
