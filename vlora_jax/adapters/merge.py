"""Merge adapters into ordinary parameters; the base itself is never changed."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from vlora_jax.adapters.adapter import Adapter, whole_values
from vlora_jax.adapters.method import one_by_one, over_stack
from vlora_jax.adapters.quantized import is_quantized
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree, flatten, replace_leaves
from vlora_jax.errors import BaseMismatchError, ConversionError, expect


def site_delta(adapter: Adapter, site: Site, kernel: Array) -> Array:
    """ΔW of one site, `(*stack, in, out)` in float32.

    Args:
      kernel: the base kernel, `(*stack, in, out)`.

    Raises:
      ConversionError: the method has no ΔW.
    """
    method, shared = adapter.method.for_site(site), adapter.shared_at(site.path)
    one = lambda kernel, factors: method.delta(kernel.astype(jnp.float32), factors | shared).astype(jnp.float32)
    over = one_by_one if method.layerwise else over_stack
    return over(one, len(site.stack))(kernel, adapter.factors(site.path))


def site_shift(adapter: Adapter, site: Site) -> Array | None:
    """The change of the bias at one site, `(*stack, out)` in float32; None if its method has none."""
    method, shared = adapter.method.for_site(site), adapter.shared_at(site.path)
    first = jax.tree.map(lambda leaf: leaf[(0,) * len(site.stack)], adapter.factors(site.path))
    if method.shift(first | shared) is None:
        return None
    return over_stack(lambda factors: method.shift(factors | shared), len(site.stack))(adapter.factors(site.path))


def merge(base: Tree, *adapters: Adapter) -> Tree:
    """Ordinary parameters that compute what `base` with the adapters bound computes.

    Changes are added in float32 and cast once to the kernel's dtype. `base` stays as it is, so undoing a merge
    is using it again. A quantised base is merged by the values that its codes stand for, and no kernel is quantised
    again.

    Raises:
      ConversionError: a method depends on the input, it changes the bias of a layer that has none, or the model is
        vertical (`expand` it first).
      BaseMismatchError: the base does not have what an adapter changes.
      ConfigError: two adapters train the same parameter whole.

    >>> import jax
    >>> from flax import nnx
    >>> from vlora_jax import LoRA, init, split
    >>> graphdef, base = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> merged = merge(base, init(LoRA(rank=2), jax.random.key(0), base))
    >>> bool((merged["kernel"].get_value() == base["kernel"].get_value()).all())
    True
    """
    for adapter in adapters:
        expect("merge(base, *adapters)", "each of the adapters", adapter, Adapter)
    leaves = flatten(base)
    changed = [path for a in adapters for path in (*(site.leaf_path for site in a.sites), *a.trainable["full"])]
    missing = next((path for path in changed if path not in leaves), None)
    if missing:
        raise BaseMismatchError(f"the adapter changes {missing}, which this base does not have")
    merged = whole_values(adapters, leaves)
    merged |= {path: leaf.values() for path, leaf in leaves.items() if is_quantized(leaf) and path not in merged}
    leaves |= merged
    for path, site in {site.leaf_path: site for adapter in adapters for site in adapter.sites}.items():
        here = [(adapter, each) for adapter in adapters for each in adapter.sites if each.leaf_path == path]
        stored: Any = leaves[path]
        changes = [site_delta(adapter, each, each.read(leaves)) for adapter, each in here]
        total = functools.reduce(jnp.add, changes, site.matrix(stored).astype(jnp.float32))
        merged[path] = site.kernel(total).astype(stored.dtype)
        for adapter, site in here:
            shift = site_shift(adapter, site)
            if shift is None:
                continue
            at = f"{site.path}/bias" if site.path else "bias"
            if at not in leaves or site.stack_axis:
                raise ConversionError(
                    f"{adapter.method.name} changes the bias of {site.path}, which has none to merge into; exclude the "
                    f"site, or bind the adapter"
                )
            bias: Any = merged.get(at, leaves[at])
            merged[at] = (bias.astype(jnp.float32) + shift.reshape(bias.shape)).astype(bias.dtype)
    return replace_leaves(base, merged)
