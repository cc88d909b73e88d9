"""MiSS, and the files that it had as Bone: `miss_block`, whose axes are ours but for the blocks of mode bat.

huggingface/peft, `tuners/miss`.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
from pydantic import Field

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.miss import MiSS
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places


class BoneConfig(PeftConfig):
    """`BoneConfig` of PEFT up to 0.18."""

    only = "bone_only"

    r: int = Field(64, gt=0)
    init_weights: bool | Literal["bat"] = True


class MissConfig(PeftConfig):
    """PEFT's `MissConfig`."""

    only = "MiSS_only"

    r: int = Field(64, gt=0)
    miss_dropout: float = Field(0.0, ge=0, lt=1)
    mini_r: int = Field(1, gt=0)
    init_weights: bool | Literal["bat", "mini"] = True


def options(config: Any, places: Places) -> dict[str, Any]:
    """`init_weights` selects the formula; PEFT drops nothing in mode bat."""
    mode = config.init_weights if isinstance(config.init_weights, str) else "default"
    return {
        "rank": config.r,
        "mode": mode,
        "mini_rank": getattr(config, "mini_r", 1),
        "dropout": 0.0 if mode == "bat" else getattr(config, "miss_dropout", 0.0),
    }


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: MiSS = adapter.method
    return {
        "r": method.rank,
        "miss_dropout": method.dropout,
        "mini_r": method.mini_rank,
        "init_weights": True if method.mode == "default" else method.mode,
    }


def leaves(method: MiSS, config: Any, place: Place) -> dict[str, Leaf]:
    rank, outputs = method.rank, place.site.out_dim
    if method.mode == "bat":
        turn = lambda blocks: np.swapaxes(blocks, -1, -2)
        return {"miss_block": Leaf("d", (outputs // rank, rank, rank), turn, turn)}
    return {"miss_block": Leaf("d", (rank, method.mini_rank if method.mode == "mini" else outputs))}


MISS = Form(
    peft_type="MISS",
    method=MiSS,
    config=MissConfig,
    options=options,
    fields=fields,
    leaves=leaves,
    turned=False,
)
BONE = dataclasses.replace(
    MISS,
    peft_type="BONE",
    config=BoneConfig,
    leaves=lambda method, config, place: {"bone_block": leaves(method, config, place)["miss_block"]},
)
