"""A new adapter for a model: select its sites, draw its tensors, copy what is trained whole."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Site, as_patterns, find_sites, select
from vlora_jax.adapters.trees import Tree, flatten, matching, shapes_only
from vlora_jax.errors import ConfigError, TargetError, expect


def init(method: Method, key: PRNGKeyArray, base: Tree, sites: list[Site] | None = None) -> Adapter:
    """A new adapter for a model.

    Args:
      method: what to attach and where, `LoRA(rank=16, alpha=32, targets="attention")`.
      key: `jax.random.key`. Each site draws from a key of its own, so targets don't influence each other
        but through tensors that sites share.
      base: the model's parameters from `split`; shapes are enough unless the method reads the base's values.
      sites: candidate kernels, if not `find_sites(base)`; Linen models pass `linen.find_sites(…)`.

    Returns:
      An `Adapter` in float32, shardable and differentiable like any pytree.

    Raises:
      TargetError: a pattern selects nothing.
      ConfigError: the method cannot work on a selected site (rank above the kernel's smaller side).

    >>> import jax
    >>> from flax import nnx
    >>> from vlora_jax import LoRA, count, split
    >>> graphdef, base = split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))
    >>> adapter = init(LoRA(rank=2), jax.random.key(0), base)
    >>> count(adapter)
    14
    """
    expect("init(method, key, base)", "method", method, Method)
    candidates = find_sites(base) if sites is None else sites
    if sites is None:
        _explain_unmarked(base, candidates)
    chosen = select(candidates, method.targets, method.exclude) if method.on_sites else []
    adapter = method.init(key, chosen, base)
    full = whole_leaves(method, base, chosen)
    return adapter.with_trainable(adapter.trainable | {"full": full})


def adapter_shapes(method: Method, base: Tree) -> Adapter:
    """What a run of this method starts with on a model, as shapes. It raises what `init` raises.

    >>> from flax import nnx
    >>> from vlora_jax import DeepLoRA, split
    >>> graphdef, base = split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> adapter = adapter_shapes(DeepLoRA(form="compressed", rank=2), base)
    >>> {name: factor.shape for name, factor in sorted(adapter.trainable["sites"][""].items())}
    {'m1': (2, 2), 'm2': (2, 2), 'm3': (2, 2), 'p': (6, 2), 'q': (2, 4)}
    """

    def start(key: PRNGKeyArray, base: Tree) -> Adapter:
        adapter = init(method.opening, key, base)
        return method.opened(adapter, adapter.trainable)

    return jax.eval_shape(start, jax.eval_shape(lambda: jax.random.key(0)), base)


def whole_leaves(method: Method, base: Tree, sites: list[Site]) -> dict[str, Any]:
    """The base parameters that a method trains whole, as float32 copies keyed by leaf path."""
    leaves = {path: leaf for path, leaf in flatten(base).items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
    adapted = {site.leaf_path for site in sites}
    hits = [path for pattern in as_patterns(method.full) for path in matching(pattern, leaves, "full")]
    hits += method.whole(leaves)
    clash = next((path for path in hits if path in adapted), None)
    if clash:
        raise ConfigError(f"{clash} is both adapted and trained whole; exclude it from one of them")
    bare = next((path for path in hits if shapes_only(leaves[path])), None)
    if bare:
        raise ConfigError(f"{bare} is trained whole and starts from its values; the base has shapes only")
    return {path: leaves[path].astype(jnp.float32) for path in hits}


def _explain_unmarked(base: Tree, candidates: list[Site]) -> None:
    known = {site.leaf_path for site in candidates}
    unmarked = [p for p, leaf in flatten(base).items() if p.endswith("kernel") and p not in known and leaf.ndim > 2]
    if unmarked and not candidates:
        raise TargetError(
            f"{unmarked[0]} has {flatten(base)[unmarked[0]].ndim} axes and nothing says which are layers, inputs or "
            f"outputs; get the parameters with vlora_jax.split(model)"
        )
