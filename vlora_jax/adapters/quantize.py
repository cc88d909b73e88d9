"""Parameter trees with quantised kernels, and back; what such a kernel is stands in `quantized.py`."""

import functools

import jax
from jaxtyping import Array

from vlora_jax.adapters.quantized import BLOCKS, Form, Quantized, block_of, checked, encode, is_quantized
from vlora_jax.adapters.sites import Site, find_sites
from vlora_jax.adapters.trees import Tree, flatten, replace_leaves
from vlora_jax.errors import ConfigError


def in_layers(base: Tree) -> list[Site]:
    """The kernels that are meant to be quantised: those of stacked layers. Embeddings, heads and norms stay whole."""
    matrix = ("dense", (0,), (1,))
    return [site for site in find_sites(base) if site.stack and (site.kind, site.inputs, site.outputs) == matrix]


def quantizable(base: Tree, form: Form) -> list[Site]:
    """The kernels of layers that can be held in this form."""
    return [site for site in in_layers(base) if form == "int8" or block_of(site.in_dim)]


def left_whole(base: Tree, form: Form) -> list[str]:
    """A line for the kernels that cannot, if there are any."""
    fits = quantizable(base, form)
    odd = [f"{site.leaf_path} ({site.in_dim})" for site in in_layers(base) if site not in fits]
    return [f"{', '.join(odd)}: no multiple of {BLOCKS[-1]} inputs, not held as {form}"] if odd else []


def quantize(base: Tree, form: Form) -> Tree:
    """A model's parameters with the kernels of its layers in fewer bits: QLoRA's base (arXiv 2305.14314).

    Adapters are bound, trained and merged as on any base; a merge goes onto the values that the codes stand for, and
    gives ordinary parameters. The scales of NF4 stay float32 (half a bit a number; the paper quantises them again).

    Args:
      base: from `vlora_jax.split` or `load`, of any model with stacked layers.
      form: `"int8"`, one scale an output; or `"nf4"`, one for every 64 inputs of it.

    Raises:
      ConfigError: the form is none of the two, the model has no stacked layers that can be held so, or it is held
        in the other form already.

    >>> from flax import nnx
    >>> from vlora_jax import Stack, quantize, split
    >>> from vlora_jax.models.layers import Block, BlockConfig
    >>> config = BlockConfig(width=32, heads=2, mlp_width=64)
    >>> base = split(Stack(lambda rngs: Block(config, rngs), 3, rngs=nnx.Rngs(0)))[1]
    >>> kernel = flatten(quantize(base, "nf4"))["block/mlp/up/kernel"]
    >>> kernel.shape, kernel.codes.shape, kernel.scale.shape
    ((3, 32, 64), (3, 16, 64), (3, 1, 64))
    """
    sites, leaves = quantizable(base, checked(form)), flatten(base)
    if not sites:
        inputs = "" if form == "int8" else f" of a multiple of {BLOCKS[-1]} inputs"
        raise ConfigError(f"no kernel can be held as {form}: only matrices of stacked layers{inputs}")
    other = next((path for path, leaf in leaves.items() if is_quantized(leaf) and leaf.form != form), None)
    if other:
        raise ConfigError(f"{other} is held as {leaves[other].form} already; quantize the base as it was before")
    bare = [site for site in sites if not is_quantized(leaves[site.leaf_path])]
    held = {site.leaf_path: encode(leaves[site.leaf_path], form, site.closing) for site in bare}
    return replace_leaves(base, held)


def form_of(base: Tree) -> Form | None:
    """In which form a base holds kernels; None if it holds them as they are."""
    return next((leaf.form for leaf in flatten(base).values() if is_quantized(leaf)), None)


def quantized_shapes(shapes: Tree, form: Form | None) -> Tree:
    """`quantize` of shapes; None leaves them as they are."""
    return shapes if form is None else jax.eval_shape(lambda base: quantize(base, form), shapes)


def turned_into(kernel: Array, there: Quantized) -> Quantized:
    """A kernel in the form of `there`, whose parts say where it is to lie; the kernel's own memory is free then."""
    encoded = jax.jit(functools.partial(encode, form=there.form, closing=there.closing), out_shardings=there)(kernel)
    jax.block_until_ready(encoded)
    kernel.delete()
    return encoded
