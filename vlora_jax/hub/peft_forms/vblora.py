"""VB-LoRA: `vblora_logits_A`, `vblora_logits_B` and the vector bank beside the model.

Files of `save_only_topk_weights` have the chosen mixtures in the place of logits. huggingface/peft, `tuners/vblora`.
"""

from typing import Any

import numpy as np
from pydantic import Field

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.vblora import VBLoRA
from vlora_jax.errors import AdapterFileError
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_file import Tensors
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places

LEFT_OUT = -1e4  # a logit that is never chosen; the logarithm of the least weight in float32 is above -104


class VBLoraConfig(PeftConfig):
    """PEFT's `VBLoRAConfig`."""

    ignored = frozenset({"init_vector_bank_bound", "init_logits_std"})
    only = "vblora_only"

    r: int = Field(4, gt=0)
    num_vectors: int = Field(256, gt=0)
    vector_length: int = Field(256, gt=0)
    topk: int = Field(2, gt=0)
    save_only_topk_weights: bool = False
    vblora_dropout: float = Field(0.0, ge=0, lt=1)
    fan_in_fan_out: bool = False


def options(config: VBLoraConfig, places: Places) -> dict[str, Any]:
    return {
        "rank": config.r,
        "vectors": config.num_vectors,
        "length": config.vector_length,
        "topk": config.topk,
        "dropout": config.vblora_dropout,
    }


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: VBLoRA = adapter.method
    return {
        "r": method.rank,
        "num_vectors": method.vectors,
        "vector_length": method.length,
        "topk": method.topk,
        "save_only_topk_weights": False,
        "vblora_dropout": method.dropout,
    }


def leaves(method: VBLoRA, config: VBLoraConfig, place: Place) -> dict[str, Leaf]:
    rank, vectors, length = config.r, config.num_vectors, config.vector_length
    return {
        "vblora_logits_A": Leaf("logits_a", (rank, place.site.in_dim // length, vectors)),
        "vblora_logits_B": Leaf("logits_b", (place.site.out_dim // length, rank, vectors)),
    }


def shared(method: VBLoRA, config: VBLoraConfig, places: Places) -> dict[str, Leaf]:
    return {"vblora_vector_bank": Leaf("bank", (config.num_vectors, config.vector_length))}


def tidy(config: VBLoraConfig, tensors: Tensors) -> Tensors:
    """Logits in the place of chosen weights: those of the others are lost, so that they are never chosen again."""
    if not config.save_only_topk_weights:
        return tensors
    indices, weights = "_topk_indices", "_topk_weights"
    kept = {key: tensor for key, tensor in tensors.items() if not key.endswith((indices, weights))}
    for key in tensors:
        name = key.removesuffix(indices)
        if name != key and name + weights in tensors:
            kept[name] = logits_of(config, name, tensors[key], tensors[name + weights])
    return kept


def logits_of(config: VBLoraConfig, name: str, indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Logits with given softmax weights; the last weight, which files leave out, is what is missing to 1.

    Raises:
      AdapterFileError: shapes or values that no mixture has.
    """
    weights = weights.astype(np.float32)
    if indices.shape != (*weights.shape[:-1], config.topk) or weights.shape[-1] != config.topk - 1:
        raise AdapterFileError(
            f"{name}: indices {list(indices.shape)} and weights {list(weights.shape)} are not of topk {config.topk}"
        )
    if not np.issubdtype(indices.dtype, np.integer) or not 0 <= indices.min() <= indices.max() < config.num_vectors:
        raise AdapterFileError(f"{name}: its indices must be whole numbers below num_vectors {config.num_vectors}")
    whole = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], axis=-1)
    if whole.min() < -1e-6 or whole.max() > 1 + 1e-6:
        raise AdapterFileError(f"{name}: weights of a mixture must be between 0 and 1, and sum to at most 1")
    logits = np.full((*weights.shape[:-1], config.num_vectors), LEFT_OUT, np.float32)
    np.put_along_axis(logits, indices.astype(np.int64), np.log(np.maximum(whole, np.finfo(np.float32).tiny)), -1)
    return logits


VBLORA = Form(
    peft_type="VBLORA",
    method=VBLoRA,
    config=VBLoraConfig,
    options=options,
    fields=fields,
    leaves=leaves,
    shared=shared,
    tidy=tidy,
    adapted=lambda adapter, place: True,  # there is no start that changes nothing to compare with
)
