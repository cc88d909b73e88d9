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

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Method, site_key
from vlora_jax.adapters.sites import Layout, Site, einsum_layout
from vlora_jax.adapters.view import Lookup, View, dense_view, dropout, einsum_view, lookup_view
from vlora_jax.errors import TargetError

PREFIX = "vlora"  # names of adapter leaves beside a kernel: vlora/<index of the adapter>/<tensor>


def layout_of(module: nn.Module, args: tuple) -> tuple[str, Layout] | None:
    """The parameter name and layout of one of Linen's linear layers, None for any other module."""
    if isinstance(module, nn.Dense):
        return "kernel", Layout("dense", (0,), (1,))
    if isinstance(module, nn.DenseGeneral) and not module.batch_dims:
        axes = module.axis if isinstance(module.axis, Sequence) else (module.axis,)
        features = module.features if isinstance(module.features, Sequence) else (module.features,)
        total = len(axes) + len(features)
        return "kernel", Layout("dense", tuple(range(len(axes))), tuple(range(len(axes), total)))
    if isinstance(module, nn.Einsum):
        equation = module.einsum_str or (args[1] if len(args) > 1 else None)
        layout = einsum_layout(equation) if equation else None
        return ("kernel", layout) if layout else None
    if isinstance(module, nn.Embed):
        return "embedding", Layout("embed", (0,), (1,))
    return None


def find_sites(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> list[Site]:
    """Every kernel that a method could change, found by tracing the model once without computing anything.

    Args:
      model: any Linen module.
      variables: what `model.init` returned, `{"params": …}`.
      args, kwargs: inputs of the model; shapes matter, values do not.
    """
    stored = flatten_dict(meta.unbox(variables["params"]))
    sites: dict[str, Site] = {}

    def visit(next_call: Any, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        module = context.module
        found = layout_of(module, call_args) if context.method_name in ("__call__", "attend") else None
        if found and (*module.path, found[0]) in stored and module.has_variable("params", found[0]):
            leaf, layout = found
            shape = tuple(meta.unbox(module.get_variable("params", leaf)).shape)
            stack, axis = _stack(tuple(stored[(*module.path, leaf)].shape), shape, "/".join(module.path))
            path = "/".join(module.path)
            sites[path] = Site(path, leaf, layout.kind, stack, shape, layout.inputs, layout.outputs, axis)
        return next_call(*call_args, **call_kwargs)

    with nn.intercept_methods(visit):
        jax.eval_shape(lambda variables: model.apply(variables, *args, **kwargs), dict(variables))
    return [sites[path] for path in sorted(sites)]


def _stack(stored: tuple[int, ...], layer: tuple[int, ...], path: str) -> tuple[tuple[int, ...], int]:
    """Sizes and place of the layer axes that a lifted transform took off a stored kernel."""
    extra = len(stored) - len(layer)
    for axis in range(len(layer) + 1):
        if stored[:axis] + stored[axis + extra :] == layer:
            return stored[axis : axis + extra], axis
    raise TargetError(f"{path}: stored {stored}, seen as {layer} in the layer; its layer axes are not adjacent")


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
      TargetError: a site of an adapter was not called, so that its tensors would have no effect.
    """
    several = () if adapters is None else (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    params = flatten_dict(variables["params"])
    expected: dict[str, list[tuple[int, Method, Site, FactorDict]]] = {}
    for index, adapter in enumerate(several):
        for path, value in adapter.trainable["full"].items():
            whole = tuple(path.split("/"))
            params[whole] = meta.replace_boxed(params[whole], value.astype(meta.unbox(params[whole]).dtype))
        for site in adapter.sites:
            method, factors = adapter.method.for_site(site), adapter.factors(site.path)
            if key is not None and getattr(method, "dropout", 0.0) > 0:
                keys = jax.random.split(site_key(jax.random.fold_in(key, index), site.path), site.stack)
                factors["dropout"] = jax.random.key_data(keys)  # words, not keys: a layer axis may come second
            for name, value in factors.items():
                stack = tuple(range(len(site.stack)))
                moved = jnp.moveaxis(value, stack, tuple(site.stack_axis + axis for axis in stack))
                params[(*site.path.split("/"), f"{PREFIX}/{index}/{name}")] = moved
            expected.setdefault(site.path, []).append((index, method, site, adapter.shared))
    called: set[str] = set()

    def intercept(next_call: Any, call_args: tuple, call_kwargs: dict, context: Any) -> Any:
        y = next_call(*call_args, **call_kwargs)
        parts = expected.get("/".join(context.module.path))
        if parts and context.method_name in ("__call__", "attend"):
            called.add(parts[0][2].path)
            y = y + _change(context.module, context.method_name, parts, y, call_args).astype(y.dtype)
        return y

    with nn.intercept_methods(intercept):
        result = model.apply({**variables, "params": unflatten_dict(params)}, *args, **kwargs)
    silent = sorted(set(expected) - called)
    if silent:
        raise TargetError(f"{silent[0]} was not called, so its adapter has no effect; {len(silent)} such sites")
    return result


def _change(module: nn.Module, method_name: str, parts: list, y: Array, args: tuple) -> Array:
    x, site = args[0], parts[0][2]
    kernel = site.matrix(meta.unbox(module.get_variable("params", site.leaf)))
    prefixed = {k: v for k, v in module.variables["params"].items() if k.startswith(PREFIX)}
    change: Array | float = 0.0
    for index, method, _, shared in parts:
        start = f"{PREFIX}/{index}/"
        factors = {k.removeprefix(start): v for k, v in prefixed.items() if k.startswith(start)} | shared
        mask = factors.pop("dropout", None)
        if method_name == "attend":
            change += x @ method.delta(kernel, factors).astype(y.dtype).T
            continue
        view = _view_of(module, site, y, args)
        if mask is not None and not isinstance(view.x, Lookup):
            view = dataclasses.replace(view, x=dropout(view.x, method.dropout, jax.random.wrap_key_data(mask)))
        change += view.restore(method.forward(view.x, view.y, kernel, factors))
    return jnp.asarray(change)


def _view_of(module: nn.Module, site: Site, y: Array, args: tuple) -> View:
    x = args[0]
    bias = module.get_variable("params", "bias") if module.has_variable("params", "bias") else None
    if isinstance(module, nn.Embed):
        return lookup_view(site, x, y)
    if isinstance(module, nn.Einsum):
        return einsum_view(site, x, y, module.einsum_str or args[1], meta.unbox(bias))
    axes = getattr(module, "axis", -1)
    return dense_view(site, x, y, tuple(axes) if isinstance(axes, Sequence) else (axes,), meta.unbox(bias))
