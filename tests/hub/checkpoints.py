"""Tiny checkpoints made of our own models, and ways to damage them."""

import json

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from vlora_jax.adapters.sites import split
from vlora_jax.hub.save import save
from vlora_jax.models.build import build
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.encoder import EncoderConfig

LLAMA = DecoderConfig(vocabulary=24, width=16, heads=4, kv_heads=2, mlp_width=32, layers=3, tied_head=False)
TIED = LLAMA.model_copy(update={"tied_head": True})
BERT = EncoderConfig(vocabulary=24, width=16, heads=4, mlp_width=32, layers=2, max_positions=16, norm_eps=1e-12)


def model_of(config):
    """A model whose every number differs from its start."""
    graphdef, base = split(build(config, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(base)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [leaf + jax.random.normal(key, leaf.shape, leaf.dtype) for leaf, key in zip(leaves, keys, strict=True)]
    return graphdef, jax.tree.unflatten(tree, moved)


def write(directory, config=LLAMA, **options):
    """A checkpoint; the model that is in it."""
    model = model_of(config)
    save(directory, *model, **options)
    return model


def change(directory, **edits):
    """Edit the tensors of a single-file checkpoint: a name to a function, a value, or None to drop it."""
    path = directory / "model.safetensors"
    tensors = {name: np.array(value) for name, value in load_file(path).items()}
    for name, edit in edits.items():
        value = edit(tensors[name]) if callable(edit) else edit
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path, metadata={"format": "pt"})


def edit_config(directory, **keys):
    """Overwrite keys of `config.json`."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
