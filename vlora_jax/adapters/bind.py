"""Attach adapters to a Flax NNX model while tracing; the model's code knows nothing of them.

`bind` wraps each adapted layer in an `Adapted` module whose tensors carry the layer axes of the kernel they
belong to. A model that scans over its stacked layers therefore slices them together with its own parameters.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict, whole_values
from vlora_jax.adapters.kept import keep
from vlora_jax.adapters.method import LowRank, Method, site_key
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree, flatten, replace_leaves
from vlora_jax.adapters.view import Lookup, View, dense_view, einsum_view, lookup_view, thin
from vlora_jax.errors import ConfigError, TargetError, expect


class Shared:
    """Tensors that all layers use alike: no part of a module's state, so that any scan over layers closes over them."""

    def __init__(self, tensors: FactorDict):
        self.tensors = tensors


class Rows:
    """Which of several stacked adapters each row of a batch uses, `(batch,)`; -1 for none."""

    def __init__(self, index: Array):
        self.index = index

    def of(self, factors: FactorDict) -> FactorDict:
        """Factors `(adapters, …)` as `(batch, …)`."""
        return jax.tree.map(lambda leaf: leaf[jnp.maximum(self.index, 0)], factors)

    def apply(self, function: Callable[..., Array], factors: FactorDict, x: Array | Lookup, y: Array) -> Array:
        """`function(x, y, factors)` of each row with its own factors; x and y are `(batch · length, …)`."""
        split = lambda a: a.reshape(self.index.shape[0], -1, *a.shape[1:])

        def one(x: Array, y: Array, factors: FactorDict, index: Array) -> Array:
            change = function(Lookup(x, lookup.dtype) if lookup else x, y, factors)
            return jnp.where(index >= 0, change, 0).astype(change.dtype)

        lookup = x if isinstance(x, Lookup) else None
        change = jax.vmap(one)(split(x.ids if isinstance(x, Lookup) else x), split(y), self.of(factors), self.index)
        return change.reshape(-1, *change.shape[2:])


