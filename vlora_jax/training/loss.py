"""Losses as sums and weights, so that micro-batches of unequal size add up exactly."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped

Sums = dict[str, Array]  # "loss" and other sums over examples or tokens, and their "weight"
Loss = Callable[[Any, dict[str, Array], bool], Sums]
CHUNK = 2048  # tokens whose logits exist at once


def classification(model: Callable, batch: dict[str, Array], train: bool) -> Sums:
    """Softmax cross-entropy of images; `weight`, if given, counts each example that much."""
    logits = model(batch["image"], train=train)
    weight = batch.get("weight", jnp.ones(logits.shape[0]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
    return {"loss": (weight * losses).sum(), "correct": (weight * correct).sum(), "weight": weight.sum()}


def next_token(model: Any, batch: dict[str, Array], train: bool) -> Sums:
    """Cross-entropy of the next token where `mask` is set, chunked: all logits never exist at once."""
    hidden = model.hidden(batch["tokens"], batch.get("positions"), batch.get("segments"), train=train)
    weight = batch["mask"].astype(jnp.float32)
    if "weight" in batch:
        weight = weight * batch["weight"][:, None]
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], weight)


def chunked_cross_entropy(
    logits_of: Callable,
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length"],
    weight: Shaped[Array, "batch length"],
    chunk: int = CHUNK,
) -> Sums:
    """Sums of cross-entropy, correct predictions and weight over all tokens.

    Args:
      logits_of: hidden states `(batch, positions, width)` to logits in float32.
      hidden, targets, weight: tokens of weight 0 count nothing.
      chunk: about so many tokens at a time. Chunks run along the length, so that a sharded batch stays sharded;
        the backward pass computes each chunk's logits again.
    """
    batch, length, _ = hidden.shape
    size = max(1, min(length, chunk // batch))
    padding = -length % size

    def chunks(array: Array) -> Array:
        array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        return array.reshape(batch, -1, size, *array.shape[2:]).swapaxes(0, 1)

    def body(sums: Sums, inputs: tuple) -> tuple[Sums, None]:
        h, target, w = inputs
        logits = logits_of(h)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        correct = (logits.argmax(-1) == target).astype(jnp.float32)
        here = {"loss": (w * losses).sum(), "correct": (w * correct).sum(), "weight": w.sum()}
        return jax.tree.map(jnp.add, sums, here), None

    zero = {"loss": jnp.float32(0), "correct": jnp.float32(0), "weight": jnp.float32(0)}
    return jax.lax.scan(jax.checkpoint(body, prevent_cse=False), zero, tuple(map(chunks, (hidden, targets, weight))))[0]


LOSSES: dict[str, Loss] = {"classification": classification, "next_token": next_token}
