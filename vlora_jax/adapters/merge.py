"""Merge adapters into ordinary parameters; the base itself is never changed."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.method import over_stack
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree, flatten, replace_leaves
from vlora_jax.errors import BaseMismatchError, ConfigError


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
      BaseMismatchError: the adapter's sites are not in this base.
      ConfigError: two adapters train the same parameter whole.

    >>> import jax
    >>> from flax import nnx
    >>> from vlora_jax import LoRA, init, split
    >>> graphdef, base = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> merged = merge(base, init(LoRA(rank=2), jax.random.key(0), base))
    >>> bool((merged["kernel"].get_value() == base["kernel"].get_value()).all())
    True
    """
    leaves, merged = flatten(base), {}
    sums: dict[str, tuple[Site, Array]] = {}
    for adapter in adapters:
        for site in adapter.sites:
            if site.leaf_path not in leaves:
                raise BaseMismatchError(f"the adapter changes {site.leaf_path}, which this base does not have")
            kernel = site.read(leaves)
            change = site_delta(adapter, site, kernel)
            sums[site.leaf_path] = (site, sums[site.leaf_path][1] + change if site.leaf_path in sums else change)
        for path, value in adapter.trainable["full"].items():
            if path in merged:
                raise ConfigError(f"two adapters train {path} whole; merge one of them")
            merged[path] = value.astype(leaves[path].dtype)
    for path, (site, change) in sums.items():
        stored: Any = leaves[path]
        merged[path] = site.kernel(site.matrix(stored).astype(jnp.float32) + change).astype(stored.dtype)
    return replace_leaves(base, merged)