class Adapted(nnx.Module):
    """A linear layer with adapters on it; exists only inside a trace."""

    def __init__(self, inner: Any, site: Site, parts: Sequence["Part"]):
        self.inner = inner
        self.site = site
        self.methods = tuple(part.method for part in parts)
        self.factors = nnx.data([{k: nnx.Param(v) for k, v in part.factors.items()} for part in parts])
        self.shared = tuple(Shared(part.shared) for part in parts)
        self.rows = tuple(part.rows for part in parts)
        self.keys = nnx.data([None if part.key is None else nnx.Param(part.key) for part in parts])

    def __call__(self, inputs: Array, *args: Any, **kwargs: Any) -> Array:  # Flax's own name, for calls by keyword
        site, axes = self.site, contracted_axes(innermost(self))
        if axes and sorted(axes) == list(range(-len(axes), 0)):  # flat products are the fast ones, above all on CPU
            lead = inputs.shape[: inputs.ndim - len(axes)]
            y = self.inner(inputs.reshape(-1, *site.in_shape), *args, **kwargs).reshape(*lead, *site.out_shape)
        else:
            y = self.inner(inputs, *args, **kwargs)
        return self.add(inputs, y, {})

    def add(self, x: Array, y: Array, products: dict[int, Array]) -> Array:
        """`y` of the layer below, with this module's adapters added.

        Args:
          products: `x @ down` of the adapters for which it is known already, by their place in `methods`.
        """
        view = self._view(x, y)
        changes = [self._change(index, view, products.get(index)) for index in range(len(self.methods))]
        change = functools.reduce(jnp.add, changes)
        out = y + view.restore(change).astype(y.dtype)
        return out if any(method.reads_output for method in self.methods) else keep(out)

    def _view(self, x: Array, y: Array) -> View:
        layer = innermost(self)
        bias = getattr(layer, "bias", None)
        bias = None if bias is None else bias.get_value()
        if isinstance(layer, nnx.Embed):
            return lookup_view(self.site, x, y)
        if isinstance(layer, nnx.Einsum):
            return einsum_view(self.site, x, y, layer.einsum_str or "", bias)
        return dense_view(self.site, x, y, contracted_axes(layer), bias)

    def _change(self, index: int, view: View, product: Array | None) -> Array:
        method: Any = self.methods[index]
        factors, kernel = self.part(index), self._kernel()
        if product is not None and isinstance(method, LowRank):
            return method.up(product, view.x, view.y, kernel, factors)
        key, rows = self.keys[index], self.rows[index]
        if key is not None:
            view = view.dropped(method.dropout, key.get_value(), kernel if method.reads_output else None)
        if rows is not None:
            return rows.apply(lambda x, y, factors: method.forward(x, y, kernel, factors), factors, view.x, view.y)
        return method.forward(view.x, view.y, kernel, factors)

    def part(self, index: int) -> FactorDict:
        """Tensors of one adapter at this site, its own and the shared ones."""
        own = {name: variable.get_value() for name, variable in self.factors[index].items()}
        return self.shared[index].tensors | own

    def together(self, x: Array, modules: Sequence[Callable]) -> tuple[Array, ...]:
        """See `together`; models reach it through any module that has this method."""
        return together(x, modules)

    def attend(self, query: Array) -> Array:
        """An embedding used as output head; where ΔW is no thin product, it is built, `(vocabulary, features)`."""
        out = self.inner.attend(query)
        for index in range(len(self.methods)):
            rows, factors = self.rows[index], self.part(index)
            if rows is None:
                out = out + self._attended(index, query, factors)
            else:
                flat, bare = query.reshape(-1, query.shape[-1]), out.reshape(-1, out.shape[-1])
                change = rows.apply(lambda x, _, own: self._attended(index, x, own), factors, flat, bare)  # noqa: B023
                out = out + change.reshape(out.shape)
        return out

    def _attended(self, index: int, query: Array, factors: FactorDict) -> Array:
        """`query @ ΔWᵀ` of one adapter."""
        thin_factors = self.methods[index].low_rank((self.site.in_dim, self.site.out_dim), factors)
        if thin_factors is None:
            return query @ self.methods[index].delta(self._kernel(), factors).astype(query.dtype).T
        left, right = (each.astype(query.dtype) for each in thin_factors)
        return (query @ right.T) @ left.T

    def _kernel(self) -> Array:
        return self.site.matrix(getattr(self.inner, self.site.leaf).get_value())

    def _delta(self) -> Array:
        if any(rows is not None for rows in self.rows):
            raise ConfigError(f"{self.site.path}: the model reads its kernel itself, which rows can't have one each of")
        kernel = self._kernel()
        return functools.reduce(jnp.add, (method.delta(kernel, self.part(i)) for i, method in enumerate(self.methods)))

    def _merged(self) -> nnx.Param:
        kernel = self._kernel()
        merged = kernel.astype(jnp.float32) + self._delta()
        return nnx.Param(self.site.kernel(merged).astype(kernel.dtype))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("inner", "site"):
            raise AttributeError(name)
        if name == self.site.leaf:  # a model that reads the kernel itself gets W + ΔW: right, but not factored
            return self._merged()
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Part:
    """One adapter's share of one layer: its method for that site, tensors, dropout keys or None, and rows or None.

    With rows, tensors hold several adapters: `(*stack, adapters, …)` and, shared ones, `(adapters, …)`.
    """

    method: Method
    factors: FactorDict
    shared: FactorDict
    key: Array | None = None
    rows: Rows | None = None


def innermost(module: nnx.Module) -> nnx.Module:
    """The layer below all adapters."""
    return innermost(module.inner) if isinstance(module, Adapted) else module


def contracted_axes(layer: nnx.Module) -> tuple[int, ...]:
    """The axes of its input that a dense layer contracts, counted from either end; none for other layers."""
    return tuple(getattr(layer, "axis", (-1,))) if isinstance(layer, nnx.Linear | nnx.LinearGeneral) else ()


def together(x: Array, modules: Sequence[Callable]) -> tuple[Array, ...]:
    """Dense layers applied to the same `x` `(…, in)`, their low-rank adapters sharing one product with it.

    A few wide products are faster than many thin ones, on every backend.
    """
    if not any(isinstance(module, Adapted) for module in modules):
        return tuple(module(x) for module in modules)
    below = together(x, [module.inner if isinstance(module, Adapted) else module for module in modules])
    lows = [
        (module, index, method.down(module.part(index)))
        for module in modules
        if isinstance(module, Adapted)
        for index, method in enumerate(module.methods)
        if isinstance(method, LowRank) and module.keys[index] is None and module.rows[index] is None
    ]
    products: dict[int, dict[int, Array]] = {}
    if len(lows) > 1:
        flat = x.reshape(-1, x.shape[-1]).astype(below[0].dtype)
        joint = thin(flat, jnp.concatenate([down for *_, down in lows], axis=-1))
        ends = [sum(down.shape[-1] for *_, down in lows[:stop]) for stop in range(1, len(lows))]
        for (module, index, _), product in zip(lows, jnp.split(joint, ends, axis=-1), strict=True):
            products.setdefault(id(module), {})[index] = product
    return tuple(
        module.add(x, y, products.get(id(module), {})) if isinstance(module, Adapted) else y
        for module, y in zip(modules, below, strict=True)
    )


