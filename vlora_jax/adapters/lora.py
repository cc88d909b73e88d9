"""LoRA: low-rank adaptation (arXiv 2106.09685), rank-stabilised LoRA (2312.03732), LoRA+ (2402.12354)."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors, Product
from vlora_jax.adapters.options import by_pattern, check_patterns, check_rank, check_type, is_table
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError

Start = Literal["zero_b", "gaussian", "kaiming_both", "xavier_both"]
ONE_OF_MANY: dict[str, Any] = {  # options that gains, starts and rates have taken the place of
    "targets": "all-linear", "exclude": None, "rank": 1, "alpha": 1.0, "rank_stabilised": False, "rank_pattern": (),
    "alpha_pattern": (), "start": "zero_b", "b_rate": 1.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoRA(Product):
    """ΔW = s·A B with s = alpha / rank, or alpha / √rank if `rank_stabilised`.

    Attributes:
      rank: inner size r of `A (in, r)` and `B (r, out)`.
      alpha: numerator of the scale s.
      rank_stabilised: divide alpha by √rank (rsLoRA).
      dropout: share of A's inputs that is dropped in training; the frozen path never sees it.
      rank_pattern, alpha_pattern: other values for the sites that a pattern matches, `{"mlp": 4}`; of stacked layers
        also a list with one value a layer, `{"mlp/up": [4, 8, 0]}`: a layer of rank 0 is not adapted. The largest rank
        is allocated in all of them.
      start: `"zero_b"`: A uniform in ±1/√in, B zero, so that the model is unchanged (on an embedding A is zero
        and B standard normal); `"gaussian"`: A normal with deviation 1/r, B zero; `"kaiming_both"`: A as above,
        B uniform in ±1/√out; `"xavier_both"`: A uniform in ±√(6/(r + in)), B in ±√(6/(r + out)). The last two
        are the starts of vertical increments (arXiv 2406.09315) and change the model at once.
      bias: train a bias of B as well, so that the layer's bias changes by s·bias (PEFT's `lora_bias`).
      b_rate: learning rate of B relative to A's (LoRA+); 1 is plain LoRA. A run that gives no rate takes LoRA's ÷
        √b_rate. PEFT's LoRA+ trains an embedding's factors at 1e-6; here they learn as all others do, unless
        `optimizer.groups` of the run's config gives them a relative rate, `{"embed": 0.001}`.

    Where layers differ in rank or alpha, a frozen `gain (r,)` a layer takes the place of s: s of that layer in its
    first entries, zero beyond its rank.
    """

    name = "lora"
    decays = frozenset({"a", "b"})
    paper = "2106.09685"
    formula = "ΔW = s·A B"
    trains = "r·(in + out)"
    adds_up = True
    verified = "PEFT"
    peft = "LORA"
    aside = Product.aside | {"b_rate"}

    rank: int = 8
    alpha: float = 16.0
    rank_stabilised: bool = False
    dropout: float = 0.0
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    start: Start = "zero_b"
    bias: bool = False
    b_rate: float = 1.0

    def __post_init__(self) -> None:
        for field in ("rank_pattern", "alpha_pattern"):  # lists become tuples: a method is hashable
            table = getattr(self, field)
            if is_table(table):
                pairs = table.items() if isinstance(table, Mapping) else table
                pairs = tuple((pattern, tuple(v) if isinstance(v, list) else v) for pattern, v in pairs)
                object.__setattr__(self, field, pairs)
        super().__post_init__()
        for where, rank, least in (("rank", self.rank, 1), *_named("rank_pattern", self.rank_pattern)):
            check_type(f"{self.name}: {where}", rank, int)
            if rank < least:
                raise ConfigError(f"{self.name}: {where} is {rank}; it must be at least {least}")
        for where, alpha, _ in _named("alpha_pattern", self.alpha_pattern):
            check_type(f"{self.name}: {where}", alpha, float)
        if self.b_rate <= 0:
            raise ConfigError(f"{self.name}: b_rate is {self.b_rate}; it must be positive")

    @property
    def scale(self) -> float:
        return self.scale_of(self.rank, self.alpha)

    def scale_of(self, rank: int, alpha: float) -> float:
        """S of a rank and alpha; 0 without a rank."""
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank) if rank else 0.0

    @property
    def varies(self) -> bool:
        """Whether layers of one site differ in rank or alpha."""
        return any(isinstance(value, tuple) for _, value in (*self.rank_pattern, *self.alpha_pattern))

    def by_layer(self, site: Site) -> list[tuple[int, float]]:
        """Rank and alpha of every layer of a site; a layer of rank 0 is not adapted."""
        columns = []
        for field, default in (("rank_pattern", self.rank), ("alpha_pattern", self.alpha)):
            value = by_pattern(f"{self.name}: {field}", getattr(self, field), site, default)
            values = value if isinstance(value, tuple) else (value,) * site.layers
            if len(values) != site.layers:
                raise ConfigError(
                    f"{self.name}: {field} lists {len(values)} values for {site.path}, which has {site.layers} layers"
                )
            columns.append(values)
        return list(zip(*columns, strict=True))

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        check_patterns(f"{self.name}: rank_pattern", self.rank_pattern, sites)
        check_patterns(f"{self.name}: alpha_pattern", self.alpha_pattern, sites)
        return super().init(key, sites, base)

    def for_site(self, site: Site) -> "LoRA":
        layers = self.by_layer(site)
        return dataclasses.replace(
            self, rank=max(rank for rank, _ in layers), alpha=layers[0][1], rank_pattern=(), alpha_pattern=()
        )

    def init_stack(self, key: PRNGKeyArray, site: Site, kernel: Array | None = None) -> Factors:
        layers = self.by_layer(site)
        self.check_rank(site)
        if self.bias and site.kind == "embed":
            raise ConfigError(f"{self.name}: bias: {site.path} is an embedding, which has none; exclude it")
        factors = super().init_stack(key, site, kernel)
        if len(set(layers)) == 1:
            return factors
        gain = self.gain(site)
        alive = (gain != 0).astype(jnp.float32)
        masks = {"a": alive[..., None, :], "b": alive[..., :, None]}
        masked = {name: value * masks.get(name, 1.0) for name, value in factors.trainable.items()}
        return Factors(masked, {"gain": gain})

    def check_rank(self, site: Site) -> None:
        """Raises ConfigError if a site's rank is above the smaller side of its kernel."""
        check_rank(self.name, max(rank for rank, _ in self.by_layer(site)), site, has_table=True)

    def gain(self, site: Site) -> Float[Array, "*stack r"]:
        """S of each layer in the places below its rank, zero above."""
        layers = self.by_layer(site)
        places = np.arange(max(rank for rank, _ in layers))
        rows = [np.where(places < rank, self.scale_of(rank, alpha), 0.0) for rank, alpha in layers]
        return jnp.asarray(np.stack(rows).reshape(*site.stack, -1), jnp.float32)

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        key_a, key_b = jax.random.split(key)
        shape_a, shape_b = (site.in_dim, self.rank), (self.rank, site.out_dim)
        bias = {"bias": jnp.zeros(site.out_dim)} if self.bias else {}
        if self.start == "zero_b" and site.kind == "embed":
            return Factors({"a": jnp.zeros(shape_a), "b": jax.random.normal(key_b, shape_b)} | bias)
        if self.start == "gaussian":
            return Factors({"a": jax.random.normal(key_a, shape_a) / self.rank, "b": jnp.zeros(shape_b)} | bias)
        xavier = self.start == "xavier_both"
        bound_a = math.sqrt(6 / (self.rank + site.in_dim)) if xavier else site.in_dim**-0.5
        bound_b = math.sqrt(6 / (self.rank + site.out_dim)) if xavier else site.out_dim**-0.5
        if self.start == "zero_b":
            bound_b = 0.0
        a = jax.random.uniform(key_a, shape_a, minval=-bound_a, maxval=bound_a)
        b = jax.random.uniform(key_b, shape_b, minval=-bound_b, maxval=bound_b) if bound_b else jnp.zeros(shape_b)
        return Factors({"a": a, "b": b} | bias)

    def up(self, xa: Float[Array, "tokens r"], x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        change, shift = super().up(xa, x, y, kernel, factors), self.shift(factors)
        return change if shift is None else change + shift.astype(xa.dtype)

    def shift(self, factors: FactorDict) -> Float[Array, " out"] | None:
        scale = factors["gain"][0] if "gain" in factors else self.scale
        return scale * factors["bias"] if self.bias else None

    def pair(self, factors: FactorDict) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        """A, and B with the scale: their product is s·A B."""
        scale = factors["gain"][:, None] if "gain" in factors else self.scale
        return factors["a"], scale * factors["b"]

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        a, b = factors["a"], factors["b"] * weights[:, None, None]
        return {"a": a.transpose(1, 0, 2).reshape(a.shape[1], -1), "b": b.reshape(-1, b.shape[2])}

    def joined(self) -> "LoRA":
        return dataclasses.replace(self, **ONE_OF_MANY)

    def join(self, adapter: Adapter) -> Adapter:
        gains = {site.path: {"gain": self.gain(site)} for site in adapter.sites}
        frozen = {path: adapter.frozen["sites"].get(path, {}) | gain for path, gain in gains.items()}
        return dataclasses.replace(adapter, frozen=adapter.frozen | {"sites": frozen}, method=self.joined())

    def groups(self, adapter: Adapter) -> Tree:
        groups = jax.tree.map(lambda _: "adapter", adapter.trainable)
        of_site = lambda names: {name: "a" if name == "a" else "b" for name in names}
        groups["sites"] = {path: of_site(names) for path, names in groups["sites"].items()}
        return groups

    @property
    def usual_rate(self) -> float:
        """Lower as B's is higher, so that their product, and with it the pace of ΔW = A B, is plain LoRA's."""
        return self.default_rate / math.sqrt(self.b_rate)

    def rates(self) -> dict[str, float]:
        return {"b": self.b_rate}


def _named(field: str, table: Any) -> list[tuple[str, Any, int]]:
    """Every value of a table with its place, and the least rank that is allowed there."""
    named = []
    for pattern, value in table:
        if isinstance(value, tuple) and any(value):
            named += [(f"{field}[{pattern!r}][{layer}]", each, 0) for layer, each in enumerate(value)]
        else:
            named.append((f"{field}[{pattern!r}]", value, 1))
    return named
