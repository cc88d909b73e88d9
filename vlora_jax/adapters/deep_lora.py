"""Deep LoRA: a product of three and more factors, and its compression (arXiv 2406.04112)."""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.factorise import one_at_a_time, qr, svd
from vlora_jax.adapters.method import Factors, LowRank, Method, one_by_one
from vlora_jax.adapters.options import check_least, check_rank
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError

Form = Literal["narrow", "wide", "widest", "compressed"]


@dataclass(frozen=True, kw_only=True)
class DeepLoRA(LowRank):
    """ΔW = F_N … F_1, or compressed ΔW = P M_N … M_1 Qᵀ; no scale and no dropout.

    `F_N (in, w)`, `F_j (w, w)`, `F_1 (w, out)` are `fN` … `f1`. They start (semi-)orthogonal times ε, so that
    ‖ΔW‖₂ = ε^N: not zero, but below what float32 keeps of a kernel. Depth 2 is the authors' "vanilla LoRA":
    F_2 zero, F_1 standard normal.

    `P (in, k)`, `M_j (k, k)` and Qᵀ `(k, out)` are `p`, `mN` … `m1` and `q`; see `compress`.

    The authors train with AdamW at 1e-4 and eps 1e-6, without decay. Their numbers on GLUE and STS-B are of the wide
    form. Their code has an empty licence: this is written from the formulas.

    Attributes:
      depth: N.
      form: `"narrow"` w = rank; `"wide"` w = min(in, out), as in the runs behind the paper; `"widest"`
        w = max(in, out), as in the repository's later code; `"compressed"`, which training and `compress` make of a
        wide one and its gradient on the first batch.
      rank: of the narrow form, and k of the compressed one, which is even.
      epsilon: ε.
      frame_rate: learning rate of P and Q relative to the M_j's (the paper's γ); 0 freezes them.
    """

    name = "deep_lora"
    paper = "2406.04112"
    formula = "ΔW = F_N … F_1, or P M_N … M_1 Qᵀ"
    trains = "narrow r·(in + out) + (N-2)·r²; wide with w for r; compressed k·(in + out) + N·k²"
    adds_up = True
    verified = "NumPy"
    default_rate = 3e-3
    aside = LowRank.aside | {"epsilon", "frame_rate"}

    depth: int = 3
    form: Form = "narrow"
    rank: int = 8
    epsilon: float = 1e-3
    frame_rate: float = 1e-2

    def __post_init__(self) -> None:
        super().__post_init__()
        least = {"depth": 3 if self.form == "compressed" else 2, "rank": 1}
        for field, value in least.items():
            check_least(f"{self.name}: {field}", getattr(self, field), value)
        if self.form == "compressed" and self.rank % 2:
            raise ConfigError(f"{self.name}: rank is {self.rank}; it must be even in the compressed form")
        if self.epsilon <= 0:
            raise ConfigError(f"{self.name}: epsilon is {self.epsilon}; it must be positive")
        if self.frame_rate < 0:
            raise ConfigError(f"{self.name}: frame_rate is {self.frame_rate}; it must not be negative")

    @property
    def opening(self) -> Method:
        """A wide one, whose gradient says which directions compression keeps."""
        return replace(self, form="wide") if self.form == "compressed" else self

    def opened(self, adapter: Adapter, gradients: Tree) -> Adapter:
        return compress(adapter, gradients) if self.form == "compressed" else adapter

    @property
    def names(self) -> list[str]:
        """The factors in the order of their product."""
        if self.form == "compressed":
            return ["p", *(f"m{j}" for j in range(self.depth, 0, -1)), "q"]
        return [f"f{j}" for j in range(self.depth, 0, -1)]

    def width(self, site: Site) -> int:
        """The inner size w of a site.

        Raises:
          ConfigError: the rank is above the kernel's smaller side, or w would be an embedding's vocabulary.
        """
        smaller, larger = sorted((site.in_dim, site.out_dim))
        if self.form in ("narrow", "compressed"):
            check_rank(self.name, self.rank, site)
        if self.form == "widest" and site.kind == "embed":
            raise ConfigError(f"{self.name}: form widest on the embedding {site.path} {site.shape}; exclude it")
        return {"wide": smaller, "widest": larger}.get(self.form, self.rank)

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        if self.form == "compressed":
            raise ConfigError(
                f"{self.name}: form compressed starts from a gradient, as training does; otherwise start with form "
                f"wide, and give it and its gradient to vlora_jax.adapters.deep_lora.compress"
            )
        sides = [site.in_dim, *[self.width(site)] * (self.depth - 1), site.out_dim]
        shapes = dict(zip(self.names, itertools.pairwise(sides), strict=True))
        if self.depth == 2:
            return Factors({"f2": jnp.zeros(shapes["f2"]), "f1": jax.random.normal(key, shapes["f1"])})
        draw = jax.nn.initializers.orthogonal(self.epsilon)
        keys = jax.random.split(key, self.depth)
        drawn = lambda name: one_at_a_time(lambda key: draw(key, shapes[name]))
        return Factors({name: drawn(name)(key) for name, key in zip(shapes, keys, strict=True)})

    def product(self, factors: FactorDict, start: int = 0, end: int | None = None) -> Array:
        """Of the factors from place `start` to `end`."""
        return functools.reduce(jnp.matmul, [factors[name] for name in self.names[start:end]])

    def down(self, factors: FactorDict) -> Float[Array, "in w"]:
        return factors[self.names[0]]

    def up(self, xa: Float[Array, "tokens w"], x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        return functools.reduce(lambda z, name: z @ factors[name].astype(z.dtype), self.names[1:], xa)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        return self.product(factors)

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array]:
        return self.down(factors), self.product(factors, 1)

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        first, *middle, last = self.names
        start, end = factors[first], factors[last] * weights[:, None, None]
        blocks = {name: jax.scipy.linalg.block_diag(*factors[name]) for name in middle}
        ends = {first: start.transpose(1, 0, 2).reshape(start.shape[1], -1), last: end.reshape(-1, end.shape[2])}
        return ends | blocks

    def groups(self, adapter: Adapter) -> Tree:
        groups = jax.tree.map(lambda _: "adapter", adapter.trainable)
        of_site = lambda names: {name: "frame" if name in ("p", "q") else "adapter" for name in names}
        return groups | {"sites": {path: of_site(names) for path, names in groups["sites"].items()}}

    @property
    def usual_rate(self) -> float:
        """The default suits the narrow form; wide factors move a kernel further, those of the compressed one less."""
        return {"narrow": self.default_rate, "compressed": 1e-2}.get(self.form, LowRank.default_rate)

    def rates(self) -> dict[str, float]:
        return {"frame": self.frame_rate} if self.frame_rate else {}


