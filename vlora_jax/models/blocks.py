"""Attention in blocks of queries, heads first: what CPUs are quick at, and what caches and odd scores need."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlora_jax.adapters.kept import keep

UNSEEN = -1e30  # finite, so that a query that sees nothing gives no NaN


def block_size(length: int, causal: bool) -> int:
    """Queries a block: about eight blocks of a causal sequence, which leave out nearly half of the scores."""
    return min(256, max(64, length // 8)) if causal else length


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees; see `attention`.

    Attributes:
      segments, key_segments: integers, or None: a query sees keys of its own segment only.
      windowed: whether the window applies, traced; None: it does.
      offset: the place of the first query among the keys, traced; None: 0.
      causal, window: static.
    """

    segments: Any = None
    key_segments: Any = None
    windowed: Any = None
    offset: Any = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    window: int | None = dataclasses.field(default=None, metadata={"static": True})

    def keys(self, start: int, stop: int, keys: int) -> tuple[int, int]:
        """The range of keys that the queries from `start` to `stop` can see at most."""
        if not self.causal or self.offset is not None:
            return 0, keys
        first = 0 if self.window is None or self.windowed is not None else start - self.window + 1
        return max(0, first), min(keys, stop)

    def of(self, start: int, stop: int, first: int, last: int) -> Array | None:
        """`(batch or 1, queries, keys)`, true where a query sees a key; None where all see all."""
        parts = []
        queries = jnp.arange(start, stop) if self.offset is None else self.offset + jnp.arange(start, stop)
        behind = queries[:, None] - jnp.arange(first, last)[None, :]
        if self.causal:
            parts.append((behind >= 0)[None])
        if self.window is not None:
            inside = behind < self.window
            parts.append((inside if self.windowed is None else inside | ~self.windowed)[None])
        if self.segments is not None and self.key_segments is not None:
            parts.append(self.segments[:, start:stop, None] == self.key_segments[:, None, first:last])
        return functools.reduce(jnp.logical_and, parts) if parts else None

    def hide(self, scores: Float[Array, "batch groups rows keys"], rows: slice, keys: slice) -> Array:
        """Scores with those of unseen keys made very low; their rows are these queries of one head after the other."""
        seen = self.of(rows.start, rows.stop, keys.start, keys.stop)
        if seen is None:
            return scores
        by_head = scores.reshape(*scores.shape[:2], -1, rows.stop - rows.start, scores.shape[3])
        return jnp.where(seen[:, None, None], by_head, UNSEEN).reshape(scores.shape)


def heads_first(
    q: Float[Array, "batch length heads head_dim"],
    k_BGTK: Float[Array, "batch kv_heads keys head_dim"],
    v_BGTK: Float[Array, "batch kv_heads keys head_dim"],
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "heads length keys"] | None = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Attention in blocks of queries; causal blocks leave out the keys that none of their queries sees."""
    batch, length, heads, dim = q.shape
    groups = k_BGTK.shape[1]
    factor = dim**-0.5 if scale is None else scale
    q_BGRSK = q.reshape(batch, length, groups, heads // groups, dim).transpose(0, 2, 3, 1, 4) * factor
    if softcap is None and bias is None:
        out = blocks(q_BGRSK, k_BGTK, v_BGTK, mask)
    else:
        out = bent(q_BGRSK, k_BGTK, v_BGTK, mask, softcap, bias)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def ranges(mask: Mask, length: int, keys: int) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that each can see."""
    size = block_size(length, mask.causal)
    starts = range(0, length, size)
    stops = [min(start + size, length) for start in starts]
    return [(slice(a, b), slice(*mask.keys(a, b, keys))) for a, b in zip(starts, stops, strict=True)]


def taken(array: Array, rows: slice) -> Array:
    """Some queries of all heads, `(batch, groups, heads · queries, head_dim)`.

    A product with one axis of rows instead of two takes a seventh less time on CPU.
    """
    return array[..., rows, :].reshape(*array.shape[:2], -1, array.shape[4])


def joined(parts: list[Array], heads: int) -> Array:
    """What `taken` took apart, `(batch, groups, heads, queries, head_dim)`."""
    return jnp.concatenate([part.reshape(*part.shape[:2], heads, -1, part.shape[3]) for part in parts], axis=3)


