"""Parameters of the base trained as they are, with nothing added: probes, biases, norms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Patterns, Site, as_patterns
from vlora_jax.adapters.trees import Tree, matching
from vlora_jax.errors import ConfigError, TargetError


@dataclass(frozen=True, kw_only=True)
class Selective(Method):
    """θ[full] trained: all that `full` names starts as it is in the base and is trained whole, the rest is frozen.

    `full="head"` is a linear probe, `full=".*"` full fine-tuning kept as an adapter. There are no sites, so `targets`
    and `exclude` have no meaning. `BitFit` and `LNTuning` find what they train by themselves.
    """

    name = "selective"
    paper = "2303.15647"  # a survey, which calls such methods so
    formula = "θ[full] trained"
    trains = "what full names"
    vertical = False
    on_sites = False
    verified = "NumPy"

    targets: Patterns = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self).whole is not Method.whole:  # it finds what it trains, and targets choose among that
            return
        if as_patterns(self.targets) or as_patterns(self.exclude):
            raise ConfigError("selective: targets and exclude choose kernels to adapt; it trains what full names")
        if not as_patterns(self.full):
            raise ConfigError("selective: full is empty, so that nothing would be trained; a linear probe is full=head")

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        return Adapter.of(self, [], trainable={})

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        return jnp.zeros_like(y)  # it changes no site

    def chosen(self, found: list[str], what: str, leaves: Mapping[str, Any]) -> list[str]:
        """Of the paths that a model has of something, those that `targets` selects and `exclude` does not.

        Patterns match paths of parameters or of their modules.

        Raises:
          ConfigError: the model has none.
          TargetError: a pattern selects none of them, or none is left.
        """
        if not found:
            some = ", ".join([*leaves][:3]) + (", …" if len(leaves) > 3 else "")
            raise ConfigError(
                f"{self.name}: this model has no {what} (it has {some}); train others by name, method selective"
            )
        either = [*found, *dict.fromkeys(path.rpartition("/")[0] for path in found)]
        hits, dropped = (
            {path for pattern in as_patterns(patterns) for path in matching(pattern, either, f"{self.name}: {role}")}
            for patterns, role in ((self.targets, "target"), (self.exclude, "exclude"))
        )
        left = [p for p in found if {p, p.rpartition("/")[0]} & hits and not {p, p.rpartition("/")[0]} & dropped]
        if not left:
            raise TargetError(f"{self.name}: targets select nothing once {list(as_patterns(self.exclude))} is excluded")
        return left
