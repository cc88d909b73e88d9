"""Adapters and checkpoints beside each other: do they change the same kernels, in the same directions, by the same?"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import BaseMismatchError, ConfigError, nearest
from vlora_jax.inspection.changes import Change, Part, changes
from vlora_jax.inspection.spectra import alive, product_values
from vlora_jax.inspection.tables import ratio

MOST = 32  # leading directions in a grid


@dataclass(frozen=True)
class DiffRow:
    """Two adapters' changes of one kernel, or of one layer of it.

    Attributes:
      layer: None for all layers together.
      norm, other_norm: ‖ΔW‖ and ‖ΔW'‖; None where an adapter does not change the kernel.
      distance: ‖ΔW' - ΔW‖ / ‖ΔW‖.
      cosine: ⟨ΔW, ΔW'⟩ / (‖ΔW‖·‖ΔW'‖).
      input, output: φ = ‖UᵀU'‖² / min(i, j) of the subspaces that they span on either side, of i and j dimensions that
        carry anything (arXiv 2106.09685, equation 4): 1 if one contains the other, 0 if they are orthogonal; mean over
        the layers.
      chance_input, chance_output: what independent random subspaces of that size have on average, max(i, j) / n.

    What cannot be said, because an adapter does not change the kernel or its change is zero, is None.
    """

    path: str
    layer: int | None
    norm: float | None
    other_norm: float | None
    distance: float | None = None
    cosine: float | None = None
    input: float | None = None
    output: float | None = None
    chance_input: float | None = None
    chance_output: float | None = None


@dataclass(frozen=True)
class ParameterDiff:
    """One parameter of two models, or one that two adapters train whole.

    Attributes:
      distance: ‖θ' - θ‖ / ‖θ‖.
      cosine: ⟨θ, θ'⟩ / (‖θ‖·‖θ'‖); None if either is zero.
    """

    path: str
    shape: tuple[int, ...]
    distance: float
    cosine: float | None


@dataclass(frozen=True)
class DriftRow:
    """Where one kernel's change stood at one of several checkpoints, over all its layers.

    Attributes:
      norm: ‖ΔW‖.
      moved: ‖ΔW - ΔW before‖ / ‖ΔW‖ of the last checkpoint; None at the first one.
      cosine: with the last one's change; None if either is zero.
      output: φ of the output-side subspaces with those of the last one, mean over layers.
    """

    path: str
    step: int
    norm: float
    moved: float | None
    cosine: float | None
    output: float | None


def diff_rows(
    one: Adapter, other: Adapter, base: Tree | None = None, other_base: Tree | None = None, per_layer: bool = False
) -> list[DiffRow]:
    """A row for each kernel that either adapter changes (or for each layer of it).

    Args:
      one, other: adapters of one model; methods, ranks and sites may differ.
      base, other_base: the parameters; needed for methods whose ΔW is no product of thin factors. The adapters must be
        of one base: that is the caller's to make sure, see `vlora_jax.training.subjects`.

    Raises:
      BaseMismatchError: a kernel has other sizes or layers for the other adapter.
      ConversionError: a change depends on the input, or its base is missing.
    """
    rows = []
    for part, change, second in _paired(one, other, base, other_base):
        layers = part.layers if per_layer and part.site.stack else (None,)
        if change is None or second is None:
            rows += _lonely(part, change, second, layers)
            continue
        found = _numbers(_related(change, second))
        for place, layer in enumerate(layers):
            chosen = slice(place, place + 1) if layer is not None else slice(None)
            rows.append(_diff_row(part.site.path, layer, {name: value[chosen] for name, value in found.items()}))
    return rows


def subspace_grids(one: Adapter, other: Adapter, base: Tree | None = None) -> dict[str, np.ndarray]:
    """φ(i, j) between the leading i and the leading j directions of two adapters' changes, on the output side.

    Returns:
      By path of the kernels that both change, `(k, k')`, each at most `MOST`, mean over the layers in which they do:
      `[i - 1, j - 1]` is φ(i, j) of arXiv 2106.09685, equation 4.

    Raises:
      BaseMismatchError, ConversionError: as for `diff_rows`.
    """
    grids = {}
    for part, change, second in _paired(one, other, base, base):
        if change is not None and second is not None:
            both = np.asarray((change.values[:, 0] > 0) & (second.values[:, 0] > 0))
            if both.any():
                grids[part.site.path] = np.asarray(_grid(change.v[both, :MOST], second.v[both, :MOST]))
    return grids


def parameter_diffs(one: Tree, other: Tree) -> list[ParameterDiff]:
    """A row for each floating-point parameter of two models.

    Raises:
      BaseMismatchError: they do not have the same parameters, or one has another shape.
    """
    leaves, others = flatten(one), flatten(other)
    for path in sorted(leaves.keys() ^ others.keys()):
        near = ", ".join(nearest(path, others if path in leaves else leaves))
        raise BaseMismatchError(f"only one of the models has {path}; nearest in the other: {near}")
    rows = []
    for path, leaf in leaves.items():
        if leaf.shape != others[path].shape:
            raise BaseMismatchError(f"{path} is {leaf.shape} in one model and {others[path].shape} in the other")
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            norm, second, inner, distance = (float(each) for each in _leaf_figures(leaf, others[path]))
            rows.append(ParameterDiff(path, tuple(leaf.shape), ratio(distance, norm), _cosine(inner, norm, second)))
    return rows


def drift_rows(checkpoints: Sequence[tuple[int, Adapter]], base: Tree | None = None) -> list[DriftRow]:
    """How each kernel's change came about: a row for each checkpoint, kernel by kernel.

    Args:
      checkpoints: steps and adapters of one run, oldest first.
      base: as for `diff_rows`.

    Raises:
      ConfigError: there are none.
      ConversionError: the change depends on the input, or its base is missing.
    """
    if not checkpoints:
        raise ConfigError("there are no checkpoints to compare")
    steps, rows = [step for step, _ in checkpoints], []
    for found in zip(*(changes(base, adapter) for _, adapter in checkpoints), strict=True):
        path, each = found[0][0].site.path, [change for _, change in found]
        to_last = [_diff_row(path, None, _numbers(_related(change, each[-1]))) for change in each]
        last = to_last[-1].norm or 0.0
        gaps = [np.linalg.norm(np.asarray(_related(*pair)["distance"])) for pair in itertools.pairwise(each)]
        moved = [None, *(ratio(float(gap), last) for gap in gaps)]
        for step, row, move in zip(steps, to_last, moved, strict=True):
            rows.append(DriftRow(path, step, row.norm or 0.0, move, row.cosine, row.output))
    return rows


def _paired(
    one: Adapter, other: Adapter, base: Tree | None, other_base: Tree | None
) -> Iterator[tuple[Part, Change | None, Change | None]]:
    """Every kernel that either adapter changes, with both changes, None where there is none."""
    sites = {site.path: site for site in other.sites}
    of_other = lambda paths: _only(other, paths, other_base)
    for part, change in changes(base, one):
        site = sites.get(part.site.path)
        if site is None:
            yield part, change, None
            continue
        if (site.stack, site.in_dim, site.out_dim) != (part.site.stack, part.site.in_dim, part.site.out_dim):
            raise BaseMismatchError(
                f"{site.path} is {(*part.site.stack, *part.site.shape)} for one adapter and "
                f"{(*site.stack, *site.shape)} for the other: they are of different models"
            )
        yield part, change, next(of_other({site.path}))[1]
    for part, change in of_other(sites.keys() - {site.path for site in one.sites}):
        yield part, None, change


def _only(adapter: Adapter, paths: set[str], base: Tree | None) -> Iterator[tuple[Part, Change]]:
    """The changes at some of an adapter's sites."""
    sites = tuple(site for site in adapter.sites if site.path in paths)
    return changes(base, Adapter(adapter.trainable, adapter.frozen, adapter.method, sites))


