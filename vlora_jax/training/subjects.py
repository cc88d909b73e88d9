"""What there is to look at: a run, one of its checkpoints, an adapter in PEFT's files, or a model of transformers."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flax import nnx

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.arithmetic import add
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import BaseMismatchError, CheckpointError, ConfigError
from vlora_jax.hub.load import load_model
from vlora_jax.hub.peft import read_peft
from vlora_jax.hub.peft_file import CONFIG as PEFT_CONFIG
from vlora_jax.hub.peft_read import base_form, fingerprint
from vlora_jax.training.exchange import head_of, source_of
from vlora_jax.training.opened import open_model
from vlora_jax.training.results import Trained, read_run
from vlora_jax.training.runs import CHECKPOINTS, CONFIG
from vlora_jax.vertical.expand import expand


@dataclass(frozen=True)
class Subject:
    """Something to look at.

    Attributes:
      where: as it was asked for.
      kind: `"run"`, `"PEFT adapter"` or `"model"`.
      graphdef, base: the model: what was trained, or what an adapter is for. `base` is None where it was not found.
      adapters: what changes the base, together; none of a model.
      missing: why `base` is None.
      trained: the run's checkpoint; None of anything but a run.
      about: what is known of it beside its numbers.
    """

    where: str
    kind: str
    graphdef: nnx.GraphDef
    base: Tree | None
    adapters: tuple[Adapter, ...] = ()
    missing: str = ""
    trained: Trained | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def adapter(self) -> Adapter | None:
        """All changes as one adapter; None of a model."""
        if len(self.adapters) > 1:
            return add(*self.adapters, base=self.base)
        return self.adapters[0] if self.adapters else None

    @cached_property
    def dense_base(self) -> Tree | None:
        """The base with a kernel for each layer, whose changes can be measured one by one."""
        return None if self.base is None else expand(self.graphdef, self.base)[1]


def open_subject(where: str, step: int | None = None, base: str | None = None) -> Subject:
    """What is at a place.

    Args:
      where: a run directory, `RUN/checkpoints/STEP`, a directory of PEFT, one of model files, or a model's name.
      step: a run's checkpoint; its best if not given.
      base: model of a PEFT adapter; the one that its files name if not given.

    Raises:
      VloraError: of some kind: there is nothing usable.
    """
    path = Path(where)
    if path.parent.name == CHECKPOINTS and path.name.isdigit() and (path.parents[1] / CONFIG).is_file():
        if step not in (None, int(path.name)):
            raise ConfigError(f"{where} is checkpoint {path.name}; leave --step out, or give the run's directory")
        path, step = path.parents[1], int(path.name)
    if base is not None and not is_peft(where):
        raise ConfigError(f"{where} is no adapter of PEFT, so it takes no --base")
    if (path / CONFIG).is_file():
        return _of_run(where, read_run(path, step))
    if step is not None:
        raise ConfigError(f"{where} is no run, so it has no checkpoint of step {step}")
    if is_peft(where):
        return _of_peft(where, base or source_of(path))
    if path.is_dir() and not any(path.iterdir()):
        raise CheckpointError(f"{where} is empty: there is no run, adapter or model in it")
    opened = open_model(where)
    about = {"model": opened.config.model_dump(mode="json")}
    return Subject(where, "model", opened.graphdef, opened.base, about=about)


def is_peft(where: str) -> bool:
    """Whether a directory holds an adapter of PEFT."""
    return (Path(where) / PEFT_CONFIG).is_file()


def _of_run(where: str, trained: Trained) -> Subject:
    adapters = () if trained.adapter is None else (trained.adapter,)
    return Subject(
        where, "run", trained.graphdef, trained.base, adapters, trained.missing, trained, {"step": trained.step}
    )


def _of_peft(where: str, source: str) -> Subject:
    told = head_of(Path(where))
    form, silent = base_form(where), lambda line: None
    model = load_model(source, head=told.get("head"), classes=told.get("classes"), quantize=form, notify=silent)
    adapters = read_peft(where, model.base, model.names, fresh=True)
    about = {"base": source, "model": model.config.model_dump(mode="json")}
    return Subject(where, "PEFT adapter", model.graphdef, model.base, tuple(adapters), about=about)


def check_comparable(one: Subject, other: Subject) -> None:
    """Make sure that two subjects are both adapters, of one base, or both models.

    Parameters that an adapter trains whole, such as a new head, may start differently.

    Raises:
      ConfigError: only one of them is an adapter.
      BaseMismatchError: the adapters' bases differ.
    """
    if bool(one.adapters) != bool(other.adapters):
        adapter, model = (one, other) if one.adapters else (other, one)
        raise ConfigError(f"{adapter.where} is an adapter and {model.where} a model; compare two of a kind")
    if not one.adapters:
        return
    if one.base is not None and other.base is not None:
        prints = [fingerprint(each.base, [*one.adapters, *other.adapters]) for each in (one, other)]
    else:
        prints = [_saved_fingerprint(each) for each in (one, other)]
    if prints[0] != prints[1]:
        raise BaseMismatchError(
            f"{one.where} changes the base {prints[0]} and {other.where} the base {prints[1]}: changes of different "
            f"bases cannot be compared; merge them and compare the models"
        )


def _saved_fingerprint(subject: Subject) -> str:
    if subject.trained is not None:
        return subject.trained.about["base_fingerprint"]
    return checkpoint.fingerprint(subject.base)
