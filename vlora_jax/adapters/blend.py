"""Adapters made of adapters: a change that is blended of others', which are kept as they are."""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Method, site_key
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import ConfigError, ConversionError, TargetError, expect

Weight = float | int | Array
BlendType = TypeVar("BlendType", bound="Blend")
WORDS = "key"  # of each layer of a site, where a blend draws: two words, whatever the key's implementation


@dataclass(frozen=True, kw_only=True)
class Blend(Method):
    """ΔW of the changes ΔWᵢ of other adapters, of any methods, which it keeps as its parts.

    Tensors of member i are those it has alone, under `i.name`; the weights w `(members,)` are frozen. What methods do
    beside their change (penalties, schedules, dropout) is not carried over: further training is plain descent on the
    members' tensors.

    Attributes:
      members: the methods.
      places: the paths of the sites that each of them changes.
    """

    paper: ClassVar[str] = ""
    trains: ClassVar[str] = "what its members train"
    vertical: ClassVar[bool] = False

    members: tuple[Method, ...] = ()
    places: tuple[tuple[str, ...], ...] = ()

    @abstractmethod
    def blend(self, changes: Sequence[tuple[Array, Array]], factors: FactorDict) -> Array:
        """One change out of the members' weights and changes, which have one shape.

        Args:
          factors: of the place, where the blend has tensors of its own.
        """

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether all members can be merged."""
        return all(member.mergeable for member in self.members)

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        raise ConfigError(f"{self.name} does not start by itself: it is made of adapters, by add, ties and the like")

    def config(self) -> dict[str, Any]:
        raise ConversionError(f"{self.name} of adapters has no config; make it a plain LoRA with as_lora")

    def for_site(self: BlendType, site: Site) -> BlendType:
        places = tuple((site.path,) if site.path in own else () for own in self.places)
        members = zip(self.members, places, strict=True)
        resolved = tuple(member.for_site(site) if here else member for member, here in members)
        return dataclasses.replace(self, members=resolved, places=places)

    def parts(self, factors: FactorDict) -> list[tuple[Method, Array, FactorDict]]:
        """Of one site: each member that changes it, its weight, and its own tensors."""
        found = []
        for place, (member, here) in enumerate(zip(self.members, self.places, strict=True)):
            if here:
                own = {name.removeprefix(f"{place}."): leaf for name, leaf in factors.items() if _of(name, place)}
                found.append((member, factors["w"][place], own))
        return found

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        change = x @ self.delta(kernel.astype(jnp.float32), factors).astype(y.dtype)
        shift = self.shift(factors)
        return change if shift is None else change + shift.astype(y.dtype)

    def delta(self, kernel: Array, factors: FactorDict) -> Array:
        return self.blend([(weight, member.delta(kernel, own)) for member, weight, own in self.parts(factors)], factors)

    def shift(self, factors: FactorDict) -> Array | None:
        shifts = [(weight, member.shift(own)) for member, weight, own in self.parts(factors)]
        moved = [(weight, shift) for weight, shift in shifts if shift is not None]
        return self.blend(moved, factors) if moved else None


def blended(
    blend: Blend,
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    base: Tree | None = None,
    key: PRNGKeyArray | None = None,
) -> Adapter:
    """One adapter whose change is a blend of others'.

    Args:
      blend: without members yet.
      adapters: of one base; their methods, sites and ranks may differ.
      weights: one for each; may be traced.
      base: the parameters; needed where an adapter trains some of them whole, whose change is then `whole - base`.
      key: for a blend that draws; each layer of each site draws on its own.

    Raises:
      ConfigError: there are no adapters, the numbers of weights and adapters differ, a weight is not finite, or `base`
        is missing.
      TargetError: the adapters are of different models: a site has other shapes, or the base lacks a parameter.
    """
    adapters = list(adapters)
    if not adapters:
        raise ConfigError(f"{blend.name}: there are no adapters")
    if len(weights) != len(adapters):
        raise ConfigError(f"{blend.name}: {len(weights)} weights for {len(adapters)} adapters; each needs one")
    for place, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        expect(f"{blend.name}(adapters, …)", f"adapter {place}", adapter, Adapter)
        if isinstance(weight, int | float) and not math.isfinite(weight):
            raise ConfigError(f"{blend.name}: the weight of adapter {place} is {weight}; it must be a finite number")
    sites: dict[str, Site] = {}
    for place, adapter in enumerate(adapters):
        for site in adapter.sites:
            if sites.setdefault(site.path, site) != site:
                raise TargetError(f"adapter {place} has another shape at {site.path}: they are of different models")
    method = dataclasses.replace(
        blend,
        targets=(),
        members=tuple(adapter.method for adapter in adapters),
        places=tuple(tuple(site.path for site in adapter.sites) for adapter in adapters),
    )
    trees = {
        kind: {"sites": _renamed(adapters, kind), "shared": _renamed_shared(adapters, kind)}
        for kind in ("trainable", "frozen")
    }
    trees["frozen"]["shared"]["w"] = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    if key is not None:
        for path, site in sites.items():
            trees["frozen"]["sites"].setdefault(path, {})[WORDS] = words(key, path, site.stack)
    whole = _whole(method, adapters, weights, base, key)
    return Adapter(trees["trainable"] | {"full": whole}, trees["frozen"], method, tuple(sites.values()))


def words(key: PRNGKeyArray, path: str, stack: tuple[int, ...] = ()) -> Array:
    """What each layer at a path draws from, `(*stack, 2)`; `drawing_key` makes a key of two words again."""
    return jax.random.bits(site_key(key, path), (*stack, 2), jnp.uint32)


def drawing_key(pair: Array) -> PRNGKeyArray:
    """The key of two words."""
    return jax.random.wrap_key_data(pair, impl="threefry2x32")


def _of(name: str, place: int) -> bool:
    return name.startswith(f"{place}.")


def _renamed(adapters: Sequence[Adapter], kind: str) -> dict[str, FactorDict]:
    """Tensors of sites, under their member's number."""
    found: dict[str, FactorDict] = {}
    for place, adapter in enumerate(adapters):
        for path, leaves in getattr(adapter, kind)["sites"].items():
            found.setdefault(path, {}).update({f"{place}.{name}": leaf for name, leaf in leaves.items()})
    return found


def _renamed_shared(adapters: Sequence[Adapter], kind: str) -> FactorDict:
    """The same of shared ones; the role that a name may begin with stays in front."""
    found = {}
    for place, adapter in enumerate(adapters):
        for key, leaf in getattr(adapter, kind)["shared"].items():
            role, slash, name = key.rpartition("/")
            found[f"{role}{slash}{place}.{name}"] = leaf
    return found


def _whole(
    method: Blend,
    adapters: Sequence[Adapter],
    weights: Sequence[Weight],
    base: Tree | None,
    key: PRNGKeyArray | None,
) -> FactorDict:
    """What the adapters train whole: base + the blend of wholeᵢ - base."""
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.trainable["full"])
    if paths and base is None:
        raise ConfigError(f"{next(iter(paths))} is trained whole: its change is to the base, give base=")
    leaves, found = flatten(base) if paths else {}, {}
    for path in paths:
        if path not in leaves:
            raise TargetError(f"an adapter trains {path} whole, which this base does not have")
        stored: Any = leaves[path]
        start = stored.astype(jnp.float32)
        changes = [
            (jnp.asarray(weight, jnp.float32), adapter.trainable["full"][path] - start)
            for adapter, weight in zip(adapters, weights, strict=True)
            if path in adapter.trainable["full"]
        ]
        found[path] = start + method.blend(changes, {} if key is None else {WORDS: words(key, path)})
    return found