def bent(q_BGRSK: Array, k_BGTK: Array, v_BGTK: Array, mask: Mask, softcap: float | None, bias: Array | None) -> Array:
    """Attention whose scores are bounded or biased, `(batch, groups, heads, queries, head_dim)`."""
    outs = []
    groups, heads = q_BGRSK.shape[1:3]
    for rows, keys in ranges(mask, q_BGRSK.shape[3], k_BGTK.shape[2]):
        scores = product("bgnk,bgtk->bgnt", taken(q_BGRSK, rows), k_BGTK[:, :, keys])
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        if bias is not None:
            scores = scores + bias[:, rows, keys].reshape(1, groups, -1, scores.shape[3])
        shares = jax.nn.softmax(mask.hide(scores, rows, keys), axis=-1).astype(v_BGTK.dtype)
        outs.append(jnp.einsum("bgnt,bgtk->bgnk", shares, v_BGTK[:, :, keys]))
    return joined(outs, heads)


@jax.custom_vjp
def blocks(q_BGRSK: Array, k_BGTK: Array, v_BGTK: Array, mask: Mask) -> Array:
    """softmax(q kᵀ) v, `(batch, groups, heads, queries, head_dim)`, with its gradient written out.

    It keeps exp(scores - maximum) and the sums of its rows instead of shares, so that each score is written once and
    read twice, and needs no mask on the way back.
    """
    return _forward(q_BGRSK, k_BGTK, v_BGTK, mask)[0]


def _forward(q_BGRSK: Array, k_BGTK: Array, v_BGTK: Array, mask: Mask) -> tuple[Array, tuple]:
    outs, kept = [], []
    for rows, keys in ranges(mask, q_BGRSK.shape[3], k_BGTK.shape[2]):
        scores = product("bgnk,bgtk->bgnt", taken(q_BGRSK, rows), k_BGTK[:, :, keys])
        scores = mask.hide(scores, rows, keys)
        powers = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        inverse = 1.0 / powers.sum(axis=-1, keepdims=True)
        powers = powers.astype(v_BGTK.dtype)
        outs.append((product("bgnt,bgtk->bgnk", powers, v_BGTK[:, :, keys]) * inverse).astype(q_BGRSK.dtype))
        kept.append((keep(powers), keep(inverse)))
    out = keep(joined(outs, q_BGRSK.shape[2]))
    return out, (keep(q_BGRSK), keep(k_BGTK), keep(v_BGTK), mask, out, kept)


def _backward(residuals: tuple, slope: Array) -> tuple:
    q_BGRSK, k_BGTK, v_BGTK, mask, out, kept = residuals
    by_k, by_v = (jnp.zeros(a.shape, jnp.float32) for a in (k_BGTK, v_BGTK))
    by_q = []
    along = (slope.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    every = ranges(mask, q_BGRSK.shape[3], k_BGTK.shape[2])
    for (powers, inverse), (rows, keys) in zip(kept, every, strict=True):
        scaled = (taken(slope, rows) * inverse).astype(v_BGTK.dtype)
        by_share = product("bgnk,bgtk->bgnt", scaled, v_BGTK[:, :, keys])
        by_score = (powers * (by_share - taken(along, rows) * inverse)).astype(k_BGTK.dtype)
        by_q.append(product("bgnt,bgtk->bgnk", by_score, k_BGTK[:, :, keys]).astype(q_BGRSK.dtype))
        by_k = by_k.at[:, :, keys].add(product("bgnt,bgnk->bgtk", by_score, taken(q_BGRSK, rows)))
        by_v = by_v.at[:, :, keys].add(product("bgnt,bgnk->bgtk", powers, scaled))
    return joined(by_q, q_BGRSK.shape[2]), by_k.astype(k_BGTK.dtype), by_v.astype(v_BGTK.dtype), None


blocks.defvjp(_forward, _backward)


def product(equation: str, one: Array, other: Array) -> Array:
    """An einsum summed in float32."""
    return jnp.einsum(equation, one, other, preferred_element_type=jnp.float32)