def bind(
    graphdef: nnx.GraphDef,
    base: Tree,
    *adapters: Adapter,
    key: PRNGKeyArray | None = None,
    rows: Int[Array, "batch"] | None = None,
) -> nnx.Module:
    """A model with adapters attached; call it like the model itself, inside or outside of `jit`.

    Args:
      graphdef, base: the model, from `vlora_jax.split`.
      adapters: any number; changes at one site add up.
      key: switches the methods' dropout on; another mask for each site and layer.
      rows: the adapters come from `stack_adapters`, and each row of the batch uses the one of this index; -1 none.

    Raises:
      TargetError: an adapter has a site, or a parameter that it trains whole, that this model does not.
      ConfigError: two adapters train the same parameter whole, or rows shall differ in one.
    """
    call = "bind(graphdef, base, *adapters)"
    expect(call, "graphdef", graphdef, nnx.GraphDef)
    for adapter in adapters:
        expect(call, "each of the adapters", adapter, Adapter)
    if rows is not None and any(adapter.trainable["full"] for adapter in adapters):
        whole = next(iter(path for adapter in adapters for path in adapter.trainable["full"]))
        raise ConfigError(f"rows of a batch can't have a {whole} each; merge the adapters that train it whole")
    chosen = None if rows is None else Rows(rows)
    leaves = flatten(base)
    model = nnx.merge(graphdef, replace_leaves(base, whole_values(adapters, leaves)), copy=True)  # base stays as it is
    parts: dict[str, list[Part]] = {}
    sites: dict[str, Site] = {}
    for index, adapter in enumerate(adapters):
        for site in adapter.sites:
            if site.leaf_path not in leaves:
                raise TargetError(f"the adapter changes {site.leaf_path}, which this model does not have")
            sites[site.path] = site
            method = adapter.method.for_site(site)
            keys = None
            if key is not None and getattr(method, "dropout", 0.0) > 0:
                keys = jax.random.split(site_key(jax.random.fold_in(key, index), site.path), site.stack)
            factors = adapter.factors(site.path)
            if chosen is not None:
                behind = functools.partial(jnp.moveaxis, source=0, destination=len(site.stack))
                factors = jax.tree.map(behind, factors)
            parts.setdefault(site.path, []).append(Part(method, factors, adapter.shared_at(site.path), keys, chosen))
    return attach(model, {path: (sites[path], parts[path]) for path in parts})


def attach(model: nnx.Module, parts: dict[str, tuple[Site, list[Part]]]) -> nnx.Module:
    """Wrap the layers at the given paths, wherever the model refers to them; changes `model` and returns it.

    Below adapters that are there already: they see the kernel with this change, as if it were the base's.
    """
    wrapped: dict[int, Adapted] = {}
    for path, (site, of_site) in parts.items():
        layer = child(model, path)
        if isinstance(layer, Adapted):
            while isinstance(layer.inner, Adapted):
                layer = layer.inner
            layer.inner = Adapted(layer.inner, site, of_site)
        else:
            wrapped[id(layer)] = Adapted(layer, site, of_site)
    if id(model) in wrapped:
        return wrapped[id(model)]
    if wrapped:
        for _, node in list(nnx.iter_graph(model)):
            if isinstance(node, dict | list):
                for name, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
                    node[name] = wrapped.get(id(value), value)
            elif isinstance(node, nnx.Pytree) and not isinstance(node, Adapted):
                for name, value in list(vars(node).items()):
                    if id(value) in wrapped:
                        setattr(node, name, wrapped[id(value)])
    return model


def child(model: nnx.Module, path: str) -> Any:
    """The submodule at a path such as `"layers/0/attn/q"`."""
    node: Any = model
    for name in path.split("/") if path else ():
        node = getattr(node, name) if hasattr(node, name) else node[int(name) if name.isdigit() else name]
    return node


def apply(
    graphdef: nnx.GraphDef,
    base: Tree,
    adapters: Adapter | Sequence[Adapter] | None,
    *args: Any,
    key: PRNGKeyArray | None = None,
    **kwargs: Any,
) -> Any:
    """Call a model with adapters: a pure function of its arguments, ready for `jit`, `grad`, `vmap` and `scan`.

    Args:
      graphdef, base: the model, from `vlora_jax.split`.
      adapters: one, several (their changes add up) or None for the base alone.
      args, kwargs: what the model takes.
      key: switches the methods' dropout on.

    >>> from vlora_jax import LoRA, init, split
    >>> graphdef, base = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> adapter = init(LoRA(rank=2), jax.random.key(0), base)
    >>> apply(graphdef, base, adapter, jnp.ones((1, 4))).shape
    (1, 3)
    """
    several = () if adapters is None else (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    return bind(graphdef, base, *several, key=key)(*args, **kwargs)
