"""A tiny Llama and PEFT directories for it, made by hand."""

import functools
import json

import jax.numpy as jnp
import numpy as np
from helpers import filled

from vlora_jax.hub.names import names_of
from vlora_jax.hub.peft import read_peft
from vlora_jax.hub.peft_file import CONFIG, TENSORS, write_tensors
from vlora_jax.models.build import abstract_model
from vlora_jax.models.decoder import DecoderConfig

LLAMA = DecoderConfig(
    width=8, heads=2, kv_heads=1, mlp_width=12, norm="rms", activation="silu", gated=True, qkv_bias=False,
    out_bias=False, mlp_bias=False, rotary_theta=1e4, vocabulary=11, layers=3, max_positions=None, tied_head=False,
)  # fmt: skip
Q, V = ("base_model.model.model.layers.{}.self_attn." + name for name in ("q_proj", "v_proj"))
IDS = jnp.array([[1, 2, 3, 10]])


@functools.cache
def model(tied=False):
    config = LLAMA.model_copy(update={"tied_head": tied})
    graphdef, shapes = abstract_model(config)
    return graphdef, filled(shapes, 0), names_of(config, "LlamaForCausalLM")


def tensors(rank=2, targets=(Q, V), seed=3):
    """A file's tensors: q_proj (8 → 8) and v_proj (8 → 4) of three layers."""
    rng, made = np.random.default_rng(seed), {}
    for target in targets:
        out = 8 if target == Q else 4
        for layer in range(3):
            made[f"{target.format(layer)}.lora_A.weight"] = rng.normal(size=(rank, 8)).astype(np.float32)
            made[f"{target.format(layer)}.lora_B.weight"] = rng.normal(size=(out, rank)).astype(np.float32)
    return made


CONFIGURED = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"]}


def write(folder, values=None, **config):
    folder.mkdir(exist_ok=True)
    write_tensors(folder / TENSORS, tensors() if values is None else values, {"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(CONFIGURED | config))
    return folder


def read(folder, tied=False, **options):
    _, base, names = model(tied)
    return read_peft(folder, base, names, **options)
