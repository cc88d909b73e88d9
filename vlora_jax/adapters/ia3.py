"""IA³: infused adapter by inhibiting and amplifying inner activations (arXiv 2205.05638)."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.options import check_patterns, pattern_selects
from vlora_jax.adapters.sites import Patterns, Site, as_patterns
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.adapters.view import Lookup
from vlora_jax.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """W' = W diag(l): every output of a layer is scaled, its bias as well; W' = diag(l) W at sites of `feedforward`.

    `l (out,)`, or `l (in,)` where inputs are scaled, starts at one, so that the model is unchanged. The paper (section
    3.3) scales keys, values and the inner activations of the feed-forward network, which is the input of its second
    layer: `targets=["k", "v", "down"], feedforward="down"`.

    A layer's bias is copied from the base when the adapter starts. A site of `feedforward` needs a second product with
    its kernel, in·out multiplications a token.

    Attributes:
      feedforward: the sites whose input is scaled, as patterns; none without it.
    """

    name = "ia3"
    paper = "2205.05638"
    formula = "W' = W diag(l), b' = b ⊙ l"
    trains = "out, or in"
    vertical = False
    verified = "PEFT"
    peft = "IA3"
    default_rate = 1e-2
    reads_output = True

    feedforward: Patterns | None = None

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        check_patterns("ia3: feedforward", tuple((pattern, True) for pattern in as_patterns(self.feedforward)), sites)
        leaves, trainable, frozen = flatten(base), {}, {}
        for site in sites:
            if self.scales_input(site):
                trainable[site.path] = {"l_in": jnp.ones((*site.stack, site.in_dim))}
            else:
                trainable[site.path] = {"l_out": jnp.ones((*site.stack, site.out_dim))}
                frozen[site.path] = self.bias_of(site, leaves)
        return Adapter.of(self, sites, trainable=trainable, frozen=frozen)

    def scales_input(self, site: Site) -> bool:
        return any(pattern_selects(pattern, site) for pattern in as_patterns(self.feedforward))

    def bias_of(self, site: Site, leaves: dict[str, Any]) -> FactorDict:
        """The base's bias at a site, `(*stack, out)`; nothing where it has none.

        Raises:
          ConfigError: the bias is not one of each layer.
        """
        path = f"{site.path}/bias" if site.path else "bias"
        if path not in leaves:
            return {}
        shape = (*site.stack, *site.out_shape)
        if site.stack_axis or leaves[path].shape != shape:
            raise ConfigError(
                f"ia3: {path} is {leaves[path].shape}, not {shape} with layers first; exclude {site.path}, or scale "
                f"its input with feedforward"
            )
        return {"bias": leaves[path].astype(jnp.float32).reshape(*site.stack, site.out_dim)}

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Float[Array, "tokens out"]:
        if "l_in" not in factors:
            bias = factors["bias"].astype(y.dtype) if "bias" in factors else 0
            return (y + bias) * (factors["l_out"] - 1).astype(y.dtype)
        gain = (factors["l_in"] - 1).astype(y.dtype)
        if isinstance(x, Lookup):  # an embedding lookup: rows of the table scaled
            return (x @ gain[:, None]) * y
        return (x * gain) @ kernel.astype(y.dtype)

    def delta(self, kernel: Array, factors: FactorDict) -> Float[Array, "in out"]:
        if "l_in" in factors:
            return (factors["l_in"] - 1)[:, None] * kernel
        return kernel * (factors["l_out"] - 1)

    def shift(self, factors: FactorDict) -> Float[Array, " out"] | None:
        return factors["bias"] * (factors["l_out"] - 1) if "bias" in factors else None
