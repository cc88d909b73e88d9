"""Numbers as torch's CPU generator draws them, bit for bit and without torch: what a seed in PEFT's files stands for.

Its generator is MT19937 with the classic set-up of an integer seed, which is NumPy's `RandomState`. The arithmetic was
found by comparison with torch 2.13 on x86; other builds may round otherwise, by 1.2e-7 of the bound.
"""

import numpy as np


class TorchDraws:
    """One stream of a seed; every call goes on where the last one ended."""

    def __init__(self, seed: int):
        self._state = np.random.RandomState(seed & 0xFFFFFFFF)

    def words(self, count: int) -> np.ndarray:
        """Raw 32-bit words, as uint32."""
        return self._state.randint(0, 2**32, count, dtype=np.uint32)

    def uniform(self, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
        """`torch.empty(shape).uniform_(low, high)`: 24 bits an entry, rounded once (a fused multiply-add)."""
        unit = (self.words(int(np.prod(shape))) & 0xFFFFFF).astype(np.float64) * 2.0**-24
        start = np.float32(low)
        width = np.float32(np.float32(high) - start)
        return (unit * np.float64(width) + np.float64(start)).astype(np.float32).reshape(shape)
