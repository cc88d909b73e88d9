"""How much of its vectors a method uses, where vectors are what trains: VeRA's d and b, IA3's l, DoRA's magnitudes."""

from dataclasses import dataclass

import numpy as np

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.sites import Site

SMALL = 0.01  # of the largest entry, below which an entry counts as zero


@dataclass(frozen=True)
class VectorRow:
    """One trained vector.

    Attributes:
      path: of its site; empty for a vector that sites share.
      layer: None for a kernel that is not stacked.
      size: entries.
      rms: root mean square of the entries.
      spread: their standard deviation over |mean|: 0 where all are equal, as at most methods' start.
      saturation: (Σ x²)² / (n Σ x⁴), the share of the entries that do the work: 1 if all are equally large, so that the
        vector has no room left, 1/n if a single one does everything; 0 for a zero vector.
      small: share of entries below a hundredth of the largest.
    """

    path: str
    name: str
    layer: int | None
    size: int
    rms: float
    spread: float
    saturation: float
    small: float


def vector_rows(adapter: Adapter) -> list[VectorRow]:
    """A row for each layer of each trained vector of an adapter; matrices have spectra instead.

    >>> import jax.numpy as jnp
    >>> shared = {"d": jnp.array([1.0, -1.0, 0.0, 0.0])}
    >>> [row.saturation for row in vector_rows(Adapter.of(None, [], trainable={}, shared=shared))]
    [0.5]
    """
    rows = []
    for site in adapter.sites:
        for name, tensor in adapter.trainable["sites"].get(site.path, {}).items():
            if tensor.ndim == len(site.stack) + 1:
                rows += _rows(site, name, np.asarray(tensor, np.float64))
    for name, tensor in adapter.trainable["shared"].items():
        if tensor.ndim == 1:
            rows.append(vector_row("", name, None, np.asarray(tensor, np.float64)))
    return rows


def vector_row(path: str, name: str, layer: int | None, values: np.ndarray) -> VectorRow:
    """The figures of one vector."""
    squares, sizes = np.square(values), np.abs(values)
    fourth = np.square(squares).sum()
    mean, largest = abs(values.mean()), sizes.max()
    return VectorRow(
        path,
        name,
        layer,
        values.size,
        rms=float(np.sqrt(squares.mean())),
        spread=float(values.std() / mean) if mean else 0.0 if not largest else float("inf"),
        saturation=float(squares.sum() ** 2 / (values.size * fourth)) if fourth else 0.0,
        small=float((sizes < SMALL * largest).mean()) if largest else 1.0,
    )


def _rows(site: Site, name: str, values: np.ndarray) -> list[VectorRow]:
    layers = tuple(range(site.layers)) if site.stack else (None,)
    flat = values.reshape(len(layers), -1)
    return [vector_row(site.path, name, layer, each) for layer, each in zip(layers, flat, strict=True)]
