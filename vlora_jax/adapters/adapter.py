"""An adapter: one registered pytree of trainable and frozen tensors, with its method as static metadata."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vlora_jax.adapters.quantized import is_quantized
from vlora_jax.adapters.sites import Site, role
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError, TargetError

FactorDict = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Adapter:
    """Tensors of one method on one model.

    Attributes:
      trainable: `{"sites": {path: {name: array}}, "shared": {name: array}, "full": {leaf path: array}}`. Arrays
        of a site carry its layer axes first; shared ones have none: a name belongs to all sites, `role/name` to
        the sites of one role (see `vlora_jax.adapters.sites.role`). `full` holds base parameters trained whole.
      frozen: `{"sites": …, "shared": …}`, what the method needs and no gradient reaches.
      method: the `Method` it belongs to, hyper-parameters only (static).
      sites: the kernels it changes (static).
    """

    trainable: dict[str, dict[str, Any]]
    frozen: dict[str, dict[str, Any]]
    method: Any = dataclasses.field(metadata={"static": True})
    sites: tuple[Site, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        method: Any,
        sites: list[Site],
        *,
        trainable: Mapping[str, FactorDict],
        frozen: Mapping[str, FactorDict] | None = None,
        shared: FactorDict | None = None,
        frozen_shared: FactorDict | None = None,
    ) -> "Adapter":
        """An adapter from the tensors of its sites; what is left out is empty."""
        return cls(
            trainable={"sites": dict(trainable), "shared": shared or {}, "full": {}},
            frozen={"sites": {k: v for k, v in (frozen or {}).items() if v}, "shared": frozen_shared or {}},
            method=method,
            sites=tuple(sites),
        )

    def factors(self, path: str) -> FactorDict:
        """Tensors of one site, trainable and frozen together, by name."""
        return self.trainable["sites"].get(path, {}) | self.frozen["sites"].get(path, {})

    @property
    def shared(self) -> FactorDict:
        """Tensors that sites share, trainable and frozen together, by name or `role/name`."""
        return self.trainable["shared"] | self.frozen["shared"]

    def shared_at(self, path: str) -> FactorDict:
        """Shared tensors that one site uses, by name: those of all sites, and those of its role."""
        of_site = {}
        for key, value in self.shared.items():
            owner, _, name = key.rpartition("/")
            if owner in ("", role(path)):
                of_site[name] = value
        return of_site

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        """How notebooks show it (treescope calls this): a line that sums it up, method, tensors, sites in short."""
        from treescope import rendering_parts as parts

        sizes = {site.path: f"{site.kind} {'×'.join(map(str, (*site.stack, *site.shape)))}" for site in self.sites}
        shown = {"method": self.method, "trainable": self.trainable, "frozen": self.frozen, "sites": sizes}
        inside = lambda name: None if path is None else f"{path}.{name}"
        told = f"  # {self.method.formula}; {count(self):,} numbers at {sum(s.layers for s in self.sites):,} kernels"
        return parts.build_foldable_tree_node_from_children(
            prefix=parts.siblings(parts.maybe_qualified_type_name(type(self)), "("),
            children=[
                parts.siblings_with_annotations(f"{name}=", subtree_renderer(part, path=inside(name)))
                for name, part in shown.items()
            ],
            suffix=")",
            comma_separated=True,
            path=path,
            first_line_annotation=parts.comment_color(parts.text(told)),
            expand_state=parts.ExpandState.EXPANDED,
        )

    def with_trainable(self, trainable: dict[str, dict[str, Any]]) -> "Adapter":
        """This adapter with other trainable tensors: what a loss differentiates."""
        return dataclasses.replace(self, trainable=trainable)


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """Adapters of one method on the same sites as one, with an axis of adapters in front of every tensor.

    `bind(…, rows=…)` then gives each row of a batch its own; `jax.vmap` over the stack trains or applies all.

    Raises:
      ConfigError: their methods, sites or shapes differ, or there are none.
    """
    if not adapters:
        raise ConfigError("there are no adapters to stack")
    first = adapters[0]
    alike = [first]
    for place, other in enumerate(adapters[1:], 1):
        strange = sorted(site.path for site in set(other.sites) ^ set(first.sites))
        if strange:
            raise ConfigError(f"adapters 0 and {place} differ in their sites, as at {strange[0]}; only equals stack")
        for site in first.sites:
            mine, theirs = (forward_fields(each.method.for_site(site)) for each in (first, other))
            names = [name for name in mine if mine[name] != theirs.get(name)]
            odd = ", ".join(f"{name} {mine[name]!r} and {theirs.get(name)!r}" for name in names)
            if odd:
                where = f"in their method at {site.path}"
                raise ConfigError(f"adapters 0 and {place} differ {where}: {odd}; only equal ones stack")
        other = dataclasses.replace(other, method=first.method, sites=first.sites)
        shapes = [jax.tree.map(lambda leaf: leaf.shape, (a.trainable, a.frozen)) for a in (first, other)]
        if shapes[0] != shapes[1]:
            raise ConfigError(f"adapters 0 and {place} have tensors of other shapes; only equal ones can be stacked")
        alike.append(other)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *alike)


def forward_fields(method: Any) -> dict[str, Any]:
    """What of a method's options decides how its tensors are applied, not where it was put or how it was trained."""
    names = [each.name for each in dataclasses.fields(method) if each.name not in method.aside]
    return {"method": method.name} | {name: getattr(method, name) for name in names}


