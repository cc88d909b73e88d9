"""The optax chain of a run: clip, adapt, decay, schedule, rates of groups."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import optax
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.trees import Tree, flatten, matching, unflatten

RATE, DECAY = 3e-3, 0.3  # of a small Transformer that learns from scratch
Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(BaseModel):
    """An optimiser with its schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: Literal["adamw", "lion", "sgd", "adafactor"] = "adamw"
    rate: PositiveFloat | None = Field(
        default=None,
        description="peak learning rate; null: that at which the adapter's method trains, 3e-3 without one",
    )
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: NonNegativeInt = Field(default=100, description="steps of linear growth from 0")
    end: NonNegativeFloat = Field(default=0.0, description="final rate as a share of the peak; not for constant")
    decay: NonNegativeFloat | None = Field(
        default=None,
        description="decoupled weight decay, none of biases and norm scales; null: 0 for an adapter, 0.3 without one",
    )
    clip: PositiveFloat | None = Field(default=1.0, description="global norm of the gradient of what trains")
    b1: Share = 0.9
    b2: Share = 0.999
    eps: PositiveFloat = 1e-8
    groups: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="rate relative to the peak for trained parameters that a pattern matches"
    )

    def resolved(self, method: Method | None) -> "OptimizerConfig":
        """With the rate and the decay that suit what is trained, where they are open.

        >>> OptimizerConfig().resolved(None).rate
        0.003
        """
        rate, decay = (RATE, DECAY) if method is None else (method.usual_rate, 0.0)
        own = {"rate": rate if self.rate is None else self.rate, "decay": decay if self.decay is None else self.decay}
        return self.model_copy(update=own)


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, of a config whose rate is not open."""
    assert config.rate is not None
    warmup = min(config.warmup, steps)
    rest = max(1, steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(config.rate, rest, alpha=config.end),
        "linear": optax.linear_schedule(config.rate, config.rate * config.end, rest),
        "constant": optax.constant_schedule(config.rate),
    }[config.schedule]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, config.rate, warmup), after], [warmup])


@dataclass(frozen=True)
class Numbers:
    """What an optimiser computes with, beside its schedule: numbers, or traced scalars in a program of several runs.

    Attributes:
      clip: largest norm of the gradient; infinite to leave it.
      relative: learning rate of each trained leaf, by path.
    """

    clip: Any
    decay: Any
    b1: Any
    b2: Any
    eps: Any
    relative: dict[str, Any]


jax.tree_util.register_dataclass(Numbers, [each.name for each in dataclasses.fields(Numbers)], [])


def optimizer(
    config: OptimizerConfig, steps: int, trainable: Tree, adapter: Adapter | None
) -> optax.GradientTransformation:
    """The transformation of gradients of `trainable`, and of nothing else: the clipped norm is that of what trains.

    Args:
      trainable: the tree that is differentiated, or its shapes.
      adapter: it belongs to; its method may give groups of its own.

    Raises:
      TargetError: a group's pattern matches nothing.
    """
    config = config.resolved(adapter and adapter.method)
    numbers = numbers_of(config, trainable, adapter)
    return chain(config.name, schedule(config, steps), numbers, decayed(trainable, adapter))


def numbers_of(config: OptimizerConfig, trainable: Tree, adapter: Adapter | None) -> Numbers:
    """The numbers of a config whose decay is not open; see `optimizer`."""
    clip = math.inf if config.clip is None else config.clip
    return Numbers(clip, config.decay, config.b1, config.b2, config.eps, rates(config, trainable, adapter))


def chain(name: str, rate: optax.Schedule, numbers: Numbers, decays: Tree) -> optax.GradientTransformation:
    """The transformation that an optimiser's name and numbers make.

    Args:
      decays: where weight decay applies, in the form of what trains.
    """
    scale = {
        "adamw": lambda: optax.scale_by_adam(numbers.b1, numbers.b2, numbers.eps),
        "lion": lambda: optax.scale_by_lion(numbers.b1, numbers.b2),
        "sgd": lambda: optax.trace(numbers.b1),
        "adafactor": lambda: optax.scale_by_factored_rms(),
    }[name]
    plain = optax.identity()
    return optax.chain(
        plain if is_number(numbers.clip, math.inf) else optax.clip_by_global_norm(numbers.clip),
        scale(),
        plain if is_number(numbers.decay, 0.0) else optax.add_decayed_weights(numbers.decay, mask=decays),
        optax.scale_by_learning_rate(rate),
        scale_by(numbers.relative),
    )


def is_number(value: Any, number: float) -> bool:
    """Whether a value is known to be this number; one that is traced never is."""
    return isinstance(value, int | float) and value == number


def decayed(trainable: Tree, adapter: Adapter | None = None) -> Tree:
    """True where weight decay applies: not to biases and norm scales, of an adapter's tensors to those it names.

    Decay pulls towards zero, which for many tensors of adapters (a scale of 1, a start in the kernel) is not where they
    change nothing.
    """

    def decays(path: str) -> bool:
        name = path.rsplit("/", 1)[-1]
        if adapter is None or path.startswith("full/"):
            return name not in ("bias", "scale")
        return name in adapter.method.decays

    return unflatten(trainable, {path: decays(path) for path in flatten(trainable)})


def rates(config: OptimizerConfig, trainable: Tree, adapter: Adapter | None) -> dict[str, float]:
    """Relative learning rate of each trained leaf: its method's for its group, times the config's for its path."""
    paths = list(flatten(trainable))
    relative = dict.fromkeys(paths, 1.0)
    if adapter is not None:
        by_group = adapter.method.rates()
        relative = {path: by_group.get(group, 1.0) for path, group in flatten(adapter.method.groups(adapter)).items()}
    for pattern, rate in config.groups.items():
        for path in matching(pattern, paths, "optimizer.groups"):
            relative[path] *= rate
    return relative


def scale_by(relative: dict[str, Any]) -> optax.GradientTransformation:
    """Multiply each leaf's update by its own factor."""
    if all(is_number(rate, 1.0) for rate in relative.values()):
        return optax.identity()

    def update(updates: Tree, params: Any = None) -> Tree:
        return unflatten(updates, {path: leaf * relative[path] for path, leaf in flatten(updates).items()})

    return optax.stateless(update)
