"""Scaled dot-product attention behind one function that takes the best form a backend has."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

Form = Literal["auto", "blocks", "plain", "cudnn", "splash"]
# Queries a block on CPU. Alone, forward and backward at 256, 1,024 and 2,048 tokens (8 heads of 64), blocks of 64 ran
# in 0.74–0.98 of the time but compiled twice as long, with no clear gain inside a whole step; 256 ran in up to 1.09.
BLOCK = 128


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
    form: Form = "auto",
) -> Float[Array, "batch length heads head_dim"]:
    """softmax(q kᵀ / √head_dim) v in float32, with grouped-query heads.

    Args:
      q, k, v: heads must be a multiple of kv_heads; a group of heads shares a key and value head.
      causal: position i sees keys 0 … i.
      segments: a token sees only keys of its own segment (packed documents; padding is a segment too).
      form: `"auto"` takes `best_form`; the others force one.
    """
    if form == "auto":
        form = best_form(jax.default_backend(), q.dtype, q.shape[1], q.shape[3], causal)
    if form == "blocks":
        return blocked(q, k, v, causal, segments)
    if form == "splash":
        return splash(q, k, v, segments)
    mask = None if segments is None else (segments[:, None, :, None] == segments[:, None, None, :])
    implementation = "cudnn" if form == "cudnn" else None
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)


def blocked(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    causal: bool,
    segments: Int[Array, "batch length"] | None,
) -> Float[Array, "batch length heads head_dim"]:
    """Heads-first attention in blocks of queries; causal blocks leave out the keys after their last query."""
    batch, length, heads, dim = q.shape
    groups = k.shape[2]
    q_BGRSK = q.reshape(batch, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4) * dim**-0.5
    k_BGTK, v_BGTK = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    size = BLOCK if causal else length
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        keys = stop if causal else k.shape[1]
        scores = jnp.einsum(
            "bgrsk,bgtk->bgrst", q_BGRSK[..., start:stop, :], k_BGTK[:, :, :keys], preferred_element_type=jnp.float32
        )
        if causal:
            seen = jnp.arange(start, stop)[:, None] >= jnp.arange(keys)[None, :]
            scores = jnp.where(seen, scores, -jnp.inf)
        if segments is not None:
            same = segments[:, start:stop, None] == segments[:, None, :keys]
            scores = jnp.where(same[:, None, None], scores, -jnp.inf)
        shares = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        blocks.append(jnp.einsum("bgrst,bgtk->bgrsk", shares, v_BGTK[:, :, :keys]))
    out = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


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


@functools.cache
def rotary_frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """Angular frequencies θ^(-2i/head_dim) of the rotary position embedding (arXiv 2104.09864, eq. 15)."""
    return tuple(theta ** (-2 * i / head_dim) for i in range(head_dim // 2))


def rotate(
    x: Float[Array, "batch length heads head_dim"], positions: Int[Array, "batch length"], theta: float
) -> Array:
    """Rotary position embedding; the first half of each head is paired with the second, as in Llama's files."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rotary_frequencies(x.shape[-1], theta))
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
