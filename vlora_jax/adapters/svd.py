"""A kernel's leading singular triplets, and methods that train between frozen ones."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.factorise import qr, svd
from vlora_jax.adapters.method import Factors, Product
from vlora_jax.adapters.options import check_least, check_rank
from vlora_jax.adapters.ranked import Ranked
from vlora_jax.adapters.sites import Site
from vlora_jax.errors import ConfigError

OVERSAMPLING = 10  # columns of a random subspace beyond the rank (arXiv 0909.4061 recommends 5 to 10)


def principal(kernel: Any, rank: int) -> tuple[Any, Any, Any]:
    """P `(in, r)`, σ `(r,)` and Qᵀ `(r, out)` of the best approximation P diag(σ) Qᵀ of rank r; NumPy's or JAX's."""
    xp = kernel.__array_namespace__()
    p, sigma, q = xp.linalg.svd(kernel, full_matrices=False)
    return p[:, :rank], sigma[:rank], q[:rank]


def randomised(key: PRNGKeyArray, kernel: Float[Array, "in out"], rank: int, iterations: int) -> tuple:
    """`principal` in a random subspace after some iterations (arXiv 0909.4061, algorithms 4.4 and 5.1)."""
    width = min(rank + OVERSAMPLING, *kernel.shape)
    basis = lambda columns: qr(columns)[0]
    span = basis(kernel @ jax.random.normal(key, (kernel.shape[1], width)))
    span = jax.lax.fori_loop(0, iterations, lambda _, span: basis(kernel @ basis(kernel.T @ span)), span)
    p, sigma, q = principal(span.T @ kernel, rank)
    return span @ p, sigma, q


def leading(key: PRNGKeyArray, kernel: Float[Array, "in out"], rank: int, niter: int) -> tuple:
    """`principal`, or `randomised` with a number of iterations."""
    return randomised(key, kernel, rank, niter) if niter else principal(kernel, rank)


def values(name: str, kernel: Array | None) -> Float[Array, "in out"]:
    """A kernel in float32, in which SVDs are taken.

    Raises:
      ConfigError: there is none.
    """
    if kernel is None:
        raise ConfigError(f"{name}: the start needs the base's values")
    return kernel.astype(jnp.float32)


def product_svd(left: Float[Array, "in r"], right: Float[Array, "r out"]) -> tuple:
    """Thin SVD u `(in, k)`, σ `(k,)`, v `(k, out)` of `left @ right`, which is never built: O((in + out)·r²).

    With left = Q R and rightᵀ = P S the product is Q (R Sᵀ) Pᵀ, and R Sᵀ is small.
    """
    (q, r), (p, s) = qr(left), qr(right.T)
    u, sigma, v = svd(jnp.matmul(r, s.T, precision=jax.lax.Precision.HIGHEST))
    return q @ u, sigma, v @ p.T


@dataclass(frozen=True, kw_only=True)
class Principal(Ranked, Product):
    """ΔW = A M: A `(in, r)` frozen, from the kernel's SVD W = P diag(σ) Qᵀ; M `(r, out)` of what trains.

    Attributes:
      rank: r.
      niter: 0 for the exact SVD; else the iterations of a randomised one, made of products with r + 10 columns.
    """

    vertical = False
    reads_base = True
    verified = "NumPy"

    rank: int = 16
    niter: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(f"{self.name}: niter", self.niter, 0)

    @property
    def width(self) -> int:
        """How many triplets a site has."""
        return self.rank

    def check_site(self, site: Site) -> None:
        check_rank(self.name, self.width, site, has_table=True)

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        key_svd, key_start = jax.random.split(key)
        return self.start(key_start, *leading(key_svd, values(self.name, kernel), self.width, self.niter))

    @abstractmethod
    def start(
        self, key: PRNGKeyArray, p: Float[Array, "in r"], sigma: Float[Array, " r"], q: Float[Array, "r out"]
    ) -> Factors:
        """Factors of one layer, A among the frozen ones; `q` is Qᵀ."""

    @abstractmethod
    def right(self, factors: FactorDict) -> Float[Array, "r out"]:
        """M in float32."""

    def pair(self, factors: FactorDict) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        return factors["a"], self.right(factors)
