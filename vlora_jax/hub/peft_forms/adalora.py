"""AdaLoRA: `lora_A (k, in)`, `lora_E (k, 1)`, `lora_B (out, k)`, of the k triplets that `rank_pattern` leaves.

huggingface/peft, `tuners/adalora`. Without a `rank_pattern` all `init_r` are there. The scale is that of `init_r`,
however many are left. `r` and the switches of LoRA's scale have no effect.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from pydantic import Field

from vlora_jax.adapters.adalora import FACTORS, AdaLoRA
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.method import site_key
from vlora_jax.adapters.sites import Site
from vlora_jax.errors import AdapterFileError, ConversionError
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, plain
from vlora_jax.hub.peft_forms.lora import ASIDE, SWITCHES
from vlora_jax.hub.peft_modules import Modules

WITHOUT_EFFECT = ("r", "use_rslora", "lora_bias", "init_lora_weights", "alpha_pattern", "ensure_weight_tying")


class AdaLoraConfig(PeftConfig):
    """PEFT's `AdaLoraConfig`."""

    unsupported = frozenset((*SWITCHES, "use_dora", "trainable_token_indices"))
    ignored = frozenset((*ASIDE, *WITHOUT_EFFECT))
    only = "lora_only"

    init_r: int = Field(12, gt=0)
    target_r: int = Field(8, gt=0)
    lora_alpha: float = Field(8.0, allow_inf_nan=False)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    tinit: int = Field(0, ge=0)
    tfinal: int = Field(0, ge=0)
    deltaT: int = Field(1, gt=0)  # noqa: N815
    beta1: float = Field(0.85, gt=0, lt=1)
    beta2: float = Field(0.85, gt=0, lt=1)
    orth_reg_weight: float = Field(0.5, ge=0, allow_inf_nan=False)
    total_step: int = Field(gt=0)
    rank_pattern: dict[str, list[bool]] | None = None
    fan_in_fan_out: bool = False

    def fault(self) -> str | None:
        for key, mask in (self.rank_pattern or {}).items():
            if len(mask) != self.init_r:
                return f"rank_pattern[{key!r}] has {len(mask)} entries, init_r is {self.init_r}"
        return super().fault()

    def kept(self, place: Place) -> np.ndarray:
        """Which triplets of a module are in the file."""
        given = (self.rank_pattern or {}).get(key_of(place))
        return np.ones(self.init_r, bool) if given is None else np.array(given, bool)


def key_of(place: Place) -> str:
    """A module's key in `rank_pattern`."""
    return f"{place.name}.lora_E"


def options(config: AdaLoraConfig, places: Places) -> dict[str, Any]:
    keys = {key_of(place) for place in places.values()}
    strange = sorted(keys ^ set(config.rank_pattern if config.rank_pattern is not None else keys))
    if strange:
        raise AdapterFileError(f"rank_pattern and the adapted modules differ, as in {strange[0]}")
    return {
        "rank": config.init_r,
        "target_rank": config.target_r,
        "alpha": max(config.lora_alpha, 0.0),
        "dropout": config.lora_dropout,
        "steps": config.total_step,
        "warmup": config.tinit,
        "final": config.tfinal,
        "interval": config.deltaT,
        "mean_decay": config.beta1,
        "spread_decay": config.beta2,
        "orthogonality": config.orth_reg_weight,
    }


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: AdaLoRA = adapter.method
    if not method.steps:
        raise ConversionError("adalora: steps is 0; PEFT's config says how long the training is: set it")
    kept = {key_of(place): present(adapter, place).tolist() for place in places.values()}
    return {
        "init_r": method.rank,
        "target_r": method.target_rank,
        "lora_alpha": plain(method.alpha),
        "lora_dropout": method.dropout,
        "total_step": method.steps,
        "tinit": method.warmup,
        "tfinal": method.final,
        "deltaT": method.interval,
        "beta1": method.mean_decay,
        "beta2": method.spread_decay,
        "orth_reg_weight": method.orthogonality,
        "rank_pattern": None if all(map(all, kept.values())) else kept,
    }


def present(adapter: Adapter, place: Place) -> np.ndarray:
    """Which triplets of a module are not zero throughout."""
    layer = ... if place.layer is None else place.layer
    own = {name: np.asarray(adapter.factors(place.site.path)[name][layer]) for name in FACTORS}
    return (own["e"] != 0) | own["a"].any(0) | own["b"].any(1)


def leaves(method: AdaLoRA, config: AdaLoraConfig, place: Place) -> dict[str, Leaf]:
    site, kept = place.site, config.kept(place)
    k, side = int(kept.sum()), (*place.shape[2:], place.shape[1])  # of A of convolutions: files have channels first
    conv = len(place.shape) == 4
    of_a = lambda a: a.reshape(k, *side).transpose(0, 3, 1, 2).reshape(k, -1) if conv else a
    as_a = lambda a: a.reshape(k, side[-1], *side[:-1]).transpose(0, 2, 3, 1).reshape(k, -1) if conv else a

    def whole(columns: np.ndarray) -> np.ndarray:
        """All `init_r` columns, those that are not in the file zero."""
        full = np.zeros((len(columns), config.init_r), columns.dtype)
        full[:, kept] = columns
        return full

    return {
        "lora_A": Leaf("a", (k, site.in_dim), lambda a: of_a(a[:, kept].T), lambda a: whole(as_a(a).T)),
        "lora_E": Leaf("e", (k, 1), lambda e: e[kept][:, None], lambda e: whole(e.T)[0]),
        "lora_B": Leaf("b", (site.out_dim, k), lambda b: b[kept].T, lambda b: whole(b).T),
    }


def start(method: AdaLoRA, sites: Sequence[Site], leaves: Mapping[str, Any]) -> Adapter:
    """The method's own, but that a rank may be above a kernel's side, as in PEFT."""
    key = jax.random.key(0)
    factors = {site.path: method.init_stack(site_key(key, site.path), site) for site in sites}
    trainable, frozen = ({path: getattr(f, part) for path, f in factors.items()} for part in ("trainable", "frozen"))
    return Adapter.of(method, list(sites), trainable=trainable, frozen=frozen)


def finish(adapter: Adapter, config: AdaLoraConfig, places: Places, modules: Modules) -> Adapter:
    """With the choice that the file says."""
    sites = jax.tree.map(np.array, adapter.frozen["sites"])
    for place in places.values():
        sites[place.site.path]["alive"][... if place.layer is None else place.layer] = config.kept(place)
    sites = jax.tree.map(jax.numpy.asarray, sites)
    return dataclasses.replace(adapter, frozen=adapter.frozen | {"sites": sites})


def about(fields: Mapping[str, Any]) -> str:
    left = sum(map(sum, (fields.get("rank_pattern") or {}).values()))
    cut = f", {left} triplets left" if left else ""
    return f"Rank {fields['init_r']} at the start, {fields['target_r']} at the end, alpha {fields['lora_alpha']}{cut}"


ADALORA = Form(
    peft_type="ADALORA",
    method=AdaLoRA,
    config=AdaLoraConfig,
    options=options,
    fields=fields,
    leaves=leaves,
    start=start,
    finish=finish,
    about=about,
    patches=True,
)