def compress(adapter: Adapter, gradients: Tree) -> Adapter:
    """A wide Deep LoRA at its start as the compressed form: all that gradient descent would move, in k dimensions.

    P and Q span what the gradient of one batch reaches, found on the kernel's longer side: taken on the shorter one the
    other side's share would be lost. On a square kernel the compressed form with frozen P and Q follows the wide one
    to ε^N; on other shapes it reaches the same end at its own pace.

    >>> from flax import nnx
    >>> from vlora_jax import apply, init, split
    >>> graphdef, base = split(nnx.Linear(6, 4, rngs=nnx.Rngs(0)))
    >>> adapter = init(DeepLoRA(form="wide", rank=2), jax.random.key(0), base)
    >>> loss = lambda trainable: (apply(graphdef, base, adapter.with_trainable(trainable), jnp.ones((1, 6))) ** 2).sum()
    >>> compressed = jax.jit(compress)(adapter, jax.grad(loss)(adapter.trainable))
    >>> {name: factor.shape for name, factor in sorted(compressed.factors("").items())}
    {'m1': (2, 2), 'm2': (2, 2), 'm3': (2, 2), 'p': (6, 2), 'q': (2, 4)}

    Args:
      adapter: of form wide or widest and depth 3 or more, as `init` made it; its method's rank is k, its frame_rate
        decides whether P and Q train.
      gradients: of a batch's loss with respect to `adapter.trainable`, without dropout.

    Returns:
      An adapter whose method has form compressed.

    Raises:
      ConfigError: the adapter is of another method or form, or k is odd or above a kernel's smaller side.
    """
    wide = adapter.method
    if not isinstance(wide, DeepLoRA) or wide.form not in ("wide", "widest"):
        form = f"{wide.name}, form {wide.form}" if isinstance(wide, DeepLoRA) else wide.name
        raise ConfigError(f"compress takes deep_lora of form wide or widest, not {form}")
    method = replace(wide, form="compressed")
    trainable, frozen = {}, {}
    for site in adapter.sites:
        method.width(site)
        of_layer = one_by_one(functools.partial(_frames, wide), len(site.stack))
        with jax.default_matmul_precision("highest"):
            p, q = of_layer(adapter.trainable["sites"][site.path], gradients["sites"][site.path])
        eye, square = method.epsilon * jnp.eye(method.rank, dtype=p.dtype), (*site.stack, method.rank, method.rank)
        trainable[site.path] = {name: jnp.broadcast_to(eye, square) for name in method.names[1:-1]}
        (trainable if method.frame_rate else frozen).setdefault(site.path, {}).update(p=p, q=q)
    made = Adapter.of(method, list(adapter.sites), trainable=trainable, frozen=frozen)
    return made.with_trainable(made.trainable | {"full": adapter.trainable["full"]})


def _frames(wide: DeepLoRA, factors: FactorDict, gradients: FactorDict) -> tuple[Array, Array]:
    """P `(in, k)` and Qᵀ `(k, out)` of one layer."""
    half = wide.rank // 2
    unit = {name: factor / wide.epsilon for name, factor in factors.items()}  # E / ε^N underflows in float32
    whole, first, last = wide.product(unit), wide.names[0], wide.names[-1]
    if whole.shape[1] >= whole.shape[0]:
        q = _basis(gradients[last], unit[last], half)
        return whole @ q, q.T
    p = _basis(gradients[first].T, unit[first].T, half)
    return p, (whole.T @ p).T


def _basis(gradient: Float[Array, "w side"], factor: Float[Array, "w side"], half: int) -> Float[Array, "side k"]:
    """An orthonormal basis of the gradient's leading directions and of those that the factor maps to its left ones."""
    u, _, v = svd(gradient)
    return qr(jnp.concatenate([v[:half].T, factor.T @ u[:, :half]], axis=1))[0]
