"""Merge adapters into ordinary parameters; the base itself is never changed."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from vlora_jax.adapters.adapter import Adapter, whole_values
from vlora_jax.adapters.method import over_stack
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree, flatten, replace_leaves
from vlora_jax.errors import BaseMismatchError


def site_delta(adapter: Adapter, site: Site, kernel: Array) -> Array:
    """ΔW of one site, `(*stack, in, out)` in float32.

    Args:
      kernel: the base kernel, `(*stack, in, out)`.

    Raises:
      ConversionError: the method has no ΔW.
    """
    method, shared = adapter.method.for_site(site), adapter.shared
    one = lambda kernel, factors: method.delta(kernel, factors | shared).astype(jnp.float32)
    return over_stack(one, len(site.stack))(kernel.astype(jnp.float32), adapter.factors(site.path))


def merge(base: Tree, *adapters: Adapter) -> Tree:
    """Ordinary parameters that compute what `base` with the adapters bound computes.

    Changes are added in float32 and cast once to the kernel's dtype. `base` stays as it is, so undoing a merge
    is using it again.

    Raises:
      ConversionError: a method depends on the input, or the model is vertical (`expand` it first).
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
    leaves = flatten(base)
    changed = [path for a in adapters for path in (*(site.leaf_path for site in a.sites), *a.trainable["full"])]
    missing = next((path for path in changed if path not in leaves), None)
    if missing:
        raise BaseMismatchError(f"the adapter changes {missing}, which this base does not have")
    merged = whole_values(adapters, leaves)
    leaves |= merged
    sums: dict[str, tuple[Site, Array]] = {}
    for adapter in adapters:
        for site in adapter.sites:
            change = site_delta(adapter, site, site.read(leaves))
            sums[site.leaf_path] = (site, sums[site.leaf_path][1] + change if site.leaf_path in sums else change)
    for path, (site, change) in sums.items():
        stored: Any = leaves[path]
        merged[path] = site.kernel(site.matrix(stored).astype(jnp.float32) + change).astype(stored.dtype)
    return replace_leaves(base, merged)
