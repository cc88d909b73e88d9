"""What a method's PEFT files look like, as plain functions: which fields and tensors they have, and what these are.

The reader and the writer know no method; a `Form` says what they need to know of one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Site
from vlora_jax.errors import AdapterFileError
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_file import Tensors
from vlora_jax.hub.peft_modules import Modules


@dataclass(frozen=True)
class Place:
    """One adapted module of transformers' model.

    Attributes:
      name: `"model.layers.3.self_attn.q_proj"`.
      site, layer: our kernel, and which layer of it; None if it is not in a stack.
      shape: of its weight in files: (out, in), four sides for the patches of images.
      as_is: its weight lies in files as our kernel does, (in, out): GPT-2's `Conv1D`.
      pattern: selects its site and no other; a key of our methods' tables.
    """

    name: str
    site: Site
    layer: int | None
    shape: tuple[int, ...]
    as_is: bool
    pattern: str


Places = Mapping[str, Place]  # by module name, in the order of sites and layers


def same(array: np.ndarray) -> np.ndarray:
    return array


@dataclass(frozen=True)
class Leaf:
    """One tensor of a file, and the factor of ours that it is: of one layer of one site, or shared.

    Attributes:
      factor: our name of it, trainable or frozen.
      shape: in the file.
      to_file, from_file: our factor of one layer to the file's array, and back (all of it, with what is padded).
      dtype: in the files that we write; one of whole numbers is demanded on reading too.
    """

    factor: str
    shape: tuple[int, ...]
    to_file: Callable[[np.ndarray], np.ndarray] = same
    from_file: Callable[[np.ndarray], np.ndarray] = same
    dtype: Any = np.float32

    @property
    def whole_numbers(self) -> bool:
        return np.issubdtype(self.dtype, np.integer)


def turned(factor: str, shape: tuple[int, int]) -> Leaf:
    """A matrix that lies transposed in files."""
    return Leaf(factor, shape, np.transpose, np.transpose)


def reshaped(factor: str, shape: tuple[int, ...], ours: tuple[int, ...]) -> Leaf:
    """A tensor with other axes in files: the same numbers in the same order."""
    return Leaf(factor, shape, lambda array: array.reshape(shape), lambda array: array.reshape(ours))


def fresh(method: Method, sites: Sequence[Site], leaves: Mapping[str, Any]) -> Adapter:
    """A method's own start."""
    return method.init(jax.random.key(0), list(sites), dict(leaves))


@dataclass(frozen=True, kw_only=True)
class Form:
    """A method's PEFT files.

    Attributes:
      peft_type: in the config. Several forms may have one; `when` tells them apart.
      method: ours.
      config: PEFT's fields of the method, see `PeftConfig`.
      options: `(config, places)`: our method's options, but for `targets` and `full`. Errors need not name the file.
      fields: `(adapter, places, targets)`: the inverse, PEFT's fields but for the common ones; `targets` is what
        `target_modules` will be.
      leaves: `(method of the site, config, place)`: the tensors of an adapted module, by their name after the module's
        path. What a config says of one module, such as its rank, is found there.
      shared: `(method, config, places)`: the tensors that all modules share, by their name after `"base_model."`.
      when: `(config)`: whether a config is of this form.
      tidy: `(config, tensors)`: tensors of another layout that PEFT reads as well under the names of this one.
      start: `(method, sites, base's leaves)`: an adapter that changes nothing: what no tensor of the file fills, frozen
        tensors and layers that are not adapted, stays as it is there. By default the method's own.
      adapted: `(adapter, place)`: whether a layer is in the file at all. By default those are that differ from the
        start, or all of a site if none does.
      finish: `(adapter, config, places, modules)`: an adapter as read, completed by what the base's values give.
      about: `(fields)`: for the model card.
      whole: for a method that trains what it finds instead of adapting kernels: what stands before the names of its
        modules' own tensors, `"ln_tuning_layers."`. It has no places then.
      kernels, embeddings, patches, turned: whether PEFT has the method for dense layers, embeddings, the patches of
        images, and `Conv1D`.
      ties: where an output head shares the embedding's values, PEFT's head follows what the embedding becomes.
    """

    peft_type: str
    method: type[Method]
    config: type[PeftConfig]
    options: Callable[[Any, Places], dict[str, Any]]
    fields: Callable[[Adapter, Places, list[str]], dict[str, Any]]
    leaves: Callable[[Any, Any, Place], dict[str, Leaf]]
    shared: Callable[[Any, Any, Places], dict[str, Leaf]] = lambda method, config, places: {}
    when: Callable[[Any], bool] = lambda config: True
    tidy: Callable[[Any, Tensors], Tensors] = lambda config, tensors: tensors
    start: Callable[[Any, Sequence[Site], Mapping[str, Any]], Adapter] = fresh
    adapted: Callable[[Adapter, Place], bool] | None = None
    finish: Callable[[Adapter, Any, Places, Modules], Adapter] = lambda adapter, config, places, modules: adapter
    about: Callable[[Mapping[str, Any]], str] = lambda fields: ", ".join(
        f"{name} {value}" for name, value in fields.items() if isinstance(value, int | float | str)
    )
    kernels: bool = True
    whole: str | None = None
    embeddings: bool = False
    patches: bool = False
    turned: bool = True
    ties: bool = False

    def refusal(self, place: Place) -> str | None:
        """Why PEFT does not have this method for a module; None if it does."""
        kinds = {
            "no embedding": place.site.kind != "embed" and not self.kernels,
            "an embedding": place.site.kind == "embed" and not self.embeddings,
            "a convolution": len(place.shape) == 4 and not self.patches,
            "a Conv1D": place.as_is and not self.turned,
        }
        kind = next((kind for kind, wrong in kinds.items() if wrong), None)
        return kind and f"{place.name} is {kind}, for which PEFT does not have {self.peft_type}"


def uniform(places: Places, value: Callable[[Place], Any], what: str) -> dict[str, Any]:
    """A value of each site, by its pattern, for methods whose options do not vary from layer to layer.

    Raises:
      AdapterFileError: layers of one site differ in it.
    """
    table: dict[str, tuple[Place, Any]] = {}
    for place in places.values():
        first, known = table.setdefault(place.pattern, (place, value(place)))
        if value(place) != known:
            raise AdapterFileError(
                f"{what} is {known} for {first.name} and {value(place)} for {place.name}; layers of one kind that "
                f"differ in it are not supported"
            )
    return {pattern: known for pattern, (_, known) in table.items()}


def differing(table: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The entries of a table that are not the default."""
    return {key: value for key, value in table.items() if value != default}


def plain(number: float) -> float:
    """A whole number without its point, as PEFT writes most alphas."""
    return int(number) if float(number).is_integer() else number
