"""PiSSA (arXiv 2404.02948) and OLoRA (arXiv 2406.01775) as LoRA of twice the rank.

Their files hold A and B, but not the start that PEFT takes off the base: it is computed from the base here.
"""

import numpy as np

from vlora_jax.adapters.olora import olora_start
from vlora_jax.adapters.pissa import pissa_start
from vlora_jax.errors import ConversionError


def converted(
    kind: str, kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """`[A - A₀, A₀]` and `[B; B - B₀]`: with the same scale, the change that the file means.

    PEFT takes s·A₀ B₀ off the kernel when it loads the file: PiSSA's is the best approximation of rank r, whatever
    the scale; OLoRA's A₀ B₀ is not divided by it.

    Raises:
      ConversionError: the rank is above the kernel's smaller side, so that there is no such start.
    """
    rank, kernel = a.shape[1], kernel.astype(np.float64)
    if rank > min(kernel.shape):
        raise ConversionError(f"a {kind} start of rank {rank} is above the smaller side of a kernel {kernel.shape}")
    a0, b0 = (pissa_start if kind == "pissa" else olora_start)(kernel, rank)
    if kind == "pissa":
        b0 = b0 / scale
    return np.concatenate([a - a0, a0], 1).astype(np.float32), np.concatenate([b, b - b0], 0).astype(np.float32)
