"""LoRTA: one low-rank tensor for the attention kernels of the whole model (arXiv 2410.04060)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors, Product, site_key
from vlora_jax.adapters.options import check_least
from vlora_jax.adapters.sites import Site, layer_number, role
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LoRTA(Product):
    """ΔW[l, m] = s · Σᵣ aᵣ ⊗ (hᵣ ⊗ bᵣ) · lᵣ[l] · mᵣ[m], a sum of r products over rows, heads, layers and matrices.

    `A (D, r)`, `B (r, D/H)`, `C_h (H, r)` and `C_l (L, r)` are `a`, `b`, `h`, `l`, shared by all sites; a row of C_m,
    `m (r,)`, is shared by the layers of a role: queries, keys. s = alpha / rank. B starts at zero.

    As matrices: with K `(D, r)`, K[(h, j), r] = C_h[h, r]·B[r, j], the change is s·A diag(l ⊙ m) Kᵀ, so that neither it
    nor the tensor is built.

    Sites count as in one layer of the model if they have the same place in their stack, or the same number in their
    path (`layers/3/q`); a kernel that is not stacked belongs to the first layer (our reading).

    Attributes:
      rank: r.
      alpha: numerator of the scale s.
      rank_stabilised: divide alpha by √rank.
      heads: H; it must divide D.
      orientation: `"out"`: heads lie on the kernel's outputs (the authors' lit-gpt code); `"in"`: on its inputs,
        ΔWᵀ of the same factors (their fork of PEFT). Which of them the paper means is unverified.
      start_scale: A is uniform in ±1/√r, the C's in ±√(6 / ((1 + 5·start_scale²)·r)): 0 is the default of the PEFT
        fork, 1 that of the lit-gpt one.
      dropout: share of the inputs that is dropped in training; the frozen path never sees it.
    """

    name = "lorta"
    paper = "2410.04060"
    formula = "ΔW[l, m] = s·A diag(C_l[l] ⊙ C_m[m]) (C_h ⊙ B)ᵀ"
    trains = "r·(D + D/H + H + L + M) for all M matrices of L layers"
    vertical = False
    verified = "NumPy"
    default_rate = 1e-2
    aside = Product.aside | {"start_scale"}

    rank: int = 8
    alpha: float = 8.0
    rank_stabilised: bool = False
    heads: int = 1
    orientation: Literal["out", "in"] = "out"
    start_scale: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rank", "heads"):
            check_least(f"{self.name}: {field}", getattr(self, field), 1)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        side, layers = self.side(sites), layer_places(sites)
        depth = 1 + max(int(places.max()) for places in layers.values())
        r, bound = self.rank, math.sqrt(6 / ((1 + 5 * self.start_scale**2) * self.rank))
        shapes = {"a": (side, r), "h": (self.heads, r), "l": (depth, r)}
        shapes |= {f"{role(site.path)}/m" if site.path else "m": (r,) for site in sites}
        shared = {"b": jnp.zeros((r, side // self.heads))}
        for name, shape in shapes.items():
            end = r**-0.5 if name == "a" else bound
            shared[name] = jax.random.uniform(site_key(key, name), shape, minval=-end, maxval=end)
        adapter = super().init(key, sites, base)
        return dataclasses.replace(
            adapter,
            trainable=adapter.trainable | {"shared": shared},
            frozen=adapter.frozen | {"sites": {path: {"layer": jnp.asarray(each)} for path, each in layers.items()}},
        )

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        return Factors({})  # what trains is shared

    def side(self, sites: Sequence[Site]) -> int:
        """D of all sites.

        Raises:
          ConfigError: a site is an embedding or not square, sites differ, or the heads don't divide D.
        """
        side = sites[0].in_dim
        for site in sites:
            if site.kind == "embed" or not site.in_dim == site.out_dim == side:
                what = "an embedding" if site.kind == "embed" else f"({site.in_dim}, {site.out_dim})"
                raise ConfigError(
                    f"{self.name}: {site.path} is {what}; kernels must be ({side}, {side}), all of one size: exclude "
                    f"it (MLPs, and keys and values of fewer heads, do not fit)"
                )
        if side % self.heads:
            raise ConfigError(f"{self.name}: heads {self.heads} does not divide {side}, the side of {sites[0].path}")
        return side

    def pair(self, factors: FactorDict) -> tuple[Float[Array, "D r"], Float[Array, "r D"]]:
        """Left and right factors of ΔW."""
        a, weight = factors["a"], self.scale * factors["l"][factors["layer"]] * factors["m"]
        heads = (factors["h"][:, None, :] * factors["b"].T).reshape(a.shape)
        left, right = (a, heads) if self.orientation == "out" else (heads, a)
        return left, (right * weight).T


def layer_places(sites: Sequence[Site]) -> dict[str, np.ndarray]:
    """Which layer of the model each layer of each site is, `(*stack)` each, counted from 0 without gaps."""
    labels = {site.path: [(layer_number(site.path), place) for place in range(site.layers)] for site in sites}
    order = {
        label: index for index, label in enumerate(sorted({each for of_site in labels.values() for each in of_site}))
    }
    return {
        site.path: np.array([order[label] for label in labels[site.path]], np.int32).reshape(site.stack)
        for site in sites
    }
