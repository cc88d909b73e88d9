"""Scaled dot-product attention behind one function that takes the best form a backend has."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from vlora_jax.distributed.within import target
from vlora_jax.models.blocks import Mask, heads_first

Form = Literal["auto", "blocks", "plain", "cudnn", "splash"]


def best_form(backend: str, dtype: jnp.dtype, length: int, head_dim: int, causal: bool) -> Form:
    """The form that `attention` takes by itself.

    CPU: blocks of queries with keys only up to the diagonal. GPU: cuDNN's flash attention in half precision
    with head sizes it supports. TPU: the splash kernel for causal sequences of whole lanes. Otherwise XLA's.
    """
    if backend == "cpu":
        return "blocks"
    half = dtype in (jnp.bfloat16, jnp.float16)
    if backend in ("gpu", "cuda") and half and head_dim % 8 == 0 and head_dim <= 128:
        return "cudnn"
    if backend == "tpu" and causal and length % 128 == 0 and head_dim in (64, 96, 128, 256):
        return "splash"
    return "plain"


def attention(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    causal: bool = False,
    segments: Int[Array, "batch length"] | None = None,
    key_segments: Int[Array, "batch keys"] | None = None,
    window: int | None = None,
    windowed: Bool[Array, ""] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "heads length keys"] | None = None,
    offset: Int[Array, ""] | None = None,
    form: Form = "auto",
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(scale · q kᵀ + bias) v in float32, with grouped-query heads.

    Args:
      q, k, v: heads must be a multiple of kv_heads; a group of heads shares a key and value head.
      causal: query i sees keys 0 … offset + i.
      segments: a token sees only keys of its own segment (packed documents; padding is a segment too).
      key_segments: those of the keys, where they are other tokens than the queries.
      window: query i sees only keys from offset + i - window + 1 on.
      windowed: whether the window applies to this layer; it does if not given.
      scale: 1/√head_dim if not given.
      softcap: scores become softcap · tanh(score / softcap) (Gemma 2, arXiv 2408.00118).
      bias: added to the scores.
      offset: the place of the first query among the keys, 0 if not given (decoding with a cache).
      form: `"auto"` takes `best_form`; the others force one.
    """
    plain = window is None and softcap is None and bias is None and key_segments is None and scale is None
    if form == "auto":
        form = best_form(target(), q.dtype, q.shape[1], q.shape[3], causal) if plain else "blocks"
    if form == "splash":
        return splash(q, k, v, segments)
    if form == "blocks" or not plain:
        others = segments if key_segments is None else key_segments
        mask = Mask(segments, others, windowed, offset, causal=causal, window=window)
        return heads_first(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask, scale, softcap, bias)
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    implementation = "cudnn" if form == "cudnn" else None
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)


def splash(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    segments: Int[Array, "batch length"] | None,
    interpret: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """Causal attention by the TPU's splash kernel; heads over the mesh axis `tensor`, batch over the others."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mesh = jax.sharding.get_abstract_mesh()
    tensor = mesh.shape.get("tensor", 1)
    heads, length = q.shape[2], q.shape[1]
    if segments is None:
        segments = jnp.zeros(q.shape[:2], jnp.int32)
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * (heads // tensor))
    kernel = kernels.make_splash_mha(mask=mask, head_shards=1, q_seq_shards=1, interpret=interpret)
    if k.shape[2] % tensor:  # every device needs whole key heads for its queries
        k, v = (jnp.repeat(array, tensor // math.gcd(tensor, k.shape[2]), axis=2) for array in (k, v))

    def one(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return kernel(q * q.shape[-1] ** -0.5, k, v, segment_ids=kernels.SegmentIds(q=segments, kv=segments))  # type: ignore[return-value]

    call = jax.vmap(one)
    q, k, v = (array.transpose(0, 2, 1, 3) for array in (q, k, v))
    if mesh.size > 1:
        rows = tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape)
        spec = P(rows, "tensor" if "tensor" in mesh.shape else None)
        call = jax.shard_map(call, mesh=mesh, in_specs=(spec, spec, spec, P(rows)), out_specs=spec, check_vma=False)
    return call(q, k, v, segments).transpose(0, 2, 1, 3)
