"""FourierFT: a few trained coefficients of the change's spectrum (arXiv 2405.03003)."""

import dataclasses
import functools
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
from vlora_jax.adapters.options import by_pattern, check_least, check_patterns, check_type
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.torch_draws import TorchDraws
from vlora_jax.adapters.trees import Tree
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError

SHUFFLED = 214_748_364  # from so many numbers on torch permutes in another way
EXACT = 2**16  # largest side whose place · frequency fits 32 bits
WAVES = 10  # tokens for which the products cost as much as making the sines: an estimate


@dataclass(frozen=True, kw_only=True)
class FourierFT(SiteMethod):
    """ΔWᵀ = scaling·Re(ifft2(S)): S `(out, in)` is zero but for n trained real coefficients.

    Their places are drawn without repetition from a seed, the same ones for all kernels of one shape, as PEFT draws
    them. The inverse transform divides by in·out, so that with one `scaling` larger kernels change less.

    Attributes:
      frequencies: n, at most in·out.
      frequencies_pattern: another n for the sites that a pattern matches, `{"mlp": 500}`.
      scaling: factor of the change; the paper takes 100 to 300 for widths of 768 and more.
      seed: chooses the places.
      start: `"zeros"`: the model is unchanged; `"normal"`: standard normal coefficients, the paper's start and PEFT's
        default, which changes the model at once: each entry of ΔW by about scaling·√(n/2) / (in·out).

    Building ΔW is a transform of about 2.5·in·out·log₂(in·out) multiplications a layer and step, whatever n is. As a
    product of sines and cosines, `(in, 2n)` and `(2n, out)`, it need not be built, at 2n·(in + out) a token: the
    forward pass takes what costs less. At 4096 × 4096 and n = 1000 the two are about equal.
    """

    name = "fourierft"
    decays = frozenset({"spectrum"})
    paper = "2405.03003"
    formula = "ΔWᵀ = scaling·Re(ifft2(S))"
    trains = "n"
    size = "frequencies"
    adds_up = True
    verified = "PEFT"
    cost = "builds ΔW by a Fourier transform, forward and backward, and takes the slope of all its entries"
    peft = "FOURIERFT"
    default_rate = 3e-2

    frequencies: int = 1000
    frequencies_pattern: Any = ()
    scaling: float = 150.0
    seed: int = 777
    start: Literal["zeros", "normal"] = "zeros"

    def __post_init__(self) -> None:
        super().__post_init__()
        named = {f"frequencies_pattern[{pattern!r}]": count for pattern, count in self.frequencies_pattern}
        for where, count in ({"frequencies": self.frequencies} | named).items():
            check_type(f"{self.name}: {where}", count, int)
            check_least(f"{self.name}: {where}", count, 1)

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        check_patterns(f"{self.name}: frequencies_pattern", self.frequencies_pattern, sites)
        return super().init(key, sites, base)

    def for_site(self, site: Site) -> "FourierFT":
        where = f"{self.name}: frequencies_pattern"
        count = by_pattern(where, self.frequencies_pattern, site, self.frequencies)
        return dataclasses.replace(self, frequencies=count, frequencies_pattern=())

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        where, size = f"{site.path} {site.shape}", site.in_dim * site.out_dim
        if self.frequencies > size:
            raise ConfigError(
                f"{self.name}: frequencies {self.frequencies} is above the {size} numbers of {where}; "
                f"lower it there with frequencies_pattern, or exclude the site"
            )
        if size >= SHUFFLED:
            raise ConfigError(
                f"{self.name}: {where} has {size} numbers; PEFT's places are known below {SHUFFLED}: exclude it"
            )
        shape = (self.frequencies,)
        return Factors({"spectrum": jnp.zeros(shape) if self.start == "zeros" else jax.random.normal(key, shape)})

    def places(self, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Rows `(n,)`, along the outputs, and columns `(n,)`, along the inputs, of the coefficients in S."""
        inputs, outputs = shape
        return np.divmod(permuted(inputs * outputs, self.frequencies, self.seed), inputs)

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        inputs, outputs = kernel.shape
        built = inputs * outputs * (y.shape[0] + 2.5 * math.log2(inputs * outputs))
        product = 2 * self.frequencies * (inputs + outputs) * (y.shape[0] + WAVES)
        if isinstance(x, Lookup):
            return x @ self.delta(kernel, factors).astype(y.dtype)
        if max(kernel.shape) > EXACT or built < product:
            return times_built(self.delta, x, kernel, factors)
        left, right = (each.astype(y.dtype) for each in self.pair(kernel.shape, factors))
        return (x @ left) @ right

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        rows, columns = self.places(kernel.shape)
        spectrum = jnp.zeros(kernel.shape[::-1], jnp.float32).at[rows, columns].add(factors["spectrum"])
        return self.scaling * jnp.fft.ifft2(spectrum).real.T

    def pair(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array]:
        """`(in, 2n)` and `(2n, out)` whose product is ΔW: cos(a + b) = cos a cos b - sin a sin b."""
        (inputs, outputs), (rows, columns) = shape, self.places(shape)
        left, right = waves(inputs, columns), waves(outputs, rows)
        weights = self.scaling / (inputs * outputs) * factors["spectrum"]
        return jnp.concatenate(left, axis=1), jnp.concatenate([right[0] * weights, -right[1] * weights], axis=1).T

    def flops(self, site: Site) -> tuple[float, float]:
        kernel = 1.0 * site.in_dim * site.out_dim
        product = 4.0 * self.frequencies * (site.in_dim + site.out_dim)
        return min(product, 2 * kernel), 5 * kernel * math.log2(kernel)

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array] | None:
        thin = 2 * self.frequencies < min(shape) and max(shape) <= EXACT
        return self.pair(shape, factors) if thin else None

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        return {"spectrum": weights @ factors["spectrum"]}


def waves(size: int, frequencies: np.ndarray) -> tuple[Float[Array, "size n"], Float[Array, "size n"]]:
    """Cosine and sine of 2π·place·frequency / size, the whole turns taken off in integers."""
    turns = jnp.arange(size, dtype=jnp.uint32)[:, None] * jnp.asarray(frequencies, jnp.uint32) % size
    angles = (2 * math.pi / size) * turns.astype(jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


@functools.lru_cache(maxsize=64)
def permuted(total: int, count: int, seed: int) -> np.ndarray:
    """The first `count` entries of `torch.randperm(total)` under a seed, for `total` below SHUFFLED.

    A Fisher–Yates shuffle that stops after `count` swaps and remembers only the places that moved.

    >>> permuted(4096, 6, 777).tolist()
    [2151, 945, 3161, 4091, 1983, 1566]
    """
    moved: dict[int, int] = {}
    chosen = np.empty(count, np.int64)
    for place, word in enumerate(TorchDraws(seed).words(count).tolist()):
        other = place + int(word) % (total - place)
        chosen[place] = moved.get(other, other)
        moved[other] = moved.get(place, place)
    chosen.flags.writeable = False
    return chosen
