"""LN tuning: the norms only (arXiv 2312.11420)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlora_jax.adapters.selective import Selective
from vlora_jax.adapters.sites import LEAVES, Patterns


@dataclass(frozen=True, kw_only=True)
class LNTuning(Selective):
    """Scales and biases of every norm of the base trained as they are; all else is frozen.

    A norm is a module that has a parameter `scale` and no kernel: Flax's LayerNorm, RMSNorm, GroupNorm and BatchNorm,
    and the norms of the models here.

    Attributes:
      targets, exclude: which of them, as patterns over their paths or those of their modules; all by default.
      full: what is trained whole beside them, such as a new head.
    """

    name = "ln_tuning"
    paper = "2312.11420"
    formula = "γ, β of norms trained"
    trains = "every norm's scale and bias"
    verified = "PEFT"
    peft = "LN_TUNING"
    default_rate = 1e-2

    targets: Patterns = ".*"

    def whole(self, leaves: Mapping[str, Any]) -> list[str]:
        modules: dict[str, set[str]] = {}
        for path in leaves:
            module, _, name = path.rpartition("/")
            modules.setdefault(module, set()).add(name)
        norms = {module for module, names in modules.items() if "scale" in names and not names & set(LEAVES)}
        paths = [f"{module}/{name}".removeprefix("/") for module in norms for name in ("scale", "bias")]
        return self.chosen([path for path in leaves if path in paths], "norms", leaves)
