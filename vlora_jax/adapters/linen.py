"""The same adapters on any Flax Linen model, also inside `nn.scan`, `nn.remat` and `nn.vmap`.

An interceptor adds the adapter's change after each adapted layer's call. The tensors travel inside the
`params` collection at the layer's own path: a collection of their own would silently be left behind by an
`nn.scan` that does not list it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict, whole_values
from vlora_jax.adapters.method import Method, site_key
from vlora_jax.adapters.sites import Layout, Site, einsum_layout
from vlora_jax.adapters.trees import flatten, replace_leaves
from vlora_jax.adapters.view import View, dense_view, einsum_view, lookup_view
from vlora_jax.errors import TargetError

PREFIX = "vlora"  # names of adapter leaves beside a kernel: vlora/<index of the adapter>/<tensor>


def layout_of(module: nn.Module, equation: str | None) -> tuple[str, Layout] | None:
    """The parameter name and layout of one of Linen's linear layers, None for any other module.

    Args:
      equation: of an einsum, from `_arguments`.
    """
    if isinstance(module, nn.Dense):
        return "kernel", Layout("dense", (0,), (1,))
    if isinstance(module, nn.DenseGeneral) and not module.batch_dims:
        axes = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
        features = module.features if isinstance(module.features, Sequence) else (module.features,)
        total = len(axes) + len(features)
        return "kernel", Layout("dense", tuple(range(len(axes))), tuple(range(len(axes), total)))
    if isinstance(module, nn.Einsum):
        layout = einsum_layout(equation) if equation else None
        return ("kernel", layout) if layout else None
    if isinstance(module, nn.Embed):
        return "embedding", Layout("embed", (0,), (1,))
    return None


def find_sites(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> list[Site]:
    """Every kernel that a method could change, found by tracing the model without computing anything.

    Args:
      model: any Linen module.
      variables: what `model.init` returned, `{"params": …}`.
      args, kwargs: inputs of the model; shapes matter, values do not.

    Raises:
      TargetError: the layer axes of a kernel are not adjacent.
    """
    stored = flatten_dict(variables["params"])
    sites: dict[str, Site] = {}

    def visit(next_call: Any, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name in ("__call__", "attend"):
            found = layout_of(module, _arguments(context, call_args, call_kwargs)[1])
            if found and (*module.path, found[0]) in stored and module.has_variable("params", found[0]):
                leaf, layout = found
                path, shape = "/".join(module.path), meta.unbox(module.get_variable("params", leaf)).shape
                sites[path] = Site(path, leaf, layout.kind, (), tuple(shape), layout.inputs, layout.outputs)
        return next_call(*call_args, **call_kwargs)

    def trace(params: dict[tuple[str, ...], Any]) -> None:
        whole = {**variables, "params": unflatten_dict(params)}
        jax.eval_shape(lambda whole: model.apply(whole, *args, **kwargs), whole)

    def taken_at(axis: int, site: Site) -> bool:
        """Whether the layer axes are taken off there: a leaf that has them elsewhere cannot be traced."""
        sizes = [1 + max(site.stack)] * len(site.shape)
        probe = jax.ShapeDtypeStruct((*sizes[:axis], *site.stack, *sizes[axis:]), jnp.float32)
        try:
            trace(stored | {(*_names(site.path), f"{PREFIX}/probe"): probe})
        except ValueError:
            return False
        return True

    with nn.intercept_methods(visit):
        trace(stored)
    found = []
    for path, site in sorted(sites.items()):
        shape = tuple(meta.unbox(stored[(*_names(path), site.leaf)]).shape)
        extra = len(shape) - len(site.shape)
        axes = [axis for axis in range(len(site.shape) + 1) if shape[:axis] + shape[axis + extra :] == site.shape]
        if not axes:
            raise TargetError(
                f"{path}: stored {shape}, seen as {site.shape} in the layer; its layer axes are not adjacent"
            )
        stacked = [dataclasses.replace(site, stack=shape[axis : axis + extra], stack_axis=axis) for axis in axes]
        if extra and len(axes) > 1:  # as many layers as inputs or outputs
            stacked = [site for site in stacked if taken_at(site.stack_axis, site)]
        found.append(stacked[0])
    return found


def _names(path: str) -> tuple[str, ...]:
    return tuple(path.split("/")) if path else ()


def _arguments(context: Any, args: tuple, kwargs: dict) -> tuple[Any, str | None]:
    """The input of a layer's call and the equation of an einsum, wherever they were given."""
    names = ("query",) if context.method_name == "attend" else ("inputs", "einsum_str")
    given = dict(zip(names, args, strict=False)) | kwargs
    return given.get(names[0]), getattr(context.module, "einsum_str", None) or given.get("einsum_str")


