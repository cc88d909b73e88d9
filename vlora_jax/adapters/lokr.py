"""LoKr: a Kronecker product with a low-rank factor (LyCORIS, arXiv 2309.14859)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.method import Factors
from vlora_jax.adapters.ranked import Ranked, uniform
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError

Start = Literal["zero_w1", "zero_w2"]
ZERO = {"zero_w1": ("w1", "b1"), "zero_w2": ("w2", "a2")}


@dataclass(frozen=True, kw_only=True)
class LoKr(Ranked):
    """ΔW = s·W₁ ⊗ W₂ with s = alpha / rank: block (i, o) of ΔW is s·W₁[i, o]·W₂.

    `W₁ (in₁, out₁)` and `W₂ (in₂, out₂)` with in = in₁·in₂ and out = out₁·out₂, see `sides`. W₂ is a product
    `A₂ (in₂, r) B₂ (r, out₂)` where the rank is below half of its longer side and a whole matrix elsewhere; W₁ is
    whole unless `decompose_both`. PEFT divides alpha by the rank for whole matrices too, and so do we.

    A forward pass builds no ΔW: x, as a matrix of in₁ × in₂ a token, is multiplied by A₂ (or W₂) from one side and by
    W₁ from the other. PEFT has it on linear layers and convolutions; embeddings are ours.

    Attributes:
      alpha: numerator of the scale s.
      alpha_pattern: other values for the sites that a pattern matches.
      decompose_both: W₁ may be a product too.
      decompose_factor: in₁ and out₁; -1 makes the factors as square as can be.
      start: which factor starts as zero, so that the model is unchanged; the others start uniform in ±1/√(their inputs,
        or r for a B). `"zero_w1"` is PEFT's, `"zero_w2"` LyCORIS's.
    """

    name = "lokr"
    paper = "2309.14859"
    formula = "ΔW = s·W₁ ⊗ (A₂ B₂)"
    trains = "in₁·out₁ + r·(in₂ + out₂)"
    verified = "PEFT"
    peft = "LOKR"
    cost = "turns its activations round at every site, between products of inner size 8 to 43"
    default_rate = 5e-3

    alpha: float = 8.0
    alpha_pattern: Any = ()
    decompose_both: bool = False
    decompose_factor: int = -1
    start: Start = "zero_w1"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor < 1:
            raise ConfigError(f"lokr: decompose_factor is {self.decompose_factor}; it must be at least 1, or -1")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check_site(self, site: Site) -> None:
        """Any rank will do: W₂ is whole where it is large."""

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        shapes, zero = self.parts(site), ZERO[self.start]
        keys = jax.random.split(key, len(shapes))
        draw = lambda key, name, shape: jnp.zeros(shape) if name in zero else uniform(key, shape, shape[0])
        return Factors({name: draw(key, name, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)})

    def parts(self, site: Site) -> dict[str, tuple[int, int]]:
        """The factors that a site has, by name, and their shapes."""
        (in1, in2), (out1, out2) = (sides(size, self.decompose_factor) for size in (site.in_dim, site.out_dim))
        found = {}
        for place, shape, may_split in (("1", (in1, out1), self.decompose_both), ("2", (in2, out2), True)):
            if may_split and self.rank < max(shape) / 2:
                found |= {f"a{place}": (shape[0], self.rank), f"b{place}": (self.rank, shape[1])}
            else:
                found[f"w{place}"] = shape
        return found

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        w1 = self.scale * whole(factors, "1")
        second = [factors[name].astype(y.dtype) for name in ("w2", "a2", "b2") if name in factors]
        in1, in2 = w1.shape[0], second[0].shape[0]
        if isinstance(x, Lookup):
            by_w1 = (Lookup(x.ids // in2, y.dtype) @ w1).astype(y.dtype)
            h = by_w1[:, :, None] * (Lookup(x.ids % in2, y.dtype) @ second[0])[:, None, :]
        else:
            h = x.reshape(-1, in1, in2) @ second[0]
            h = jnp.einsum("tir,io->tor", h, w1.astype(y.dtype))
        return (h if len(second) == 1 else h @ second[1]).reshape(y.shape)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        return self.scale * jnp.kron(whole(factors, "1"), whole(factors, "2"))

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array] | None:
        (left1, right1), (left2, right2) = pair(factors, "1"), pair(factors, "2")
        if left1.shape[1] * left2.shape[1] >= min(shape):
            return None
        return jnp.kron(left1, left2), self.scale * jnp.kron(right1, right2)

    def flops(self, site: Site) -> tuple[float, float]:
        parts = self.parts(site)
        in2, inner = parts["a2"] if "a2" in parts else parts["w2"]
        out2 = parts["b2"][1] if "b2" in parts else inner
        first = site.in_dim * inner + (site.in_dim // in2) * inner * (site.out_dim // out2)
        last = inner * site.out_dim if "b2" in parts else 0
        return 2.0 * (first + last), 1.0 * site.in_dim * site.out_dim


def sides(size: int, factor: int) -> tuple[int, int]:
    """`size` as the product of two: (factor, size / factor) if that divides, else the first is its largest divisor.

    Largest of those that are at most √size and, unless it is -1, at most `factor`.

    >>> sides(768, -1), sides(768, 8), sides(768, 7), sides(127, -1)
    ((24, 32), (8, 96), (6, 128), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor == -1 else min(factor, math.isqrt(size))
    first = next(divisor for divisor in range(limit, 0, -1) if size % divisor == 0)
    return first, size // first


def whole(factors: FactorDict, place: str) -> Float[Array, "in out"]:
    """W₁ or W₂, stored whole or as a product."""
    return factors[f"w{place}"] if f"w{place}" in factors else factors[f"a{place}"] @ factors[f"b{place}"]


def pair(factors: FactorDict, place: str) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
    """W₁ or W₂ as a product, of itself with an identity if it is stored whole."""
    if f"w{place}" not in factors:
        return factors[f"a{place}"], factors[f"b{place}"]
    w = factors[f"w{place}"]
    return (w, jnp.eye(w.shape[1])) if w.shape[1] <= w.shape[0] else (jnp.eye(w.shape[0]), w)