def _lonely(
    part: Part, change: Change | None, second: Change | None, layers: tuple[int | None, ...]
) -> Iterator[DiffRow]:
    """Rows of a kernel that only one adapter changes."""
    sizes = [None if each is None else np.linalg.norm(np.asarray(each.values), axis=-1) for each in (change, second)]
    for place, layer in enumerate(layers):
        chosen = slice(place, place + 1) if layer is not None else slice(None)
        yield DiffRow(
            part.site.path, layer, *(None if size is None else float(np.linalg.norm(size[chosen])) for size in sizes)
        )


def _numbers(found: dict[str, Array]) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def _diff_row(path: str, layer: int | None, found: dict[str, np.ndarray]) -> DiffRow:
    """A row over some layers from their figures."""
    together = {name: float(np.linalg.norm(found[name])) for name in ("norm", "other", "distance")}
    live = ~np.isnan(found["input"])
    mean = lambda name: float(found[name][live].mean()) if live.any() else None
    return DiffRow(
        path,
        layer,
        together["norm"],
        together["other"],
        distance=together["distance"] / together["norm"] if together["norm"] else None,
        cosine=_cosine(float(found["inner"].sum()), together["norm"], together["other"]),
        input=mean("input"),
        output=mean("output"),
        chance_input=mean("chance_input"),
        chance_output=mean("chance_output"),
    )