def is_adapter(node: Any) -> bool:
    return isinstance(node, Adapter)


def whole_values(adapters: Sequence[Adapter], leaves: Mapping[str, Array]) -> FactorDict:
    """What adapters train whole, by leaf path, in the dtypes of a model's `leaves`.

    Raises:
      TargetError: the model does not have such a leaf.
      ConfigError: two adapters train the same one.
    """
    whole: FactorDict = {}
    for adapter in adapters:
        for path, value in adapter.trainable["full"].items():
            if path in whole:
                raise ConfigError(f"two adapters train {path} whole; only one of them can be used")
            if path not in leaves:
                raise TargetError(f"the adapter trains {path} whole, which this model does not have")
            whole[path] = value.astype(leaves[path].dtype)
    return whole


def trainable_mask(tree: Tree) -> Tree:
    """True at every trainable leaf of the adapters in `tree`, False elsewhere: a mask for optax.

    For people who keep one tree, `{"base": base, "adapter": adapter}`, and freeze in the optimiser:
    `optax.selective_transform(optax.adam(1e-3), freeze_mask=jax.tree.map(operator.not_, trainable_mask(tree)))`.
    The step of this library differentiates only what trains instead; the result is the same.
    """

    def mask(node: Any) -> Any:
        if not is_adapter(node):
            return False
        every = lambda value, part: jax.tree.map(lambda _: value, part)
        return dataclasses.replace(node, trainable=every(True, node.trainable), frozen=every(False, node.frozen))

    return jax.tree.map(mask, tree, is_leaf=is_adapter)


def partition(tree: Tree) -> tuple[Tree, Tree]:
    """`tree` as two trees of its structure: trainable leaves of adapters, and the rest; None marks a hole.

    >>> adapter = Adapter({"full": {"w": 1.0}}, {"shared": {"c": 2.0}}, None, ())
    >>> trainable, rest = partition(adapter)
    >>> trainable.trainable, trainable.frozen
    ({'full': {'w': 1.0}}, {'shared': {'c': None}})
    >>> combine(trainable, rest) == adapter
    True
    """
    mask = trainable_mask(tree)
    trainable = jax.tree.map(lambda trains, leaf: leaf if trains else None, mask, tree)
    rest = jax.tree.map(lambda trains, leaf: None if trains else leaf, mask, tree)
    return trainable, rest


def combine(*trees: Tree) -> Tree:
    """The inverse of `partition`: at each leaf, the first tree that has one."""
    first = lambda *leaves: next((leaf for leaf in leaves if leaf is not None), None)
    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)


def count(tree: Tree) -> int:
    """Numbers in a pytree; of an adapter, the trainable ones."""
    leaves = jax.tree.leaves(tree.trainable if is_adapter(tree) else tree, is_leaf=is_quantized)
    return sum(math.prod(leaf.shape) for leaf in leaves)
