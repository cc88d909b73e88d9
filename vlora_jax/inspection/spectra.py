"""How large a change of a kernel is and at what rank: singular values, from the factors wherever there are any."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.bind import child
from vlora_jax.adapters.method import Method, over_stack
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import BaseMismatchError, nearest
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.run import effective_kernel, factors_of


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

    With left = Q R and rightᵀ = P S the product is Q (R Sᵀ) Pᵀ, so its singular values are those of R Sᵀ.
    """
    r = jnp.linalg.qr(left.astype(jnp.float32), mode="r")
    s = jnp.linalg.qr(right.astype(jnp.float32).T, mode="r")
    return jnp.linalg.svd(jnp.matmul(r, s.T, precision=jax.lax.Precision.HIGHEST), compute_uv=False)


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
    if not adapter.method.mergeable:
        return {}
    leaves = None if base is None else flatten(base)
    spectra = {}
    for site in adapter.sites:
        if leaves is not None and site.leaf_path not in leaves:
            near = ", ".join(nearest(site.leaf_path, leaves))
            raise BaseMismatchError(f"the adapter changes {site.leaf_path}; nearest parameters of this base: {near}")
        kernel = None if leaves is None else site.read(leaves)
        method = adapter.method.for_site(site)
        shape, own, shared = (site.in_dim, site.out_dim), adapter.factors(site.path), adapter.shared_at(site.path)
        values, norm = _change(method, site.stack, shape, kernel, own, shared)
        if values is not None:
            layers = tuple(range(site.layers)) if site.stack else (None,)
            spectra[site.path] = _spectrum(values, norm, layers)
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


@functools.partial(jax.jit, static_argnames=("method", "stack", "shape"))
def _change(
    method: Method,
    stack: tuple[int, ...],
    shape: tuple[int, ...],
    kernel: Array | None,
    factors: FactorDict,
    shared: FactorDict,
) -> tuple:
    """Singular values `(*stack, k)` or None, and the kernel's norm `(*stack,)` or None."""

    def one(_: Array, kernel: Array | None, factors: FactorDict) -> Array | None:
        factored = method.low_rank(shape, factors | shared)
        if factored is not None:
            return product_values(*factored)
        return None if kernel is None else _dense_values(method.delta(kernel.astype(jnp.float32), factors | shared))

    layers = jnp.zeros(stack)  # all that has a layer axis, where neither kernel nor tensors of its own do
    return over_stack(one, len(stack))(layers, kernel, factors), None if kernel is None else _norm(kernel)


@functools.partial(jax.jit, static_argnames=("vertical", "methods"))
def _increments(vertical: Vertical, methods: tuple[Method, ...], kernels: Array, tensors: Sequence) -> tuple:
    """Singular values `(compounds, increments, k)` and norms of the base kernels `(compounds,)`."""

    def one(kernel: Array, tensors: Sequence[FactorDict], index: Array) -> Array:
        if len(methods) == 1 and (vertical.structure == "star" or methods[0].adds_up):
            factored = methods[0].low_rank(kernel.shape, factors_of(vertical, methods[0], tensors[0], index))
            if factored is not None:
                return product_values(*factored)
        kernel = kernel.astype(jnp.float32)
        return _dense_values(effective_kernel(vertical, kernel, methods, tensors, index) - kernel)

    places = jnp.arange(vertical.size - vertical.increments, vertical.size)
    over_layers = jax.vmap(one, in_axes=(None, None, 0))
    return jax.vmap(over_layers, in_axes=(0, 0, None))(kernels, tensors, places), _norm(kernels)


def _dense_values(delta: Float[Array, "in out"]) -> Float[Array, " k"]:
    return jnp.linalg.svd(delta.astype(jnp.float32), compute_uv=False)


def _norm(kernel: Float[Array, "*stack in out"]) -> Float[Array, "*stack"]:
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=(-2, -1))


def _spectrum(values: Array, norm: Array | None, layers: tuple[int | None, ...]) -> Spectrum:
    base = None if norm is None else np.asarray(norm).reshape(len(layers))
    return Spectrum(np.asarray(values).reshape(len(layers), -1), base, layers)
