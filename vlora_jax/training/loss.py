"""Losses as sums and weights, so that micro-batches of unequal size add up exactly."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Shaped

from vlora_jax.distributed.within import batch_ways, split_batch

Sums = dict[str, Array]  # "loss" and other sums over examples or tokens, and their "weight"
Loss = Callable[[Any, dict[str, Array], bool], Sums]
CHUNK = 2048  # tokens of one device whose logits exist at once


def classification(model: Callable, batch: dict[str, Array], train: bool) -> Sums:
    """Softmax cross-entropy of images; `weight`, if given, counts each example that much."""
    return _classes(model(batch["image"], train=train), batch)


def next_token(model: Any, batch: dict[str, Array], train: bool) -> Sums:
    """Cross-entropy of the next token where `mask` is set, chunked: all logits never exist at once."""
    hidden = model.hidden(batch["tokens"], batch.get("positions"), batch.get("segments"), train=train)
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], _token_weight(batch))


def text_classification(model: Callable, batch: dict[str, Array], train: bool) -> Sums:
    """Softmax cross-entropy of texts' classes; `weight`, if given, counts each example that much."""
    types = {"types": batch["types"]} if "types" in batch else {}
    return _classes(model(batch["tokens"], segments=batch["segments"], **types, train=train), batch)


def _classes(logits: Array, batch: dict[str, Array]) -> Sums:
    weight = batch.get("weight", jnp.ones(logits.shape[0]))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["label"])
    correct = (logits.argmax(-1) == batch["label"]).astype(jnp.float32)
    return {"loss": (weight * losses).sum(), "correct": (weight * correct).sum(), "weight": weight.sum()}


def seq2seq(model: Any, batch: dict[str, Array], train: bool) -> Sums:
    """Cross-entropy of the decoder's next token where `mask` is set, chunked as in `next_token`."""
    hidden = model.hidden(
        batch["tokens"], batch["decoder_tokens"], batch["segments"], batch["decoder_segments"], train=train
    )
    return chunked_cross_entropy(model.logits, hidden, batch["targets"], _token_weight(batch))


def matrix_completion(model: Callable, batch: dict[str, Array], train: bool) -> Sums:
    """Squared error of the entries where `mask` is set; correct are those of the right sign."""
    found, weight = model(batch["tokens"], train=train), batch["mask"].astype(jnp.float32)
    weight = weight * batch["weight"][:, None, None] if "weight" in batch else weight
    correct = jnp.sign(found) == jnp.sign(batch["targets"])
    losses = (found - batch["targets"]) ** 2
    return {"loss": (weight * losses).sum(), "correct": (weight * correct).sum(), "weight": weight.sum()}


def _token_weight(batch: dict[str, Array]) -> Array:
    weight = batch["mask"].astype(jnp.float32)
    return weight * batch["weight"][:, None] if "weight" in batch else weight


def chunked_cross_entropy(
    logits_of: Callable,
    hidden: Float[Array, "batch length width"],
    targets: Int[Array, "batch length"],
    weight: Shaped[Array, "batch length"],
    chunk: int = CHUNK,
) -> Sums:
    """Sums of cross-entropy, correct predictions and weight over all tokens.

    The gradient is taken chunk by chunk in the forward pass, while a chunk's logits are there: nothing is computed
    twice, and what is kept for the backward pass is as large as `hidden`. Only "loss" can be differentiated.

    Args:
      logits_of: hidden states `(batch, positions, width)` to logits in float32.
      hidden, targets, weight: tokens of weight 0 count nothing.
      chunk: about so many tokens of a device at a time; each chunk gathers a sharded head again. Chunks run along the
        length, so that a sharded batch stays sharded.
    """
    batch, length, _ = hidden.shape
    size = max(1, min(length, chunk * batch_ways() // batch))
    padding = -length % size

    def chunks(array: Array) -> Array:
        array = jnp.pad(array, ((0, 0), (0, padding)) + ((0, 0),) * (array.ndim - 2))
        return array.reshape(batch, -1, size, *array.shape[2:]).swapaxes(0, 1)

    inputs = tuple(map(chunks, (hidden, targets, weight)))
    pure, parameters = jax.closure_convert(logits_of, inputs[0][0])  # the head's, if they train
    return _summed(pure, inputs[0], parameters, inputs[1:])


def _chunk_sums(logits: Array, target: Array, weight: Array) -> tuple[Array, Sums]:
    # The target's logit by comparison: the gradient of picking it out would be scattered into an array of all logits.
    places = jnp.arange(logits.shape[-1])[None, None]
    picked = jnp.where(places == target[..., None], logits, 0.0).sum(axis=-1)
    loss = (weight * (jax.nn.logsumexp(logits, axis=-1) - picked)).sum()
    first = jnp.where(logits == logits.max(-1, keepdims=True), places, logits.shape[-1]).min(-1)  # argmax, in less time
    correct = (weight * (first == target)).sum()
    return loss, {"loss": loss, "correct": correct, "weight": weight.sum()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(logits_of: Callable, hidden: Array, parameters: Sequence[Array], labels: tuple[Array, Array]) -> Sums:
    def body(sums: Sums, inputs: tuple) -> tuple[Sums, None]:
        h, target, weight = inputs
        return jax.tree.map(jnp.add, sums, _chunk_sums(logits_of(split_batch(h), *parameters), target, weight)[1]), None

    return jax.lax.scan(body, _zero(), (hidden, *labels))[0]


def _summed_forward(logits_of: Callable, hidden: Any, parameters: Sequence[Any], labels: tuple) -> tuple:
    values, trained = [p.value for p in parameters], [i for i, p in enumerate(parameters) if p.perturbed]

    def body(total: tuple, inputs: tuple) -> tuple:
        h, target, weight = inputs

        def of_chunk(h: Array, some: list[Array]) -> tuple[Array, Sums]:
            every = dict(enumerate(values)) | dict(zip(trained, some, strict=True))
            return _chunk_sums(logits_of(split_batch(h), *every.values()), target, weight)

        some = [values[i] for i in trained]  # a frozen head has no gradient here either
        slopes, sums = jax.grad(of_chunk, argnums=(0, 1), has_aux=True)(h, some)
        return jax.tree.map(jnp.add, total, (sums, slopes[1])), slopes[0]

    zero = (_zero(), [jnp.zeros_like(values[i]) for i in trained])
    (sums, slopes), by_hidden = jax.lax.scan(body, zero, (hidden.value, *(label.value for label in labels)))
    by_parameter = dict(zip(trained, slopes, strict=True))
    return sums, (by_hidden, [by_parameter.get(i) for i in range(len(values))])


def _summed_backward(logits_of: Callable, slopes: tuple, cotangents: dict[str, Any]) -> tuple:
    return *jax.tree.map(lambda slope: (cotangents["loss"] * slope).astype(slope.dtype), slopes), None


_summed.defvjp(_summed_forward, _summed_backward, symbolic_zeros=True)


def _zero() -> Sums:
    return {name: jnp.zeros(()) for name in ("loss", "correct", "weight")}


def means(sums: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Loss and accuracy over several batches' sums, and the weight of them all."""
    totals = {name: sum(float(each[name]) for each in jax.device_get(sums)) for name in ("loss", "correct", "weight")}
    weight = max(totals["weight"], 1e-9)
    return {"loss": totals["loss"] / weight, "accuracy": totals["correct"] / weight, "weight": totals["weight"]}


LOSSES: dict[str, Loss] = {
    "classification": classification,
    "next_token": next_token,
    "text_classification": text_classification,
    "seq2seq": seq2seq,
    "matrix_completion": matrix_completion,
}
