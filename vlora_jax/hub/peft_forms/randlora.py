"""RandLoRA: `randlora_lambda (r, n)`, `randlora_gamma (n, min)`, and the bases beside the model.

Files of PEFT up to 0.20 repeat the bases under every module. huggingface/peft, `tuners/randlora`.
"""

from typing import Any

import numpy as np
from pydantic import Field

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.randlora import RandLoRA
from vlora_jax.errors import AdapterFileError, ConversionError
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_file import Tensors
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, plain, reshaped

BASES = ("randlora_A", "randlora_B")


class RandLoraConfig(PeftConfig):
    """PEFT's `RandLoraConfig`."""

    lacks = frozenset({"exclude_modules"})
    ignored = frozenset({"init_weights"})
    only = "randlora_only"

    r: int = Field(32, gt=0)
    randlora_alpha: float = 640.0
    randlora_dropout: float = Field(0.0, ge=0, lt=1)
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    fan_in_fan_out: bool = False

    def fault(self) -> str | None:
        if not self.save_projection:
            return (
                "save_projection is false: the bases are not in the file, and the key alone gives other ones on a "
                "machine without bfloat16; save it with save_projection=True"
            )
        return super().fault()


def options(config: RandLoraConfig, places: Places) -> dict[str, Any]:
    return {
        "rank": config.r,
        "alpha": config.randlora_alpha,
        "bases": "very_sparse" if config.very_sparse else "sparse" if config.sparse else "dense",
        "projection_key": config.projection_prng_key,
        "dropout": config.randlora_dropout,
    }


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: RandLoRA = adapter.method
    if method.pairing != "peft" or method.root_scale:
        raise ConversionError("randlora: PEFT has pairing peft without root_scale only; as_lora makes it a LoRA")
    return {
        "r": method.rank,
        "randlora_alpha": plain(method.alpha),
        "randlora_dropout": method.dropout,
        "projection_prng_key": method.projection_key,
        "save_projection": True,
        "sparse": method.bases == "sparse",
        "very_sparse": method.bases == "very_sparse",
    }


def leaves(method: RandLoRA, config: RandLoraConfig, place: Place) -> dict[str, Leaf]:
    small = min(place.site.in_dim, place.site.out_dim)
    count = -(-small // config.r)
    return {
        "randlora_lambda": Leaf("lambda", (config.r, count)),
        "randlora_gamma": Leaf("gamma", (count, small)),
    }


def shared(method: RandLoRA, config: RandLoraConfig, places: Places) -> dict[str, Leaf]:
    shapes = method.shapes([place.site for place in places.values()])
    rank, small = shapes["a"]
    return {
        "randlora_A": reshaped("a", (rank, 1, small), (rank, small)),
        "randlora_B": Leaf("b", shapes["b"]),
    }


def tidy(config: RandLoraConfig, tensors: Tensors) -> Tensors:
    """One copy of the bases, of the many that older files have."""
    kept = dict(tensors)
    for name in BASES:
        copies = [key for key in tensors if key.endswith(f".{name}")]
        one = f"base_model.{name}"
        for key in copies:
            if not np.array_equal(tensors[key], tensors[copies[0]]):
                raise AdapterFileError(f"{key} differs from {copies[0]}; PEFT has one {name} for all modules")
            del kept[key]
        if copies:
            kept[one] = tensors[copies[0]]
    return kept


RANDLORA = Form(
    peft_type="RANDLORA",
    method=RandLoRA,
    config=RandLoraConfig,
    options=options,
    fields=fields,
    leaves=leaves,
    shared=shared,
    tidy=tidy,
)
