"""VeRA: vector-based random matrix adaptation (arXiv 2310.11454)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.torch_draws import TorchDraws
from vlora_jax.adapters.trees import Tree
from vlora_jax.adapters.view import thin
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """ΔW = A diag(d) B diag(b): A and B are random, frozen and shared by all sites; d and b of each layer train.

    `A (max_in, r)` and `B (r, max_out)` are as large as the largest sites need; a site uses `A[:in]` and `B[:, :out]`
    (as PEFT does; the paper has kernels of one shape only). There is no scale, and r may be above the sides of a
    kernel. d starts at `d_start`, b at zero, so that the model is unchanged.

    A and B are uniform in ±√(6/max_in) and ±√(6/r), so that they depend on the largest site: adding a wider one changes
    all. They are kept with the adapter, 4·r·(max_in + max_out) bytes.

    Attributes:
      rank: inner size r of A and B.
      d_start: start of d.
      dropout: share of A's inputs that is dropped in training.
      projection: who draws A and B: `"peft"` as PEFT does, bit for bit, `"jax"` by JAX's own generator.
      projection_key: seed of A and B.
      save_projection: write A and B into PEFT's files, so that they need not be drawn again when the file is read.
      max_in, max_out: sides of A and B; those of the largest sites without them. Adapters of equal sides and key share
        their A and B.
    """

    name = "vera"
    paper = "2310.11454"
    formula = "ΔW = A diag(d) B diag(b)"
    trains = "r + out"
    vertical = False
    verified = "PEFT"
    cost = "rank 256 is not thin beside kernels of 512: two products of that width at every site"
    peft = "VERA"
    default_rate = 1e-2
    aside = Method.aside | {"d_start", "save_projection"}

    rank: int = 256
    d_start: float = 0.1
    dropout: float = 0.0
    projection: Literal["peft", "jax"] = "peft"
    projection_key: int = 0
    save_projection: bool = True
    max_in: Any = None
    max_out: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rank", "max_in", "max_out"):
            value = getattr(self, field)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"vera: {field} is {value!r}; it must be a whole number of at least 1")

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        sides = self.sides(sites)
        a, b = (host_projections if self.projection == "peft" else jax_projections)(
            self.projection_key, self.rank, *sides
        )
        trainable = {
            site.path: {
                "d": jnp.full((*site.stack, self.rank), self.d_start, jnp.float32),
                "b": jnp.zeros((*site.stack, site.out_dim)),
            }
            for site in sites
        }
        return Adapter.of(self, sites, trainable=trainable, frozen_shared={"projection_a": a, "projection_b": b})

    def sides(self, sites: list[Site]) -> tuple[int, int]:
        """The sides of A and B, `(max_in, max_out)`.

        Raises:
          ConfigError: a site is larger than the options allow.
        """
        sides = []
        for field, sizes in (
            ("max_in", {site.path: site.in_dim for site in sites}),
            ("max_out", {site.path: site.out_dim for site in sites}),
        ):
            path, largest = max(sizes.items(), key=lambda item: item[1])
            limit = getattr(self, field)
            if limit is not None and limit < largest:
                raise ConfigError(f"vera: {field} is {limit}; {path} needs {largest}, raise it or exclude the site")
            sides.append(limit or largest)
        return sides[0], sides[1]

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        a, b = self.projections(kernel.shape, factors)
        low = thin(x, a) * factors["d"].astype(y.dtype)  # vectors apart: A and B need no gradient product
        return (low @ b.astype(y.dtype)) * factors["b"].astype(y.dtype)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        left, right = self.low_rank(kernel.shape, factors)
        return left @ right

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array]:
        """A diag(d), and B diag(b), of the site's size."""
        a, b = self.projections(shape, factors)
        return a * factors["d"], b * factors["b"]

    def projections(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array]:
        """A `(in, r)` and B `(r, out)` of a site."""
        return factors["projection_a"][: shape[0]], factors["projection_b"][:, : shape[1]]


def host_projections(key: int, rank: int, max_in: int, max_out: int) -> tuple[Array, Array]:
    """`peft_projections`, drawn when a program runs: as constants they would be compiled into it."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((max_in, rank), (rank, max_out))]
    return jax.pure_callback(lambda: peft_projections(key, rank, max_in, max_out), tuple(shapes))


def peft_projections(key: int, rank: int, max_in: int, max_out: int) -> tuple[np.ndarray, np.ndarray]:
    """A `(max_in, r)` and B `(r, max_out)` as PEFT draws them from `projection_prng_key`: A first, each transposed."""
    draws = TorchDraws(key)
    of_a, of_b = (math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan)) for fan in (max_in, rank))
    a = draws.uniform(-of_a, of_a, (rank, max_in))
    b = draws.uniform(-of_b, of_b, (max_out, rank))
    return np.ascontiguousarray(a.T), np.ascontiguousarray(b.T)


def jax_projections(key: int, rank: int, max_in: int, max_out: int) -> tuple[Array, Array]:
    """A and B of the same law by JAX's generator."""
    key_a, key_b = jax.random.split(jax.random.key(key))
    of_a, of_b = (math.sqrt(6 / fan) for fan in (max_in, rank))
    a = jax.random.uniform(key_a, (max_in, rank), minval=-of_a, maxval=of_a)
    return a, jax.random.uniform(key_b, (rank, max_out), minval=-of_b, maxval=of_b)
