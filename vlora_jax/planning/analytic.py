"""Memory and traffic of a step by formulas, for chips whose compiler is not at hand."""

from typing import Any

import jax

from vlora_jax.adapters.adapter import count
from vlora_jax.adapters.quantized import is_quantized
from vlora_jax.adapters.sites import find_sites
from vlora_jax.adapters.trees import flatten
from vlora_jax.distributed.chips import Chip
from vlora_jax.distributed.specs import stored_bytes
from vlora_jax.errors import ConfigError
from vlora_jax.models.matrix import MatrixConfig
from vlora_jax.planning.job import lasting_bytes
from vlora_jax.training.loss import CHUNK
from vlora_jax.training.outline import Outline

RESERVED = 0.08  # of the memory: the framework's own and fragments


def estimate(shapes: Outline, chip: Chip) -> dict[str, Any]:
    """A worker's answer without a compiler: peak, whether it fits, collectives.

    What is assumed: kernels that lie over `fsdp` are gathered layer by layer, two layers at a time, once in either
    direction (as the TPU compiler does, also with remat); of a quantised base one layer's kernel is decoded at a time;
    the backward pass keeps what the remat policy keeps; gradients of what trains are summed over `data` and `fsdp`;
    each layer's two branches are summed over `tensor` in either direction.
    """
    mesh, model, batch = shapes.mesh.shape, shapes.model, shapes.batch
    if isinstance(model, MatrixConfig):
        raise ConfigError(f"model.family {model.family} has no layers to estimate; plan it for a TPU topology")
    fsdp, tensor, data = mesh["fsdp"], mesh["tensor"], mesh["data"]
    rows = batch["tokens"].shape[1:] if "tokens" in batch else (*batch["image"].shape[1:2], count_patches(model))
    tokens, size = rows[0] * rows[1] // (data * fsdp), 2 if model.dtype == "bfloat16" else 4
    kernels = {site.leaf_path: site for site in find_sites(shapes.whole())}
    leaves = {path: leaf for path, leaf in flatten(shapes.whole()).items() if path in kernels}
    whole = sum(map(stored_bytes, leaves.values())) // tensor
    layer = sum(stored_bytes(leaf) // leaf.shape[0] for leaf in leaves.values() if leaf.ndim > 2) // tensor
    outputs = sum(site.out_dim for site in kernels.values() if site.stack) // tensor
    between = model.width // (tensor if shapes.config.mesh.sequence else 1)
    kept = {"full": 0, "nested": 0, "dots": outputs, "none": 2 * outputs}[model.remat] + between
    widest = 4 * (model.mlp_width * 3 + model.width * 4) // tensor * tokens
    vocabulary = getattr(model, "vocabulary", 0) // tensor
    logits = 3 * 4 * min(tokens, CHUNK) * vocabulary
    gathered = 2 * layer if fsdp > 1 else 0
    held = [leaf for leaf in leaves.values() if is_quantized(leaf)]
    decoded = max((leaf.size // leaf.shape[0] * leaf.dtype.itemsize for leaf in held), default=0) // tensor
    trained = sum(count(leaf) * 4 for leaf in jax.tree.leaves(shapes.state.trainable))
    temporaries = model.layers * tokens * kept * size + max(widest, logits) + gathered + decoded + trained
    parts = lasting_bytes(shapes)
    peak = sum(parts.values()) + temporaries
    passes = 2 * shapes.config.accumulate
    found: dict[str, dict[str, int]] = {}
    if fsdp > 1:
        gathers = sum(kernels[path].layers * len(jax.tree.leaves(leaf)) for path, leaf in leaves.items())
        found["all-gather"] = traffic(passes * gathers, passes * whole, (fsdp - 1) / fsdp)
    sums, reduced = 0, 0
    if data * fsdp > 1:
        sums, reduced = len(jax.tree.leaves(shapes.state.trainable)), trained
    if tensor > 1:
        branches = 2 * passes * model.layers
        sums, reduced = sums + branches, reduced + branches * tokens * model.width * size
    if sums:
        ways = max(data * fsdp, tensor)
        found["all-reduce"] = traffic(sums, reduced, 2 * (ways - 1) / ways)
    fits = peak <= chip.memory * (1 - RESERVED)
    room = {} if fits else {"needed": peak, "available": int(chip.memory * (1 - RESERVED))}
    bytes_ = parts | ({"peak": peak} if fits else {})
    return {"fits": fits, "bytes": bytes_, "collectives": found, "analytic": True} | room


def traffic(times: int, size: int, share: float) -> dict[str, int]:
    """One kind of collective, as `inspection.hlo.collectives` tells it."""
    return {"count": times, "bytes": int(size), "wire": int(size * share)}


def count_patches(model: Any) -> int:
    """Positions of a Vision Transformer."""
    return (model.image // model.patch) ** 2 + 1
