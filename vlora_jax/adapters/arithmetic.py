"""Arithmetic of adapters as changes of one base: add, scale, negate, average, interpolate; of every method, also mixed.

Changes are what is added up, not parameters: the average of two LoRAs is the mean of their ΔW, which is not the
product of the mean of A with the mean of B. A sum is an adapter like any other, exact, that keeps its parts: it is
bound, merged, inspected and trained further as they are, and `as_lora` makes one plain LoRA of it.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import ConfigError, ConversionError, TargetError, expect

Weight = float | int | Array


@dataclass(frozen=True, kw_only=True)
class WeightedSum(Method):
    """ΔW = Σ wᵢ·ΔWᵢ over the changes of other adapters, of any methods; what `add` and its relatives return.

    Tensors of member i are those it has alone, under `i.name`; the weights w `(members,)` are frozen. Members that
    depend on the input add up as well, but cannot be merged. What methods do beside their change (penalties, schedules,
    dropout) is not carried over: further training is plain descent on the members' tensors.

    Attributes:
      members: the methods.
      places: the paths of the sites that each of them changes.
    """

    name: ClassVar[str] = "weighted_sum"
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = "Σ wᵢ·ΔWᵢ"
    trains: ClassVar[str] = "what its members train"
    vertical: ClassVar[bool] = False

    members: tuple[Method, ...] = ()
    places: tuple[tuple[str, ...], ...] = ()

    @property
    def mergeable(self) -> bool:  # type: ignore[override]
        """Whether all members can be merged."""
        return all(member.mergeable for member in self.members)

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        raise ConfigError(f"{self.name} does not start by itself: it is made of adapters, by add, average and the like")

    def config(self) -> dict[str, Any]:
        raise ConversionError("a sum of adapters has no config; make it a plain LoRA with as_lora")

    def for_site(self, site: Site) -> "WeightedSum":
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
        changes = [(weight, member.forward(x, y, kernel, own)) for member, weight, own in self.parts(factors)]
        return functools.reduce(jnp.add, [weight.astype(change.dtype) * change for weight, change in changes])

    def delta(self, kernel: Array, factors: FactorDict) -> Array:
        deltas = [weight * member.delta(kernel, own) for member, weight, own in self.parts(factors)]
        return functools.reduce(jnp.add, deltas)

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array] | None:
        found = [(weight, member.low_rank(shape, own)) for member, weight, own in self.parts(factors)]
        pairs = [(pair[0], weight * pair[1]) for weight, pair in found if pair is not None]
        if len(pairs) < len(found):
            return None
        return jnp.concatenate([left for left, _ in pairs], axis=1), jnp.concatenate([right for _, right in pairs])

    def shift(self, factors: FactorDict) -> Array | None:
        shifts = [(weight, member.shift(own)) for member, weight, own in self.parts(factors)]
        moved = [weight * shift for weight, shift in shifts if shift is not None]
        return functools.reduce(jnp.add, moved) if moved else None


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[Weight], base: Tree | None = None) -> Adapter:
    """One adapter whose change is Σ wᵢ·ΔWᵢ.

    Args:
      adapters: of one base; their methods, sites and ranks may differ.
      weights: one for each; may be traced, so that they can be searched in one program.
      base: the parameters; needed where an adapter trains some of them whole, whose change is then `whole - base`.

    Raises:
      ConfigError: there are no adapters, the numbers of weights and adapters differ, a weight is not finite, or `base`
        is missing.
      TargetError: the adapters are of different models: a site has other shapes, or the base lacks a parameter.

    >>> import jax
    >>> from vlora_jax import LoRA, init, merge, split
    >>> from flax import nnx
    >>> _, base = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> one = init(LoRA(rank=2, start="kaiming_both"), jax.random.key(0), base)
    >>> bool(jnp.allclose(merge(base, add(one, negate(one)))["kernel"][...], base["kernel"][...]))
    True
    """
    adapters = list(adapters)
    if not adapters:
        raise ConfigError("there are no adapters to add up")
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(weights)} weights for {len(adapters)} adapters; each needs one")
    for place, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        expect("weighted_sum(adapters, weights, base)", f"adapter {place}", adapter, Adapter)
        if isinstance(weight, int | float) and not math.isfinite(weight):
            raise ConfigError(f"the weight of adapter {place} is {weight}; it must be a finite number")
    sites: dict[str, Site] = {}
    for place, adapter in enumerate(adapters):
        for site in adapter.sites:
            if sites.setdefault(site.path, site) != site:
                raise TargetError(f"adapter {place} has another shape at {site.path}: they are of different models")
    method = WeightedSum(
        targets=(),
        members=tuple(adapter.method for adapter in adapters),
        places=tuple(tuple(site.path for site in adapter.sites) for adapter in adapters),
    )
    trees = {
        kind: {"sites": _renamed(adapters, kind), "shared": _renamed_shared(adapters, kind)}
        for kind in ("trainable", "frozen")
    }
    trees["frozen"]["shared"]["w"] = jnp.stack([jnp.asarray(weight, jnp.float32) for weight in weights])
    whole = _whole(adapters, weights, base)
    return Adapter(trees["trainable"] | {"full": whole}, trees["frozen"], method, tuple(sites.values()))


def add(*adapters: Adapter, base: Tree | None = None) -> Adapter:
    """All changes together: Σ ΔWᵢ. See `weighted_sum`."""
    return weighted_sum(adapters, [1.0] * len(adapters), base)


def scale(adapter: Adapter, by: Weight, base: Tree | None = None) -> Adapter:
    """A change made larger or smaller: `by`·ΔW. See `weighted_sum`."""
    return weighted_sum([adapter], [by], base)


def negate(adapter: Adapter, base: Tree | None = None) -> Adapter:
    """The opposite change, -ΔW, as task arithmetic takes a skill away (arXiv 2212.04089). See `weighted_sum`."""
    return scale(adapter, -1.0, base)


def average(*adapters: Adapter, base: Tree | None = None) -> Adapter:
    """The mean change. See `weighted_sum`."""
    return weighted_sum(adapters, [1 / max(len(adapters), 1)] * len(adapters), base)


def interpolate(one: Adapter, other: Adapter, share: Weight, base: Tree | None = None) -> Adapter:
    """`(1 - share)·ΔW₁ + share·ΔW₂`: the first at 0, the second at 1, beyond them outside. See `weighted_sum`."""
    return weighted_sum([one, other], [1 - share, share], base)


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


def _whole(adapters: Sequence[Adapter], weights: Sequence[Weight], base: Tree | None) -> FactorDict:
    """What the adapters train whole: base + Σ wᵢ·(wholeᵢ - base)."""
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.trainable["full"])
    if paths and base is None:
        raise ConfigError(f"{next(iter(paths))} is trained whole: its change is to the base, give base=")
    leaves, found = flatten(base) if paths else {}, {}
    for path in paths:
        if path not in leaves:
            raise TargetError(f"an adapter trains {path} whole, which this base does not have")
        stored: Any = leaves[path]
        start = stored.astype(jnp.float32)
        for adapter, weight in zip(adapters, weights, strict=True):
            if path in adapter.trainable["full"]:
                found[path] = found.get(path, start) + weight * (adapter.trainable["full"][path] - start)
    return found
