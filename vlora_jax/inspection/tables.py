"""What an adapter, a vertical model or a checkpoint holds, as plain rows: for tables, plots and comparisons."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.sites import find_sites
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import BaseMismatchError
from vlora_jax.inspection.spectra import Spectrum, adapter_spectra, energy, norms, vertical_spectra, vertical_targets

LEADING = 4
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Spread:
    """A quantity over layers."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Of at least one value."""
        return cls(float(values.mean()), float(values.min()), float(values.max()))


@dataclass(frozen=True)
class ChangeRow:
    """What one kernel, or one layer of it, is changed by.

    Attributes:
      path: the kernel's module, or the parameter itself where `method` is `"full"` or `"shared"`.
      layer: its number in the stack; None for all layers together.
      method: name of the method; `"full"` for a parameter trained whole, `"shared"` for a tensor of several sites.
      shapes: of the method's tensors by name, layer axes first.
      numbers: how many numbers train.
      norm: ‖ΔW‖, Frobenius, over all layers of the row; None if ΔW is not known.
      relative: ‖ΔW‖ / ‖W‖; None if either is not known.
      rank: effective rank of ΔW over the layers of the row; None if ΔW is not known.
      energy: share of ‖ΔW‖² in the leading singular directions of each layer (`leading` of them).
      directions: how many directions the method gives, over all layers of the row.
      dead: those of them that carry next to nothing, see `spectra.alive`.
    """

    path: str
    layer: int | None
    method: str
    shapes: Shapes
    numbers: int
    norm: float | None = None
    relative: float | None = None
    rank: Spread | None = None
    energy: float | None = None
    directions: int | None = None
    dead: int | None = None


@dataclass(frozen=True)
class ParameterRow:
    """One array of a checkpoint; `rms` is the root mean square of its entries, None for integers and keys."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    numbers: int
    rms: float | None


@dataclass(frozen=True)
class KernelRow:
    """One layer's kernel of a model; `rms` is the root mean square of its entries."""

    path: str
    layer: int | None
    rms: float


def adapter_rows(
    base: Tree | None, adapter: Adapter, per_layer: bool = False, leading: int = LEADING
) -> list[ChangeRow]:
    """One row a site (or a layer of it), then one for each tensor that sites share or that is trained whole.

    `numbers` of all rows add up to `vlora_jax.count(adapter)`.

    Args:
      base: the parameters it changes, as for `adapter_spectra`; None if they are not at hand.
      per_layer: a row for each layer of a stacked kernel.
      leading: how many singular directions `energy` counts.

    Raises:
      BaseMismatchError: the base lacks what the adapter changes.
      ConversionError: layers of the base share their kernels.
    """
    spectra, name, rows = adapter_spectra(base, adapter), adapter.method.name, []
    for site in adapter.sites:
        trained = adapter.trainable["sites"].get(site.path, {})
        row = ChangeRow(site.path, None, name, _shapes(adapter.factors(site.path)), _numbers(trained))
        layers = tuple(range(site.layers)) if site.stack else (None,)
        rows += _measured(row, len(site.stack), layers, spectra.get(site.path), per_layer, leading)
    for tensor, value in adapter.shared.items():
        numbers = value.size if tensor in adapter.trainable["shared"] else 0
        rows.append(ChangeRow(tensor, None, "shared", _shapes({tensor: value}), numbers))
    leaves = None if base is None else flatten(base)
    for path, value in adapter.trainable["full"].items():
        row = ChangeRow(path, None, "full", _shapes({path.rpartition("/")[2]: value}), value.size)
        if leaves is not None:
            if path not in leaves:
                raise BaseMismatchError(f"the adapter trains {path} whole, which this base does not have")
            change, whole = (float(norm) for norm in _moved(value, leaves[path]))
            row = dataclasses.replace(row, norm=change, relative=ratio(change, whole))
        rows.append(row)
    return rows


