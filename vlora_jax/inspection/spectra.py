"""How large a change of a kernel is and at what rank: singular values, from the factors wherever there are any."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.bind import child
from vlora_jax.adapters.factorise import singular_values, triangle
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.inspection.changes import parts
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.run import effective_kernel, factors_of

ALIVE = 1e-3  # of the largest singular value, below which a direction is dead


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one kernel's change, layer by layer.

    Attributes:
      values: `(layers, k)`, largest first.
      base: Frobenius norm of the unchanged kernel, `(layers,)`; None if the base is not given.
      layers: the number of each row's layer in its stack; None for a kernel that is not stacked.
    """

    values: np.ndarray
    base: np.ndarray | None
    layers: tuple[int | None, ...]

    @property
    def norm(self) -> np.ndarray:
        """Frobenius norm of each layer's change, `(layers,)`."""
        return np.linalg.norm(self.values, axis=-1)

    @property
    def effective_rank(self) -> np.ndarray:
        """Effective rank of each layer's change, `(layers,)`."""
        return effective_rank(self.values)

    @property
    def alive(self) -> np.ndarray:
        """How many directions carry each layer's change, `(layers,)`."""
        return alive(self.values).sum(-1)


def alive(values: Any) -> Any:
    """Which directions count: those whose singular value is above a thousandth of the largest; the others are dead.

    Args:
      values: singular values `(…, k)`, largest first; NumPy's or JAX's.

    >>> alive(np.array([[2.0, 1.0, 1e-4], [0.0, 0.0, 0.0]])).tolist()
    [[True, True, False], [False, False, False]]
    """
    return values > ALIVE * values[..., :1]


def energy(values: np.ndarray, leading: int) -> float:
    """Share of ‖ΔW‖² in the leading directions of each layer, over all layers; 0 for no change.

    >>> energy(np.array([[2.0, 1.0], [2.0, 1.0]]), 1)
    0.8
    """
    squares = np.square(np.asarray(values, np.float64))
    total = squares.sum()
    return float(squares[..., :leading].sum() / total) if total else 0.0


def effective_rank(values: np.ndarray) -> np.ndarray:
    """exp(-Σ pᵢ ln pᵢ) with pᵢ = σᵢ / Σσ: the effective rank of Roy and Vetterli (EUSIPCO 2007, definition 1).

    Between 1 and the rank; equal to the rank if all non-zero singular values are equal; 0 for a zero matrix.

    Args:
      values: singular values `(…, k)`.

    >>> effective_rank(np.array([[2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).round(6).tolist()
    [3.0, 0.0]
    """
    values = np.asarray(values, np.float64)
    total = values.sum(-1, keepdims=True)
    shares = np.divide(values, total, out=np.zeros_like(values), where=total != 0)
    entropy = -(shares * np.log(shares, out=np.zeros_like(shares), where=shares > 0)).sum(-1)
    return np.where(total[..., 0] == 0, 0.0, np.exp(entropy))


def product_values(left: Float[Array, "in r"], right: Float[Array, "r out"]) -> Float[Array, " k"]:
    """Singular values of `left @ right`, largest first; costs O((in + out)·r²) and never builds the product.

    They are those of the small factor in `vlora_jax.adapters.svd.product_svd`.
    """
    r, s = triangle(left.astype(jnp.float32)), triangle(right.astype(jnp.float32).T)
    return singular_values(jnp.matmul(r, s.T, precision=jax.lax.Precision.HIGHEST))


def adapter_spectra(base: Tree | None, adapter: Adapter) -> dict[str, Spectrum]:
    """The spectrum of ΔW at each site of an adapter.

    Args:
      base: the parameters it changes; of a vertical model, those of its dense twin (`vlora_jax.expand`). Without
        them norms of the base are unknown, and sites whose method is no low-rank product are left out.

    Returns:
      By site path. Sites whose change depends on the input have no ΔW and are left out.

    Raises:
      BaseMismatchError: the base lacks a site of the adapter.
      ConversionError: layers of the base share their kernels.
    """
    spectra = {}
    for part in parts(base, adapter):
        values = part.each(product_values, matrix_values)
        if values is not None:
            kernel = part.kernel
            norm = None if kernel is None else np.asarray(norms(kernel)).reshape(-1)
            spectra[part.site.path] = Spectrum(np.asarray(values), norm, part.layers)
    return spectra