def apply(
    model: nn.Module,
    variables: Mapping[str, Any],
    adapters: Adapter | Sequence[Adapter] | None,
    *args: Any,
    key: PRNGKeyArray | None = None,
    **kwargs: Any,
) -> Any:
    """`model.apply(variables, *args, **kwargs)` with adapters: a pure function of its arguments.

    Args:
      adapters: one, several (their changes add up) or None, from `init(method, key, params, sites=find_sites(…))`.
      key: switches the methods' dropout on.

    Raises:
      TargetError: a site of an adapter was not called, so that its tensors would have no effect, or the model lacks
        a parameter that an adapter trains whole.
      ConfigError: two adapters train the same parameter whole.
    """
    several = () if adapters is None else (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    whole = whole_values(several, flatten(variables["params"]))
    params: dict[tuple, Any] = dict(flatten_dict(replace_leaves(variables["params"], whole)))
    expected: dict[str, list[tuple[int, Method, Site, FactorDict]]] = {}
    for index, adapter in enumerate(several):
        for site in adapter.sites:
            method, factors = adapter.method.for_site(site), adapter.factors(site.path)
            if key is not None and getattr(method, "dropout", 0.0) > 0:
                keys = jax.random.split(site_key(jax.random.fold_in(key, index), site.path), site.stack)
                factors["dropout"] = jax.random.key_data(keys)  # words, not keys: a layer axis may come second
            for name, value in factors.items():
                stack = tuple(range(len(site.stack)))
                moved = jnp.moveaxis(value, stack, tuple(site.stack_axis + axis for axis in stack))
                params[(*_names(site.path), f"{PREFIX}/{index}/{name}")] = moved
            expected.setdefault(site.path, []).append((index, method, site, adapter.shared_at(site.path)))
    called: set[str] = set()

    def intercept(next_call: Any, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        y = next_call(*call_args, **call_kwargs)
        parts = expected.get("/".join(context.module.path))
        if parts and context.method_name in ("__call__", "attend"):
            called.add(parts[0][2].path)
            x, equation = _arguments(context, call_args, call_kwargs)
            y = y + _change(context, parts, x, y, equation).astype(y.dtype)
        return y

    with nn.intercept_methods(intercept):
        result = model.apply({**variables, "params": unflatten_dict(params)}, *args, **kwargs)
    silent = sorted(set(expected) - called)
    if silent:
        raise TargetError(f"{silent[0]} was not called, so its adapter has no effect; {len(silent)} such sites")
    return result


def _change(context: Any, parts: list, x: Array, y: Array, equation: str | None) -> Array:
    module, site = context.module, parts[0][2]
    kernel = site.matrix(meta.unbox(module.get_variable("params", site.leaf)))
    prefixed = {k: v for k, v in module.variables["params"].items() if k.startswith(PREFIX)}
    change: Array | float = 0.0
    for index, method, _, shared in parts:
        start = f"{PREFIX}/{index}/"
        factors = {k.removeprefix(start): v for k, v in prefixed.items() if k.startswith(start)} | shared
        mask = factors.pop("dropout", None)
        if context.method_name == "attend":
            change += x @ method.delta(kernel, factors).astype(y.dtype).T
            continue
        view = _view_of(module, site, x, y, equation)
        if mask is not None:
            read = kernel if method.reads_output else None
            view = view.dropped(method.dropout, jax.random.wrap_key_data(mask), read)
        change += view.restore(method.forward(view.x, view.y, kernel, factors))
    return jnp.asarray(change)


def _view_of(module: nn.Module, site: Site, x: Array, y: Array, equation: str | None) -> View:
    bias = module.get_variable("params", "bias") if module.has_variable("params", "bias") else None
    if isinstance(module, nn.Embed):
        return lookup_view(site, x, y)
    if isinstance(module, nn.Einsum):
        return einsum_view(site, x, y, equation or "", meta.unbox(bias))
    axes = getattr(module, "axis", -1)
    return dense_view(site, x, y, tuple(axes) if isinstance(axes, Sequence) else (axes,), meta.unbox(bias))
