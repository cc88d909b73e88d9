"""Adapters of one base as one: runs and PEFT directories, blended, as a LoRA of a rank or in the model itself."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.arithmetic import add, weighted_sum
from vlora_jax.adapters.consensus import dare, ties
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.hub.peft import as_lora
from vlora_jax.inspection.intruders import ReducedRow, reduce_intruders
from vlora_jax.training.exchange import head_of, read_adapter, source_of
from vlora_jax.training.opened import open_adapter, opened_run
from vlora_jax.training.results import Trained, read_run, write_adapter
from vlora_jax.training.runs import CONFIG, read_config
from vlora_jax.vertical.expand import expand

Kind = Literal["linear", "ties", "dare", "dare_ties"]


@dataclass(frozen=True)
class Recipe:
    """How changes become one.

    Attributes:
      kind: `"linear"`: Σ wᵢ·ΔWᵢ; `"ties"`: see `vlora_jax.ties`; `"dare"`: the sum of thinned changes, see
        `vlora_jax.dare`; `"dare_ties"`: their elected mean, untrimmed.
      weights: one for each; None: equal shares of 1.
      density: of `"ties"`.
      drop: of `"dare"` and `"dare_ties"`.
      seed: of what those drop.
    """

    kind: Kind = "linear"
    weights: tuple[float, ...] | None = None
    density: float = 0.2
    drop: float = 0.9
    seed: int = 0

    def blend(self, adapters: Sequence[Adapter], base: Tree) -> Adapter:
        """One adapter of several.

        Raises:
          VloraError: of some kind, see `vlora_jax.weighted_sum`, `ties` and `dare`.
        """
        weights = [1 / len(adapters)] * len(adapters) if self.weights is None else self.weights
        if self.kind == "ties":
            return ties(adapters, weights, self.density, base)
        if self.kind != "linear":
            keys = jax.random.split(jax.random.key(self.seed), len(adapters))
            adapters = [dare(each, self.drop, key, base) for each, key in zip(adapters, keys, strict=True)]
        return ties(adapters, weights, 1.0, base) if self.kind == "dare_ties" else weighted_sum(adapters, weights, base)


def blend_runs(members: Sequence[Path], recipe: Recipe, base: str | None = None, step: int | None = None) -> Trained:
    """The first run among the members with the blend of all their adapters instead of its own.

    Args:
      members: runs that trained adapters, and PEFT directories.
      base: directory or hub name of the base, where all are PEFT's and the first does not name it.
      step: a checkpoint of the only run; its best if not given.

    Raises:
      BaseMismatchError: they are adapters of different bases.
      ConfigError: a member is no adapter, or the recipe does not fit them.
      ConversionError: an adapter depends on the input where the recipe needs its ΔW.
    """
    for member in members:
        if not member.exists():
            read_config(member)  # which raises, and says what is near
    place = next((place for place, member in enumerate(members) if is_run(member)), 0)
    first = members[place]
    if is_run(first):
        trained = read_run(first, step)
    else:
        trained = read_adapter(first, {"source": base or source_of(first), **head_of(first)})
    if trained.adapter is None:
        raise ConfigError(f"{first} trained its model, not an adapter; only adapters of one base are put together")
    opened, adapters = opened_run(trained), []
    params = expand(trained.graphdef, opened.base)[1]
    for each, member in enumerate(members):
        own = [trained.adapter] if each == place else open_adapter(str(member), opened)
        adapters.append(own[0] if len(own) == 1 else add(*own, base=params))
    return dataclasses.replace(trained, adapter=recipe.blend(adapters, params))


def is_run(path: Path) -> bool:
    """Whether a directory is a run's."""
    return (path / CONFIG).is_file()


def write_as_lora(
    blended: Trained, out: Path, rank: int, limit: float, members: Sequence[Path], keep: float | None = None
) -> tuple[Trained, dict[str, np.ndarray], list[ReducedRow]]:
    """Write the adapter of `blend_runs` as a run with a LoRA of at most a rank.

    Args:
      keep: share of its intruders that stays, see `reduce_intruders`; they are not looked for if not given.

    Returns:
      The run; what the LoRA leaves out of each site's change, one value a layer; and what became of its intruders.

    Raises:
      ConversionError: see `as_lora`; or one member trains whole what another adapts.
      ConfigError: `keep` is no share.
      ResourceError: the directory is not empty.
    """
    if blended.adapter is None:
        raise ConversionError(f"{blended.run} has no adapter")
    whole = blended.adapter.trainable["full"]
    both = next((site.leaf_path for site in blended.adapter.sites if site.leaf_path in whole), None)
    if both:
        raise ConversionError(
            f"{both} is trained whole by one of them and adapted by another, which no single adapter holds; merge them "
            f"into the model, without --as lora"
        )
    checkpoint.refuse_used(out)  # before SVDs that may take long
    params = expand(blended.graphdef, opened_run(blended).base)[1]
    lora, residuals = as_lora(params, blended.adapter, rank, limit, plain=False)
    lora, rows = (lora, []) if keep is None else reduce_intruders(params, lora, keep)
    made_from = {"members": [str(member) for member in members], "keep_intruders": keep}
    return write_adapter(dataclasses.replace(blended, adapter=lora), out, made_from), residuals, rows
