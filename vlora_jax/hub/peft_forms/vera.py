"""VeRA: `vera_lambda_d (r,)`, `vera_lambda_b (out,)`, and A and B beside the model, unless they are left to the seed.

huggingface/peft, `tuners/vera`.
"""

from typing import Any

import numpy as np
from pydantic import Field

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.vera import VeRA, peft_projections
from vlora_jax.errors import ConversionError
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, turned


class VeraConfig(PeftConfig):
    """PEFT's `VeraConfig`."""

    lacks = frozenset({"exclude_modules"})
    ignored = frozenset({"init_weights"})
    only = "vera_only"

    r: int = Field(256, gt=0)
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = Field(0.0, ge=0, lt=1)
    d_initial: float = 0.1
    fan_in_fan_out: bool = False


def options(config: VeraConfig, places: Places) -> dict[str, Any]:
    return {
        "rank": config.r,
        "d_start": config.d_initial,
        "dropout": config.vera_dropout,
        "projection_key": config.projection_prng_key,
        "save_projection": config.save_projection,
    }


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: VeRA = adapter.method
    _check_projections(adapter, sides_of(places))
    return {
        "r": method.rank,
        "projection_prng_key": method.projection_key,
        "save_projection": method.save_projection,
        "vera_dropout": method.dropout,
        "d_initial": method.d_start,
    }


def _check_projections(adapter: Adapter, sides: tuple[int, int]) -> None:
    """Raises ConversionError unless A and B are of PEFT's size, and its own if they are left to the seed."""
    method, kept = adapter.method, (adapter.shared["projection_a"], adapter.shared["projection_b"])
    if (kept[0].shape[0], kept[1].shape[1]) != sides:
        raise ConversionError(
            f"vera: A {kept[0].shape} and B {kept[1].shape} are not of the size that PEFT gives them, {sides} for "
            f"these modules; start without max_in and max_out"
        )
    if method.save_projection:
        return
    drawn = peft_projections(method.projection_key, method.rank, *sides)
    if not all(np.array_equal(one, other) for one, other in zip(drawn, kept, strict=True)):
        raise ConversionError(
            f"vera: save_projection is false, and A and B are not what PEFT draws from the key "
            f"{method.projection_key}; set save_projection=True"
        )


def sides_of(places: Places) -> tuple[int, int]:
    return max(place.site.in_dim for place in places.values()), max(place.site.out_dim for place in places.values())


def leaves(method: VeRA, config: VeraConfig, place: Place) -> dict[str, Leaf]:
    return {"vera_lambda_d": Leaf("d", (config.r,)), "vera_lambda_b": Leaf("b", (place.site.out_dim,))}


def shared(method: VeRA, config: VeraConfig, places: Places) -> dict[str, Leaf]:
    if not config.save_projection:
        return {}
    max_in, max_out = sides_of(places)
    rank = config.r
    return {
        "vera_A": turned("projection_a", (rank, max_in)),
        "vera_B": turned("projection_b", (max_out, rank)),
    }


VERA = Form(
    peft_type="VERA",
    method=VeRA,
    config=VeraConfig,
    options=options,
    fields=fields,
    leaves=leaves,
    shared=shared,
)
