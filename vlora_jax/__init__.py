"""Parameter-efficient Transformers in JAX and Flax: Vertical LoRA and the adapters of the literature."""

from vlora_jax.adapters.adapter import Adapter, combine, count, partition, trainable_mask
from vlora_jax.adapters.bind import apply, bind
from vlora_jax.adapters.diagonal import Diagonal
from vlora_jax.adapters.init import init
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.merge import merge
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Site, find_sites, select, split
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.convert import convert, residuals
from vlora_jax.vertical.expand import expand

__all__ = [
    "Adapter",
    "Diagonal",
    "LoRA",
    "Method",
    "Site",
    "Stack",
    "Vertical",
    "apply",
    "bind",
    "combine",
    "convert",
    "count",
    "expand",
    "find_sites",
    "init",
    "merge",
    "partition",
    "residuals",
    "select",
    "split",
    "trainable_mask",
]
