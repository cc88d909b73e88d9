"""A pretrained dense model as a vertical one (arXiv 2410.20672, with a base of our own)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.factorise import qr, svd
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.sites import Site, find_sites, split
from vlora_jax.adapters.trees import Tree, flatten, variables
from vlora_jax.errors import ConversionError
from vlora_jax.models.stack import Stack
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.expand import expand, note_in_configs
from vlora_jax.vertical.run import BaseKernel


def convert(
    graphdef: nnx.GraphDef, base: Tree, vertical: Vertical, *, iterations: int = 30
) -> tuple[nnx.GraphDef, nnx.State]:
    """A dense model with the kernels of each compound shared: a start for training, not a finished model.

    With an increment on every layer (`adapter_on_base`), the base kernel of a star is the mean of its layers,
    refined so that what the increments leave is least; of a chain it is the mean as it is, which leaves less
    there. Without, the base is the first layer's kernel, as in VLoRA, which pretrained layers are too far apart
    for. Increments are truncated SVDs of what is missing, in a chain against the layer before *as rebuilt*, so
    that errors do not add up. Hard tying (`enabled=False`) takes the mean. Norms, biases and all else outside
    `vertical.targets` stay each layer's own.

    Args:
      graphdef, base: the dense model, from `vlora_jax.split`; each of its `Stack`s is converted.
      vertical: what to share. LoRA increments on all layers, ranks of an eighth to a quarter of the width and
        `detach="none"` are what the literature found to work; a full rank gives back the dense model.
      iterations: of the refinement; 0 leaves the mean.

    Returns:
      Graph and parameters, those of a model built with `vertical`. Bases have the dtype of the dense kernels,
      increments are float32.

    Raises:
      ConversionError: increments other than LoRA, a scale that is not positive, or no dense stack to convert.
      ConfigError: the compound size does not divide the depth, or a rank is too large.
      TargetError: a target selects no kernel.

    >>> from vlora_jax import LoRA, split
    >>> stack = Stack(lambda rngs: nnx.Linear(4, 4, rngs=rngs), 4, rngs=nnx.Rngs(0))
    >>> shared = Vertical(size=2, increment=LoRA(rank=4), adapter_on_base=True)
    >>> graphdef, base = convert(*split(stack), shared)
    >>> base["block"]["kernel"].shape, base["increments"]["lora"][""]["a"].shape
    ((2, 4, 4), (2, 2, 4, 4))
    """
    model = nnx.merge(graphdef, base)
    stacks = [module for _, module in nnx.iter_modules(model) if isinstance(module, Stack)]
    if not stacks:
        raise ConversionError("the model has no stack of layers (vlora_jax.models.stack.Stack) to convert")
    if any(stack.vertical is not None for stack in stacks):
        raise ConversionError("the model is vertical already; expand it to dense parameters first (vlora_jax.expand)")
    _check_increments(vertical)
    for stack in stacks:
        stack.share(vertical, functools.partial(fit, vertical, iterations))
    note_in_configs(model, vertical)
    return split(model)


def residuals(dense: Tree, graphdef: nnx.GraphDef, base: Tree) -> dict[str, Float[Array, "layers"]]:
    """How far a vertical model's kernels are from those of a dense model, such as the one it was converted from.

    Args:
      dense: parameters of the dense model.
      graphdef, base: the vertical one.

    Returns:
      ‖W_l − K_l‖ / ‖W_l‖ (Frobenius) of every layer, by the path of each shared kernel.
    """
    stored, leaves, expanded = variables(base), flatten(dense), expand(graphdef, base)[1]
    built = flatten(expanded)
    shared = [site for site in find_sites(expanded) if isinstance(stored[site.leaf_path], BaseKernel)]
    return {site.path: _distance(site.read(leaves), site.read(built)) for site in shared}


@jax.jit
def _distance(kernels: Array, others: Array) -> Array:
    kernels, others = kernels.astype(jnp.float32), others.astype(jnp.float32)
    norm = lambda matrices: jnp.linalg.norm(matrices, axis=(-2, -1))
    return norm(kernels - others) / jnp.maximum(norm(kernels), jnp.finfo(jnp.float32).tiny)


def _check_increments(vertical: Vertical) -> None:
    method = vertical.increment
    if not vertical.methods:
        return
    if type(method) is not LoRA:
        raise ConversionError(f"increments on pretrained layers are SVDs, which are LoRA, not {method.name}")
    if min([method.alpha, *dict(method.alpha_pattern).values()]) <= 0:
        raise ConversionError("increments with an alpha of 0 or below cannot hold an SVD")


def fit(
    vertical: Vertical, iterations: int, site: Site, kernels: Float[Array, "layers in out"]
) -> tuple[Float[Array, "compounds in out"], dict[str, FactorDict]]:
    """Base kernels of one target and the tensors of its increments by method, `(compounds, increments, …)`."""
    grid = vertical.grid(kernels, len(kernels))
    if not vertical.methods:
        return grid.astype(jnp.float32).mean(axis=1).astype(kernels.dtype), {}
    lora, *others = vertical.methods
    lora.check_rank(site)  # type: ignore[attr-defined]  check() lets only LoRA through
    bases, factors = _fit_compounds(vertical, lora.for_site(site), iterations, grid)
    at_start = {method.name: method.init_stack(jax.random.key(0), site).trainable for method in others}
    return bases, {lora.name: factors} | at_start


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit_compounds(
    vertical: Vertical, lora: LoRA, iterations: int, grid: Float[Array, "compounds size in out"]
) -> tuple[Array, FactorDict]:
    """`fit` compound by compound: SVDs need several times the memory of what they factorise."""

    def one(kernels: Array) -> tuple[Array, FactorDict]:
        kernels = kernels.astype(jnp.float32)
        if not vertical.adapter_on_base:
            base, rest = kernels[0], kernels[1:]
        elif vertical.structure == "star":
            base, rest = common_base(kernels, lora.rank, iterations), kernels
        else:
            base, rest = kernels.mean(axis=0), kernels
        base = base.astype(grid.dtype)  # so that increments make up for its rounding too
        a, b = _star(base, rest, lora.rank) if vertical.structure == "star" else _chain(base, rest, lora.rank)
        return base, {"a": a * lora.scale**-0.5, "b": b * lora.scale**-0.5}

    return jax.lax.map(one, grid)


def _star(base: Array, kernels: Array, rank: int) -> tuple[Array, Array]:
    return jax.vmap(lambda kernel: nearest_product(kernel - base, rank))(kernels)


def _chain(base: Array, kernels: Array, rank: int) -> tuple[Array, Array]:
    def step(before: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        a, b = nearest_product(kernel - before, rank)
        return before + a @ b, (a, b)

    return jax.lax.scan(step, base.astype(jnp.float32), kernels)[1]


def nearest_product(
    matrix: Float[Array, "in out"], rank: int
) -> tuple[Float[Array, "in {rank}"], Float[Array, "{rank} out"]]:
    """The product `A B` of a rank that is nearest to a matrix, balanced: `A = U√Σ`, `B = √Σ Vᵀ`."""
    u, sigma, v = svd(matrix)
    root = jnp.sqrt(sigma[:rank])
    return u[:, :rank] * root, root[:, None] * v[:rank]


def common_base(kernels: Float[Array, "size in out"], rank: int, iterations: int) -> Float[Array, "in out"]:
    """A kernel that leaves little of a compound beyond products of a rank.

    Lowers Σᵢ ‖Wᵢ − W − Dᵢ‖² over W and all Dᵢ of the rank, from W the mean and Dᵢ = SVD(Wᵢ − W), by minimising
    over one factor of the Dᵢ, the other, and W in turn, so it never rises. Full SVDs in every turn take several
    times as long for next to nothing: after 30 of them four unrelated 256² kernels kept .564 (rank 16) and .321
    (rank 64) of their norm, here .564 and .322.
    """
    base, bases = kernels.mean(axis=0), jax.vmap(lambda columns: qr(columns)[0])
    _, b = jax.vmap(lambda kernel: nearest_product(kernel - base, rank))(kernels)

    def turn(_: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
        base, rows = state
        rest = kernels - base
        columns = bases(rest @ rows)
        rows = rest.swapaxes(1, 2) @ columns
        return (kernels - columns @ rows.swapaxes(1, 2)).mean(axis=0), bases(rows)

    return jax.lax.fori_loop(0, iterations, turn, (base, b.swapaxes(1, 2)))[0]
