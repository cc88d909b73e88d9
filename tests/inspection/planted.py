"""Adapters and kernels whose changes are known, because they were planted."""

import jax
import jax.numpy as jnp
import numpy as np

from vlora_jax import Adapter, LoRA
from vlora_jax.adapters.sites import Site

LAYERS, IN, OUT, RANK = 3, 12, 9, 4
SCALE = 6.0 / RANK
RNG = np.random.default_rng(0)


def site_of(path: str, stack: tuple[int, ...], sides: tuple[int, int] = (IN, OUT)) -> Site:
    return Site(path, "kernel", "dense", stack, sides, (0,), (1,))


def lora_on(path: str, stack: tuple[int, ...], a: np.ndarray, b: np.ndarray, alpha: float = 6.0) -> Adapter:
    """A LoRA of one site, `a (*stack, in, r)` and `b (*stack, r, out)`."""
    method = LoRA(rank=a.shape[-1], alpha=alpha)
    site = site_of(path, stack, (a.shape[-2], b.shape[-1]))
    return Adapter.of(method, [site], trainable={path: {"a": jnp.asarray(a), "b": jnp.asarray(b)}})


def planted(path: str, left: np.ndarray, right: np.ndarray) -> Adapter:
    """A LoRA on a stack whose ΔW is `left @ right`."""
    return lora_on(path, left.shape[:1], np.float32(left), np.float32(right), alpha=float(left.shape[-1]))


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def orthonormal(*shape: int) -> np.ndarray:
    """Orthonormal columns `(*stack, n, r)`."""
    return np.linalg.qr(normal(*shape))[0].astype(np.float32)


def change_of(adapter: Adapter, path: str) -> np.ndarray:
    """ΔW of a LoRA, written out."""
    factors = jax.tree.map(np.asarray, adapter.factors(path))
    return adapter.method.scale * factors["a"].astype(np.float64) @ factors["b"]


def base_of(path: str, kernel: np.ndarray) -> dict:
    """A base of one kernel."""
    return {path: {"kernel": jnp.asarray(kernel, jnp.float32)}}
