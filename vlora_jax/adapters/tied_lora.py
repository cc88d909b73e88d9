"""Tied-LoRA: low-rank factors that layers share, with scaling vectors of each layer (arXiv 2311.09578)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors, Product, site_key
from vlora_jax.adapters.options import check_least
from vlora_jax.adapters.sites import Site, role
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError

Preset = Literal["lora", "tl5", "tl6", "vera_like"]
Start = Literal["auto", "zero_a", "zero_b", "zero_u", "zero_v"]
Draw = Literal["normal", "kaiming", "xavier"]

FLAGS = ("tie_a", "tie_b", "train_a", "train_b", "train_u", "train_v")
PRESETS = {
    "lora": (False, False, True, True, False, False),
    "tl5": (True, True, True, True, False, False),
    "tl6": (True, True, True, True, True, True),
    "vera_like": (True, True, False, False, True, True),
}


@dataclass(frozen=True, kw_only=True)
class TiedLoRA(Product):
    """ΔW = A diag(u) B diag(v), with A `(in, r)` and B `(r, out)` of all layers, u `(r,)` and v `(out,)` of each.

    Layers share a tied tensor where they are stacked, and where their paths differ in the layer's number alone:
    `layers/0/q` and `layers/1/q` (see `vlora_jax.adapters.sites.role`). There is no scale; the rank may exceed a
    kernel's sides.

    On a fused kernel of queries, keys and values one A serves all three. Kernels that the model keeps apart have
    an A each here.

    Attributes:
      rank: inner size r.
      preset: what is tied and what trains, where the flags below don't say. `"lora"`: A and B of each layer;
        `"tl5"`: tied A and B; `"tl6"`: tied A and B, u and v; `"vera_like"`: u and v on tied random A and B, the
        authors' default. Which flags the paper's TL5 and TL6 have is our reading: it fits the numbers of parameters.
      tie_a, tie_b: whether layers share A and B. Tying one of them is ours.
      train_a, train_b, train_u, train_v: what trains. A and B that don't are random; u and v that don't are 1.
      start: which one tensor starts at zero, so that the model is unchanged; it must train. Two zeros would leave
        all gradients at zero. `"auto"`: the first of B, v, u, A that trains. For `"tl6"` that is B, with u = v = 1; the
        paper's start of TL6 is unknown.
      draw: of A and B: `"kaiming"` uniform in ±1/√inputs, as LoRA's A; `"normal"` with deviation 1, the default of the
        authors' code, which needs rates about √inputs lower; `"xavier"` uniform in ±√(6/(inputs + outputs)).
    """

    name = "tied_lora"
    decays = frozenset({"a", "b"})
    paper = "2311.09578"
    formula = "ΔW = A diag(u) B diag(v)"
    trains = "r + out, and r·(in + out) once for all layers"
    vertical = False
    verified = "NumPy"
    default_rate = 3e-3
    aside = Product.aside | {"draw"}

    rank: int = 8
    preset: Preset = "tl6"
    tie_a: bool | None = None
    tie_b: bool | None = None
    train_a: bool | None = None
    train_b: bool | None = None
    train_u: bool | None = None
    train_v: bool | None = None
    start: Start = "auto"
    draw: Draw = "kaiming"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(f"{self.name}: rank", self.rank, 1)
        trained = [name for name in "bvua" if self.on(f"train_{name}")]
        if not trained:
            raise ConfigError(f"{self.name}: nothing trains; switch on one of train_a, train_b, train_u, train_v")
        if self.zero not in trained:
            ways = ", ".join(f"zero_{name}" for name in trained)
            raise ConfigError(
                f"{self.name}: start is {self.start}, but {self.zero} does not train and would stay zero; "
                f"it must be auto, {ways}"
            )

    def on(self, flag: str) -> bool:
        """Whether something is tied or trains, by its flag or else by the preset."""
        given = getattr(self, flag)
        return PRESETS[self.preset][FLAGS.index(flag)] if given is None else given

    @property
    def zero(self) -> str:
        """The tensor that starts at zero."""
        if self.start != "auto":
            return self.start.removeprefix("zero_")
        return next(name for name in "bvua" if self.on(f"train_{name}"))

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        adapter = super().init(key, sites, base)
        trainable, frozen = {}, {}
        for site in sites:
            for name in ("a", "b"):
                if not self.on(f"tie_{name}"):
                    continue
                place = f"{role(site.path)}/{name}" if site.path else name
                value = self.tensor(site_key(key, place), name, site)
                known = (trainable | frozen).get(place, value)
                if known.shape != value.shape:
                    raise ConfigError(
                        f"{self.name}: {name} of {site.path} is {value.shape}, of an earlier layer {known.shape}; "
                        f"exclude one of them, or set tie_{name} to false"
                    )
                (trainable if self.on(f"train_{name}") else frozen)[place] = value
        return dataclasses.replace(
            adapter,
            trainable=adapter.trainable | {"shared": trainable},
            frozen=adapter.frozen | {"shared": frozen},
        )

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        own = [name for name in "ab" if not self.on(f"tie_{name}")]
        own += [name for name in "uv" if self.on(f"train_{name}")]
        values = {name: self.tensor(site_key(key, name), name, site) for name in own}
        trained = {name for name in values if self.on(f"train_{name}")}
        return Factors(
            {name: value for name, value in values.items() if name in trained},
            {name: value for name, value in values.items() if name not in trained},
        )

    def tensor(self, key: PRNGKeyArray, name: str, site: Site) -> Array:
        """A, B, u or v at the start."""
        r = self.rank
        shape = {"a": (site.in_dim, r), "b": (r, site.out_dim), "u": (r,), "v": (site.out_dim,)}[name]
        if name == self.zero:
            return jnp.zeros(shape)
        if name in "uv":
            return jnp.ones(shape)
        if self.draw == "normal":
            return jax.random.normal(key, shape)
        bound = math.sqrt(6 / sum(shape)) if self.draw == "xavier" else shape[0] ** -0.5
        return jax.random.uniform(key, shape, minval=-bound, maxval=bound)

    def pair(self, factors: FactorDict) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        u, v = factors.get("u", jnp.ones(self.rank)), factors.get("v", 1.0)
        return factors["a"], u[:, None] * factors["b"] * v
