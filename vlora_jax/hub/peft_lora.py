"""Any adapters that can be merged as one plain LoRA: what serving stacks take.

They drop or refuse DoRA, biases, whole modules, patterns and every scale but one, see vllm-project/vllm `vllm/lora`:
here all modules have one rank, alpha equals it, and scales are folded into B.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.factorise import svd
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.merge import site_shift
from vlora_jax.adapters.method import Method, one_by_one
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.svd import product_svd
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.hub.peft_modules import exact


def as_lora(
    base: Tree, adapters: Adapter | Sequence[Adapter], max_rank: int, limit: float = 1.0, *, plain: bool = True
) -> tuple[Adapter, dict[str, np.ndarray]]:
    """One plain LoRA that changes the kernels as the adapters together do, and what it leaves out.

    Exact where the changes are thin products of at most `max_rank` in all; else the best approximation of that rank,
    by the SVD of the small product between the QR factors where there are thin factors, of the whole change where not.

    Args:
      base: the parameters that the adapters change.
      max_rank: the largest rank that the server takes; the rank is the largest that a module needs.
      limit: largest allowed residual of any module.
      plain: one rank for all modules and nothing trained whole, as servers want it; else, for our runs and PEFT, each
        site has the rank that it needs, and what the adapters train whole stays.

    Returns:
      The LoRA, and the residual ‖ΔW - A B‖ / ‖ΔW‖ of each site, one value a layer.

    Raises:
      ConversionError: an adapter cannot be merged, changes biases or, if `plain`, trains parameters whole; none
        changes a kernel; or a residual is above the limit.
      ConfigError: `max_rank` is below 1, or two adapters train the same parameter whole.
    """
    if max_rank < 1:
        raise ConfigError(f"max_rank is {max_rank}; it must be at least 1")
    several = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    full = [(path, value) for adapter in several for path, value in adapter.trainable["full"].items()]
    if full and plain:
        raise ConversionError(
            f"{full[0][0]} is trained whole, which a plain LoRA has no place for; merge the adapter instead"
        )
    if len(dict(full)) < len(full):
        raise ConfigError("two adapters train the same parameter whole; blend them first, with add, ties and the like")
    sites: dict[str, Site] = {}
    for adapter in several:
        for site in adapter.sites:
            if site_shift(adapter, site) is not None:
                raise ConversionError(f"the bias of {site.path} is changed, which a plain LoRA has no place for")
            sites[site.path] = site
    if not sites:
        raise ConversionError("no kernel is changed: there is nothing to make a LoRA of")
    leaves = flatten(base)
    thin = {path: _thin(several, site, leaves, max_rank) for path, site in sorted(sites.items())}
    rank = max(left.shape[-1] for left, _, _ in thin.values())
    factors, residuals = {}, {}
    for path, (left, right, residual) in thin.items():
        gap = rank - left.shape[-1] if plain else 0
        free = [(0, 0)] * len(sites[path].stack)
        factors[path] = {"a": jnp.pad(left, [*free, (0, 0), (0, gap)]), "b": jnp.pad(right, [*free, (0, gap), (0, 0)])}
        residuals[path] = np.asarray(residual).reshape(-1)
    path, worst = max(residuals.items(), key=lambda item: item[1].max())
    if worst.max() > limit:
        raise ConversionError(
            f"{path}, layer {worst.argmax()}: rank {rank} leaves {worst.max():.3g} of the change out, above the limit "
            f"{limit:g}; raise max_rank, or merge the adapter instead"
        )
    ranks = {exact(path, leaves): left.shape[-1] for path, (left, _, _) in thin.items()}
    own = {} if plain else {pattern: each for pattern, each in ranks.items() if each < rank}
    method = LoRA(
        targets=tuple(ranks), full=tuple(exact(path, leaves) for path, _ in full) or None, rank=rank, alpha=float(rank),
        rank_pattern=own, alpha_pattern={pattern: float(each) for pattern, each in own.items()},
    )  # fmt: skip
    lora = Adapter.of(method, [sites[path] for path in thin], trainable=factors)
    return lora.with_trainable(lora.trainable | {"full": dict(full)}), residuals


def _thin(adapters: Sequence[Adapter], site: Site, leaves: dict[str, Any], limit: int) -> tuple[Array, Array, Array]:
    """Left and right factors of all changes at a site, at most `limit` wide, and their residual; of every layer."""
    here = [adapter for adapter in adapters if any(each.path == site.path for each in adapter.sites)]
    methods = tuple(adapter.method.for_site(site) for adapter in here)
    factors = [adapter.factors(site.path) for adapter in here]
    shared = [adapter.shared_at(site.path) for adapter in here]
    return _factorise(methods, len(site.stack), limit, site.read(leaves), factors, shared)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _factorise(
    methods: tuple[Method, ...], dims: int, limit: int, kernel: Array, factors: list[FactorDict], shared: list
) -> tuple[Array, Array, Array]:
    """`_thin` layer by layer."""

    def one(kernel: Array, factors: list[FactorDict]) -> tuple[Array, Array, Array]:
        kernel = kernel.astype(jnp.float32)
        own = [each | common for each, common in zip(factors, shared, strict=True)]
        pairs = [method.low_rank(kernel.shape, each) for method, each in zip(methods, own, strict=True)]
        if None in pairs:
            deltas = [method.delta(kernel, each) for method, each in zip(methods, own, strict=True)]
            u, values, v = svd(functools.reduce(jnp.add, deltas))
            return cut(u, values, v, limit)
        left = jnp.concatenate([pair[0] for pair in pairs if pair], axis=1)
        right = jnp.concatenate([pair[1] for pair in pairs if pair], axis=0)
        if left.shape[1] <= limit:
            return left, right, jnp.zeros(())
        u, values, v = product_svd(left, right)
        return cut(u, values, v, limit)

    return one_by_one(one, dims)(kernel, factors)


def cut(
    u: Float[Array, "in k"], values: Float[Array, " k"], v: Float[Array, "k out"], rank: int
) -> tuple[Float[Array, "in r"], Float[Array, "r out"], Float[Array, ""]]:
    """The leading part of an SVD as two factors, and the norm of the rest relative to the whole."""
    total, rest = (values**2).sum(), (values[rank:] ** 2).sum()
    return u[:, :rank], values[:rank, None] * v[:rank], jnp.sqrt(rest / jnp.where(total > 0, total, 1))