def _cosine(inner: float, norm: float, other: float) -> float | None:
    return max(-1.0, min(1.0, inner / (norm * other))) if norm and other and math.isfinite(inner) else None


@jax.jit
def _related(one: Change, other: Change) -> dict[str, Float[Array, " layers"]]:
    """Norms, inner product, distance and overlaps in every layer; overlaps are NaN where a change is zero."""

    def layer(pair: tuple[Change, Change]) -> dict[str, Array]:
        a, b = pair
        on_input, on_output = a.u.T @ b.u, a.v @ b.v.T
        left = jnp.concatenate([a.u * a.values, b.u * b.values], axis=1)
        gap = product_values(left, jnp.concatenate([a.v, -b.v]))
        here, there = alive(a.values), alive(b.values)
        mask, i, j = here[:, None] & there, here.sum(), there.sum()
        nothing = jnp.minimum(i, j) == 0
        overlap = lambda cosines: jnp.where(
            nothing, jnp.nan, (jnp.square(cosines) * mask).sum() / jnp.maximum(jnp.minimum(i, j), 1)
        )
        return {
            "norm": jnp.linalg.norm(a.values),
            "other": jnp.linalg.norm(b.values),
            "inner": (a.values[:, None] * b.values * on_input * on_output).sum(),
            "distance": jnp.linalg.norm(gap),
            "input": overlap(on_input),
            "output": overlap(on_output),
            "chance_input": jnp.maximum(i, j) / a.u.shape[0],
            "chance_output": jnp.maximum(i, j) / a.v.shape[1],
        }

    return jax.lax.map(layer, (one, other))


@jax.jit
def _grid(one: Float[Array, "layers i out"], other: Float[Array, "layers j out"]) -> Float[Array, "i j"]:
    squares = jnp.square(jnp.einsum("lio,ljo->lij", one, other)).mean(0)
    sizes = jnp.minimum(jnp.arange(1, one.shape[1] + 1)[:, None], jnp.arange(1, other.shape[1] + 1))
    return squares.cumsum(0).cumsum(1) / sizes


@jax.jit
def _leaf_figures(one: Array, other: Array) -> tuple[Array, Array, Array, Array]:
    """‖θ‖, ‖θ'‖, ⟨θ, θ'⟩ and ‖θ' - θ‖."""
    a, b = one.astype(jnp.float32), other.astype(jnp.float32)
    return jnp.linalg.norm(a), jnp.linalg.norm(b), jnp.vdot(a, b), jnp.linalg.norm(b - a)
