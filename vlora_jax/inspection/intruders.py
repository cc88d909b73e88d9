"""Intruder dimensions: strong singular directions of W + ΔW that W does not have (arXiv 2410.21228), and their remedy.

Needs the whole SVDs of W and of W + ΔW, O(in·out·min(in, out)) a layer: about a second for a kernel of 1,024 × 1,024 on
two cores, a minute or more for 4,096 × 4,096. One layer is in memory at a time.
"""

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.factorise import svd
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.svd import product_svd
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.inspection.changes import Change, Part, changes

TOP, EPSILON, KEEP = 10, 0.5, 0.75


@dataclass(frozen=True)
class IntruderRow:
    """Intruders in one layer of one kernel.

    Attributes:
      output: how many of the top singular vectors of W + ΔW on the output side are like none of W's.
      input: the same on the input side. Counts of kernels of other shapes do not compare: where the vectors of W span
        the whole side, the cosine is at least 1/√side.
      cosines: of each of the top vectors on the output side with the vector of W that is most like it.
    """

    path: str
    layer: int | None
    output: int
    input: int
    cosines: tuple[float, ...]


@dataclass(frozen=True)
class ReducedRow:
    """What became of the intruders in one layer of one kernel.

    Attributes:
      intruders: how many were scaled down: those on the output side.
      left_out: what the cut to the LoRA's rank leaves out, relative to the reduced change.
    """

    path: str
    layer: int | None
    intruders: int
    left_out: float


def intruder_rows(base: Tree, adapter: Adapter, top: int = TOP, epsilon: float = EPSILON) -> list[IntruderRow]:
    """A row for each layer of each site.

    Args:
      base: the parameters that the adapter changes.
      top: how many of the leading singular vectors of W + ΔW are looked at.
      epsilon: a vector whose cosine with every one of W's is below this is an intruder.

    Raises:
      ConfigError: `top` is below 1, or `epsilon` is no cosine.
      ConversionError: the change depends on the input.
      BaseMismatchError: the base lacks a site of the adapter.
    """
    rows = []
    for part, _, found in _each(base, adapter, top, epsilon):
        on_output, on_input = (np.asarray(side) for side in (found.output, found.input))
        for place, layer in enumerate(part.layers):
            out, into = (int((side[place] < epsilon).sum()) for side in (on_output, on_input))
            rows.append(IntruderRow(part.site.path, layer, out, into, tuple(on_output[place].tolist())))
    return rows


def reduce_intruders(
    base: Tree, adapter: Adapter, keep: float = KEEP, top: int = TOP, epsilon: float = EPSILON
) -> tuple[Adapter, list[ReducedRow]]:
    """A LoRA with its intruders scaled down: W + ΔW + (keep - 1)·Σ σⱼ pⱼ qⱼᵀ over the intruders j of W + ΔW.

    That change has the adapter's rank and one for each intruder; it is cut to the adapter's rank by an SVD, from
    factors. Layers without intruders stay as they are. Less is forgotten, at some cost for the task (arXiv 2410.21228,
    figure 8).

    Args:
      keep: share of an intruder that stays: 1 changes nothing, 0 takes it out. PEFT's `mitigation_lambda`.
      top, epsilon: see `intruder_rows`.

    Returns:
      The new adapter, and a row for each layer of each site.

    Raises:
      ConfigError: `keep` is not within 0 and 1, `top` below 1, or `epsilon` no cosine.
      ConversionError: the adapter is no plain LoRA of one rank in all layers of a site (`vlora_jax.as_lora` makes one
        of any that can be merged).
      BaseMismatchError: the base lacks a site of the adapter.
    """
    if not 0 <= keep <= 1:
        raise ConfigError(f"keep is {keep}; it must be a share, between 0 (take intruders out) and 1 (change nothing)")
    if type(adapter.method) is not LoRA or adapter.method.varies:  # what DoRA and PiSSA make of A and B is no A B
        raise ConversionError(
            f"intruders are scaled down in a plain LoRA of one rank in all layers, not in this {adapter.method.name}; "
            f"as_lora makes such a one of adapters that can be merged"
        )
    sites, rows = dict(adapter.trainable["sites"]), []
    for part, change, found in _each(base, adapter, top, epsilon):
        rank, scale = part.own["a"].shape[-1], part.method.scale  # type: ignore[attr-defined]
        a, b, lost, counts = _reduced(rank, change, found, keep, epsilon)
        here = counts[:, None, None] > 0
        chosen = lambda new, old, here=here: jnp.where(here, new, old.reshape(new.shape)).reshape(old.shape)
        sites[part.site.path] = sites[part.site.path] | {
            "a": chosen(a, part.own["a"]),
            "b": chosen(b / scale, part.own["b"]),
        }
        figures = zip(part.layers, counts.tolist(), lost.tolist(), strict=True)
        rows += [ReducedRow(part.site.path, *each) for each in figures]
    return dataclasses.replace(adapter, trainable=adapter.trainable | {"sites": sites}), rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Leading:
    """The top of W + ΔW in every layer, and how like W's its vectors are."""

    u: Float[Array, "*layers in top"]
    values: Float[Array, "*layers top"]
    v: Float[Array, "*layers top out"]
    output: Float[Array, "*layers top"]
    input: Float[Array, "*layers top"]


def _each(base: Tree, adapter: Adapter, top: int, epsilon: float) -> Iterator[tuple[Part, Change, _Leading]]:
    if top < 1:
        raise ConfigError(f"top is {top}; it must be at least 1")
    if not 0 < epsilon <= 1:
        raise ConfigError(f"epsilon is {epsilon}; it must be a cosine above 0 and at most 1")
    for part, change in changes(base, adapter):
        yield part, change, _compared(min(top, part.site.in_dim, part.site.out_dim), part.kernels, change)


@functools.partial(jax.jit, static_argnums=0)
def _compared(top: int, kernels: Float[Array, "layers in out"], change: Change) -> _Leading:
    def one(layer: tuple[Array, Change]) -> _Leading:
        kernel, change = layer[0].astype(jnp.float32), layer[1]
        p, _, q = svd(kernel)
        u, values, v = svd(kernel + (change.u * change.values) @ change.v)
        u, v = u[:, :top], v[:top]
        return _Leading(u, values[:top], v, jnp.abs(v @ q.T).max(1), jnp.abs(u.T @ p).max(1))

    return jax.lax.map(one, (kernels, change))


@functools.partial(jax.jit, static_argnums=0)
def _reduced(
    rank: int, change: Change, found: _Leading, keep: Float[Array, ""] | float, epsilon: Float[Array, ""] | float
) -> tuple[Array, Array, Float[Array, " layers"], Int[Array, " layers"]]:
    """A and B with ΔW = A B cut to a rank, what the cut leaves out, and how many intruders a layer has."""

    def one(layer: tuple[Change, _Leading]) -> tuple:
        change, found = layer
        less = jnp.where(found.output < epsilon, (keep - 1) * found.values, 0.0)
        left = jnp.concatenate([change.u * change.values, found.u * less], axis=1)
        u, values, v = product_svd(left, jnp.concatenate([change.v, found.v]))
        root, total = jnp.sqrt(values[:rank]), jnp.linalg.norm(values)
        lost = jnp.linalg.norm(values[rank:]) / jnp.where(total > 0, total, 1.0)
        return u[:, :rank] * root, root[:, None] * v[:rank], lost, (found.output < epsilon).sum()

    return jax.lax.map(one, (change, found))
