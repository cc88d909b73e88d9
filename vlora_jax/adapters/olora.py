"""OLoRA: orthonormal low-rank adaptation (arXiv 2406.01775)."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.kernel_start import KernelStart


@dataclass(frozen=True, kw_only=True)
class OLoRA(KernelStart):
    """ΔW = s·(A B - A₀ B₀), B₀ the first r columns of Q and A₀ the first r rows of R, transposed, with Q R = Wᵀ.

    B₀ has orthonormal rows. Q R is of the whole Wᵀ, whose rows are outputs, and s multiplies A₀ B₀ without A₀ being
    divided by it: both as in PEFT.
    """

    name = "olora"
    paper = "2406.01775"
    formula = "ΔW = s·(A B - A₀ B₀), A₀ B₀ = (Q_r R_r)ᵀ, Q R = Wᵀ"

    def part(self, key: PRNGKeyArray, kernel: Float[Array, "in out"]) -> tuple[Array, Array]:
        return olora_start(kernel, self.rank)


def olora_start(kernel: Any, rank: int) -> tuple[Any, Any]:
    """A₀ `(in, r)` and B₀ `(r, out)` of a kernel `(in, out)`; NumPy's or JAX's."""
    q, r = kernel.__array_namespace__().linalg.qr(kernel.T)
    return r[:rank].T, q[:, :rank].T
