"""VB-LoRA: low-rank factors mixed from one bank of vectors (arXiv 2405.15179)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Factors, Product, site_key
from vlora_jax.adapters.options import check_least
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class VBLoRA(Product):
    """ΔW = A B, cut into sub-vectors of one length: each is a softmax mixture of the k bank vectors it rates highest.

    All sites share the trained bank `(vectors, length)`. A site trains logits, one row of them a sub-vector: of A
    `(r, in / length, vectors)`, of B `(out / length, r, vectors)`. Only the k chosen logits of a row have a gradient;
    what is chosen changes as they fall below others. There is no scale.

    Attributes:
      rank: r, inner size of A and B.
      vectors, length: the bank's size; the length must divide inputs and outputs.
      topk: k.
      dropout: share of A's inputs that is dropped in training.
      bank_bound: the bank starts uniform within ± this. Not at zero, where logits have no gradient: the model is
        therefore changed at the start, each entry of ΔW by the order of √r·bank_bound² / 6.
      logits_deviation: the logits start normal with this deviation.
      bank_rate: learning rate of the bank relative to that of the logits; the authors take 1e-3 and 1e-2.
    """

    name = "vblora"
    paper = "2405.15179"
    formula = "ΔW = A B, sub-vectors Σ softmax(top-k)·bank"
    trains = "r·vectors·(in + out) / length at a site, vectors·length once"
    size = "vectors"
    vertical = False
    verified = "PEFT"
    peft = "VBLORA"
    default_rate = 3e-2
    aside = Product.aside | {"bank_bound", "logits_deviation", "bank_rate"}

    rank: int = 4
    vectors: int = 256
    length: int = 256
    topk: int = 2
    dropout: float = 0.0
    bank_bound: float = 0.02
    logits_deviation: float = 0.1
    bank_rate: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("rank", "vectors", "length", "topk"):
            check_least(f"{self.name}: {field}", getattr(self, field), 1)
        if self.topk > self.vectors:
            raise ConfigError(f"{self.name}: topk is {self.topk}; the bank has {self.vectors} vectors")
        for field in ("bank_bound", "bank_rate"):
            if getattr(self, field) <= 0:
                raise ConfigError(f"{self.name}: {field} is {getattr(self, field)}; it must be positive")

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        adapter = super().init(key, sites, base)
        shape, bound = (self.vectors, self.length), self.bank_bound
        bank = jax.random.uniform(site_key(key, "bank"), shape, minval=-bound, maxval=bound)
        return adapter.with_trainable(adapter.trainable | {"shared": {"bank": bank}})

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        for size, side in ((site.in_dim, "inputs"), (site.out_dim, "outputs")):
            if size % self.length:
                near = [each for each in range(1, self.length) if site.in_dim % each == site.out_dim % each == 0][-1]
                raise ConfigError(
                    f"{self.name}: length {self.length} does not divide the {size} {side} of {site.path} {site.shape}; "
                    f"the largest that fits below it: {near}"
                )
        key_a, key_b = jax.random.split(key)
        shape_a = (self.rank, site.in_dim // self.length, self.vectors)
        shape_b = (site.out_dim // self.length, self.rank, self.vectors)
        draw = lambda key, shape: self.logits_deviation * jax.random.normal(key, shape)
        return Factors({"logits_a": draw(key_a, shape_a), "logits_b": draw(key_b, shape_b)})

    def mixed(self, logits: Float[Array, "*sub vectors"], bank: Array) -> Float[Array, "*sub length"]:
        """A mixture of bank vectors for each row of logits."""
        highest, chosen = jax.lax.top_k(logits, self.topk)
        return jnp.einsum("...k,...kv->...v", jax.nn.softmax(highest), bank[chosen])

    def pair(self, factors: FactorDict) -> tuple[Float[Array, "in r"], Float[Array, "r out"]]:
        a, b = (self.mixed(factors[name], factors["bank"]) for name in ("logits_a", "logits_b"))
        return a.reshape(self.rank, -1).T, b.swapaxes(0, 1).reshape(self.rank, -1)

    def groups(self, adapter: Adapter) -> Tree:
        groups = jax.tree.map(lambda _: "adapter", adapter.trainable)
        return groups | {"shared": {"bank": "bank"}}

    def rates(self) -> dict[str, float]:
        return {"bank": self.bank_rate}