def vertical_spectra(graphdef: nnx.GraphDef, params: Tree) -> dict[str, Spectrum]:
    """The spectrum of `K - K₀`, a layer's kernel against its compound's base, for each target of vertical stacks.

    In a chain that is the sum of all increments up to the layer. Layers without an increment are left out; a model
    without vertical stacks has no spectra.

    Args:
      graphdef, params: the model, from `vlora_jax.split`.

    Returns:
      By the target's path in the model.
    """
    spectra = {}
    for target in vertical_targets(graphdef, params):
        vertical = target.vertical
        first = vertical.size - vertical.increments
        layers = vertical.grid(np.arange(target.layers), target.layers)[:, first:].reshape(-1)
        order = np.argsort(layers)
        methods = tuple(method.for_site(target.site) for method in vertical.methods)
        values, norm = _increments(vertical, methods, target.kernel, list(target.tensors.values()))
        base = np.repeat(np.asarray(norm), vertical.increments)
        flat = np.asarray(values).reshape(len(layers), -1)
        spectra[target.path] = Spectrum(flat[order], base[order], tuple(layers[order].tolist()))
    return spectra


@dataclass(frozen=True)
class VerticalTarget:
    """One shared kernel of a vertical stack, with its increments.

    Attributes:
      path: in the model.
      layers: depth of the stack.
      kernel: `(compounds, in, out)`.
      tensors: of each method by name, `(compounds, increments, …)`.
    """

    path: str
    vertical: Vertical
    site: Site
    layers: int
    kernel: Array
    tensors: dict[str, FactorDict]


def vertical_targets(graphdef: nnx.GraphDef, params: Tree) -> Iterator[VerticalTarget]:
    """Every shared kernel of a model that has increments."""
    for path, module in nnx.iter_modules(nnx.merge(graphdef, params)):
        if not isinstance(module, Stack) or module.vertical is None or not module.vertical.increments:
            continue
        vertical = module.vertical
        for site in module.sites:
            tensors = {
                method.name: {k: v.get_value() for k, v in module.increments[method.name][site.path].items()}
                for method in vertical.methods
            }
            if tensors:
                kernel = site.matrix(getattr(child(module.block, site.path), site.leaf).get_value())
                full_path = "/".join((*map(str, path), "block", site.path))
                yield VerticalTarget(full_path, vertical, site, module.layers, kernel, tensors)


@functools.partial(jax.jit, static_argnames=("vertical", "methods"))
def _increments(vertical: Vertical, methods: tuple[Method, ...], kernels: Array, tensors: Sequence) -> tuple:
    """Singular values `(compounds, increments, k)` and norms of the base kernels `(compounds,)`."""

    def one(kernel: Array, tensors: Sequence[FactorDict], index: Array) -> Array:
        if len(methods) == 1 and (vertical.structure == "star" or methods[0].adds_up):
            factored = methods[0].low_rank(kernel.shape, factors_of(vertical, methods[0], tensors[0], index))
            if factored is not None:
                return product_values(*factored)
        kernel = kernel.astype(jnp.float32)
        return matrix_values(effective_kernel(vertical, kernel, methods, tensors, index) - kernel)

    places = jnp.arange(vertical.size - vertical.increments, vertical.size)
    over_layers = jax.vmap(one, in_axes=(None, None, 0))
    return jax.vmap(over_layers, in_axes=(0, 0, None))(kernels, tensors, places), norms(kernels)


def matrix_values(delta: Float[Array, "in out"]) -> Float[Array, " k"]:
    """Singular values of a matrix, largest first."""
    return singular_values(delta.astype(jnp.float32))


@jax.jit
def norms(kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack"]:
    """Frobenius norm of each layer's kernel."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=(-2, -1))
