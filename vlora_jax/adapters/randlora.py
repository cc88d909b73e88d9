"""RandLoRA: full-rank updates from scaled random bases (arXiv 2502.00987)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.kept import times_built
from vlora_jax.adapters.method import Factors, SiteMethod
from vlora_jax.adapters.options import check_least
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.torch_draws import TorchDraws
from vlora_jax.adapters.trees import Tree
from vlora_jax.adapters.view import Lookup

Bases = dict[str, Float[Array, "..."]]


@dataclass(frozen=True, kw_only=True)
class RandLoRA(SiteMethod):
    """ΔW = s·Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ) over n = ⌈min / r⌉ random bases, turned to the kernel's shape.

    A `(r, min)` and the Bⱼ `(max, r)`, min and max the sides of the kernel, are frozen. All sites share one A
    `(r, MIN)` and one B `(MAX, N, r)`, as large as the largest sites need, and use their first rows and columns:
    a wider site draws them anew for all.
    λ `(r, n)` starts at zero and γ `(n, min)` at 1 / max(n, min), so that the model is unchanged. As n·r ≥ min, ΔW can
    have full rank, and a larger r trains fewer numbers.

    Attributes:
      rank: r.
      alpha: numerator of the scale s = alpha / r.
      root_scale: s = alpha / (r·√n), as in the paper and its code, there with alpha = 2·r.
      pairing: how the entries of B meet those of λ. `"paper"` is the formula. `"peft"` takes B's (n, r) entries
        for (r, n) ones, an equal choice for random bases, but the only one that loads PEFT's files.
      bases: `"dense"`: uniform; `"sparse"`: ±1 with probability 1/6 each, else 0; `"very_sparse"`: ±1 with probability
        1/(2√MIN) each, as in the code (PEFT's text says 1/√MIN). All are divided by their standard deviation.
      projection: who draws them: `"peft"` as PEFT does, by torch's generator and, if dense, in bfloat16; `"jax"` by
        JAX's own generator.
      projection_key: the seed that they are drawn from.
      dropout: share of the inputs that is dropped in training.

    A step either multiplies the inputs by both factors, whose inner size is n·r ≥ min, or builds ΔW first, in·out·n·r
    multiplications, whichever costs less: ΔW is built above some min tokens.
    """

    name = "randlora"
    paper = "2502.00987"
    formula = "ΔW = s·Σⱼ Bⱼ diag(λⱼ) A diag(γⱼ)"
    trains = "n·(min(in, out) + r), n = ⌈min(in, out) / r⌉"
    vertical = False
    verified = "PEFT"
    size = ""  # a larger rank trains fewer numbers
    cost = "its inner size is that of the kernel: ΔW is built, forward and backward"
    peft = "RANDLORA"
    default_rate = 3e-4

    rank: int = 32
    alpha: float = 640.0
    root_scale: bool = False
    pairing: Literal["peft", "paper"] = "peft"
    bases: Literal["dense", "sparse", "very_sparse"] = "dense"
    projection: Literal["peft", "jax"] = "peft"
    projection_key: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(f"{self.name}: rank", self.rank, 1)

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        adapter = super().init(key, sites, base)
        return dataclasses.replace(adapter, frozen=adapter.frozen | {"shared": self.draw(sites)})

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        small = min(site.in_dim, site.out_dim)
        count = math.ceil(small / self.rank)
        gamma = jnp.full((count, small), 1 / max(count, small))
        return Factors({"lambda": jnp.zeros((self.rank, count)), "gamma": gamma})

    def shapes(self, sites: list[Site]) -> dict[str, tuple[int, ...]]:
        """Shapes of the shared A and B."""
        small, large = sorted((max(site.in_dim for site in sites), max(site.out_dim for site in sites)))
        return {"a": (self.rank, small), "b": (large, math.ceil(small / self.rank), self.rank)}

    def draw(self, sites: list[Site]) -> Bases:
        """The shared A and B."""
        shapes = self.shapes(sites)
        if self.projection == "jax":
            keys = dict(zip(shapes, jax.random.split(jax.random.key(self.projection_key)), strict=True))
            return {name: self.normalised(jax.random.uniform(keys[name], shapes[name]), shapes) for name in shapes}
        # The host draws them when the program runs: as constants they would be compiled into it.
        results = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
        return jax.pure_callback(lambda: self.peft_bases(shapes), results)

    def normalised(self, uniform: Any, shapes: dict[str, tuple[int, ...]]) -> Any:
        """Bases from numbers that are uniform in [0, 1)."""
        if self.bases == "dense":
            return (uniform - 0.5) / (uniform - 0.5).std(ddof=1)
        small = shapes["a"][1]
        tail = 1 / (2 * (3 if self.bases == "sparse" else math.sqrt(small)))
        signs = (uniform > 1 - tail).astype(np.float32) - (uniform < tail).astype(np.float32)
        return signs / signs.std(ddof=1)

    def peft_bases(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """A and then B from one stream of torch's generator; dense ones in bfloat16, each Bⱼ by itself."""
        draws = TorchDraws(self.projection_key)
        if self.bases != "dense":
            return {name: self.normalised(draws.uniform(0, 1, shape), shapes) for name, shape in shapes.items()}
        (rank, small), (large, count, _) = shapes["a"], shapes["b"]
        a = bfloat16_within(draws, small**-0.5, (rank, small))
        b = np.stack([bfloat16_within(draws, rank**-0.5, (large, rank)) for _ in range(count)], axis=1)
        return {"a": over_deviation(a), "b": over_deviation(b)}

    def pair(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array]:
        """`(in, r·n)` and `(r·n, out)` whose product is ΔW."""
        (inputs, outputs), small, large = shape, min(shape), max(shape)
        lambdas, gamma = factors["lambda"], factors["gamma"]
        count = gamma.shape[0]
        scale = self.alpha / self.rank / (math.sqrt(count) if self.root_scale else 1)
        scaled = scale * lambdas[:, :, None] * factors["a"][:, None, :small] * gamma  # (r, n, min)
        bases = factors["b"][:large, :count]  # (max, n, r)
        if self.pairing == "paper":
            bases = bases.swapaxes(1, 2)
        low, wide = scaled.reshape(-1, small), bases.reshape(large, -1)
        return (low.T, wide.T) if inputs <= outputs else (wide, low)

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        left, right = (each.astype(y.dtype) for each in self.pair(kernel.shape, factors))
        (inputs, inner), outputs, tokens = left.shape, right.shape[1], y.shape[0]
        if isinstance(x, Lookup) or tokens * inner * (inputs + outputs) <= inputs * outputs * (inner + tokens):
            return (x @ left) @ right
        built = lambda kernel, factors: self.delta(kernel, factors)
        return times_built(built, x, kernel, factors)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        left, right = self.pair(kernel.shape, factors)
        return left @ right


def bfloat16_within(draws: TorchDraws, bound: float, shape: tuple[int, ...]) -> np.ndarray:
    """`uniform_(-bound, bound)` of torch in bfloat16: what rounding lifts to the bound becomes its negative."""
    values, top = draws.uniform(-bound, bound, shape).astype(jnp.bfloat16), np.float32(bound).astype(jnp.bfloat16)
    return np.where(values == top, -top, values)


def over_deviation(values: np.ndarray) -> np.ndarray:
    """A bfloat16 array over its standard deviation, every step rounded to bfloat16; as float32."""
    deviation = values.astype(np.float64).std(ddof=1).astype(values.dtype)
    return (values / deviation).astype(np.float32)