def increment_rows(
    graphdef: nnx.GraphDef, params: Tree, per_layer: bool = False, leading: int = LEADING
) -> list[ChangeRow]:
    """One row a target of each vertical stack (or a layer of it): how far its layers' kernels are from their base.

    Args:
      graphdef, params: the model, from `vlora_jax.split`; without vertical stacks there are no rows.
      per_layer: a row for each layer that has an increment, in running order.
      leading: how many singular directions `energy` counts.
    """
    spectra, rows = vertical_spectra(graphdef, params), []
    for target in vertical_targets(graphdef, params):
        several = len(target.tensors) > 1
        tensors = {
            f"{method}.{name}" if several else name: tensor
            for method, factors in target.tensors.items()
            for name, tensor in factors.items()
        }
        spectrum = spectra[target.path]
        row = ChangeRow(target.path, None, " + ".join(target.tensors), _shapes(tensors), _numbers(tensors))
        rows += _measured(row, len(target.site.stack), spectrum.layers, spectrum, per_layer, leading)
    return rows


def parameter_rows(params: Tree) -> list[ParameterRow]:
    """One row for each array of a parameter tree, in its order.

    >>> [row.path for row in parameter_rows({"a": jnp.ones((2, 3)), "b": {"c": jnp.arange(4)}})]
    ['a', 'b/c']
    """
    leaves = flatten(params)
    rms = _rms({path: leaf for path, leaf in leaves.items() if jnp.issubdtype(leaf.dtype, jnp.floating)})
    return [
        ParameterRow(
            path, tuple(leaf.shape), str(leaf.dtype), math.prod(leaf.shape), float(rms[path]) if path in rms else None
        )
        for path, leaf in leaves.items()
    ]


def kernel_rows(params: Tree) -> list[KernelRow]:
    """A row for each layer of every kernel of a model that is not vertical (`vlora_jax.expand` it).

    >>> kernel_rows({"head": {"kernel": jnp.full((2, 3), -0.5)}})
    [KernelRow(path='head', layer=None, rms=0.5)]
    """
    leaves, rows = flatten(params), []
    for site in find_sites(params):
        sizes = np.asarray(norms(site.read(leaves))).reshape(-1) / math.sqrt(site.in_dim * site.out_dim)
        layers = range(site.layers) if site.stack else (None,)
        rows += [KernelRow(site.path, layer, float(rms)) for layer, rms in zip(layers, sizes, strict=True)]
    return rows


def _measured(
    row: ChangeRow,
    stack_dims: int,
    layers: tuple[int | None, ...],
    spectrum: Spectrum | None,
    per_layer: bool,
    leading: int,
) -> Iterator[ChangeRow]:
    """`row` with the figures of all layers, or a row for each layer of a stack."""
    if not (per_layer and stack_dims):
        yield dataclasses.replace(row, **_figures(spectrum, slice(None), leading))
        return
    shapes = {name: shape[stack_dims:] for name, shape in row.shapes.items()}
    row = dataclasses.replace(row, shapes=shapes, numbers=row.numbers // len(layers))
    for index, layer in enumerate(layers):
        yield dataclasses.replace(row, layer=layer, **_figures(spectrum, slice(index, index + 1), leading))


def _figures(spectrum: Spectrum | None, layers: slice, leading: int) -> dict[str, Any]:
    if spectrum is None:
        return {}
    norm = float(np.linalg.norm(spectrum.norm[layers]))
    relative = None if spectrum.base is None else ratio(norm, float(np.linalg.norm(spectrum.base[layers])))
    values = spectrum.values[layers]
    return {
        "norm": norm,
        "relative": relative,
        "rank": Spread.of(spectrum.effective_rank[layers]),
        "energy": energy(values, leading),
        "directions": values.size,
        "dead": values.size - int(spectrum.alive[layers].sum()),
    }


def ratio(change: float, whole: float) -> float:
    """Their quotient; a change of a zero kernel is infinitely large."""
    return change / whole if whole else math.inf if change else 0.0


def _shapes(tensors: Mapping[str, Array]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _numbers(tensors: Mapping[str, Array]) -> int:
    return sum(math.prod(tensor.shape) for tensor in tensors.values())


@jax.jit
def _moved(value: Array, base: Array) -> tuple[Array, Array]:
    """Norms of a parameter's change and of the parameter before it."""
    base = base.astype(jnp.float32)
    return jnp.linalg.norm(value.astype(jnp.float32) - base), jnp.linalg.norm(base)


@jax.jit
def _rms(leaves: dict[str, Array]) -> dict[str, Array]:
    return jax.tree.map(lambda leaf: jnp.sqrt(jnp.mean(jnp.square(leaf.astype(jnp.float32)))), leaves)
