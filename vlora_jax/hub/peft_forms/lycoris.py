"""LoHa and LoKr: `hada_w1_a (out, r)`, `hada_w1_b (r, in)` and so on, ours transposed, outputs first.

huggingface/peft, `tuners/lycoris_utils.py`, `tuners/loha`, `tuners/lokr`.
"""

import math
from typing import Any

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.loha import LoHa
from vlora_jax.adapters.lokr import LoKr
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, turned
from vlora_jax.hub.peft_forms.ranked import RankedConfig, fields_of, options_of

LOHA_LEAVES = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}
LOKR_LEAVES = {
    "w1": "lokr_w1", "b1": "lokr_w1_a", "a1": "lokr_w1_b", "w2": "lokr_w2", "b2": "lokr_w2_a", "a2": "lokr_w2_b",
}  # fmt: skip


class LycorisConfig(RankedConfig):
    """What PEFT's `LoHaConfig` and `LoKrConfig` have in common; the dropouts are of training only, and not ours."""

    lacks = frozenset({"bias"})
    ignored = frozenset({"rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"})

    alpha: float = 8.0
    alpha_pattern: dict[str, float] | None = None

    def fault(self) -> str | None:
        alphas = {f"alpha_pattern[{pattern!r}]": alpha for pattern, alpha in (self.alpha_pattern or {}).items()}
        for where, alpha in ({"alpha": self.alpha} | alphas).items():
            if not math.isfinite(alpha) or alpha == 0:
                return f"{where} is {alpha}; it must be finite and not 0"
        return super().fault()


class LoKrConfig(LycorisConfig):
    """PEFT's `LoKrConfig`."""

    ignored = LycorisConfig.ignored | {"rank_dropout_scale"}

    decompose_both: bool = False
    decompose_factor: int = -1


def options(config: LycorisConfig, places: Places) -> dict[str, Any]:
    return options_of(config, places, ["alpha"])


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    return fields_of(adapter.method, places, ["alpha"])


def loha_leaves(method: LoHa, config: LycorisConfig, place: Place) -> dict[str, Leaf]:
    rank, site = method.rank, place.site
    shapes = {"a": (rank, site.in_dim), "b": (site.out_dim, rank)}
    return {name: turned(factor, shapes[factor[0]]) for factor, name in LOHA_LEAVES.items()}


def lokr_options(config: LoKrConfig, places: Places) -> dict[str, Any]:
    how = {"decompose_both": config.decompose_both, "decompose_factor": config.decompose_factor}
    return options(config, places) | how


def lokr_fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: LoKr = adapter.method
    how = {"decompose_both": method.decompose_both, "decompose_factor": method.decompose_factor}
    return fields(adapter, places, targets) | how


def lokr_leaves(method: LoKr, config: LoKrConfig, place: Place) -> dict[str, Leaf]:
    return {LOKR_LEAVES[name]: turned(name, (shape[1], shape[0])) for name, shape in method.parts(place.site).items()}


LOHA = Form(
    peft_type="LOHA",
    method=LoHa,
    config=LycorisConfig,
    options=options,
    fields=fields,
    leaves=loha_leaves,
    turned=False,
)
LOKR = Form(
    peft_type="LOKR",
    method=LoKr,
    config=LoKrConfig,
    options=lokr_options,
    fields=lokr_fields,
    leaves=lokr_leaves,
    turned=False,
)
