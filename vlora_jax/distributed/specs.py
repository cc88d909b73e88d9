"""Where each tensor lies on the mesh, by rule from what its axes mean.

A kernel's inputs lie over `fsdp` and its outputs over `tensor`; layers that end a residual branch are turned
round, so that a branch needs one reduction. Adapters follow their kernel but leave `fsdp` out: they are small,
and gathering them would cost more than it saves. Ranks and layer axes are never split.
"""

import dataclasses
import math
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.quantized import grain, is_quantized
from vlora_jax.adapters.sites import Site, find_sites
from vlora_jax.adapters.trees import Tree, flatten, unflatten
from vlora_jax.distributed.mesh import BATCH_AXES


def fit(size: int, axis: str | None, mesh: Mesh | AbstractMesh) -> str | None:
    """`axis` if it divides `size`, else None: that dimension is replicated."""
    return axis if axis is not None and size % mesh.shape[axis] == 0 else None


def site_axes(site: Site) -> tuple[str, str]:
    """Mesh axes of a site's inputs and outputs."""
    return ("tensor", "fsdp") if site.closing else ("fsdp", "tensor")


def kernel_spec(site: Site, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """Spec of a stored kernel: the first input and the first output axis are split."""
    stack = len(shape) - len(site.shape)
    parts: list[str | None] = [None] * len(shape)
    for axis, name in zip((site.inputs[0], site.outputs[0]), site_axes(site), strict=True):
        parts[stack + axis] = fit(shape[stack + axis], name, mesh)
    return P(*parts)


def leaf_spec(site: Site, leaf: Any, mesh: Mesh | AbstractMesh) -> Any:
    """`kernel_spec` of a stored kernel; of a quantised one its codes' and scales', blocks of inputs kept together."""
    if not is_quantized(leaf):
        return kernel_spec(site, leaf.shape, mesh)
    codes, scale = (kernel_spec(site, shape, mesh) for shape in (leaf.grain, leaf.scale.shape))
    return dataclasses.replace(leaf, codes=codes, scale=scale)


def undivided(base: Tree, mesh: Mesh | AbstractMesh) -> list[str]:
    """What is replicated along a mesh axis because it does not divide: a line for each such axis."""
    found: dict[str, list[str]] = {}
    shapes = {path: grain(leaf) for path, leaf in flatten(base).items()}
    for site in find_sites(base):
        shape = shapes[site.leaf_path][-len(site.shape) :]
        for axis, name in zip((site.inputs[0], site.outputs[0]), site_axes(site), strict=True):
            if fit(shape[axis], name, mesh) is None:
                found.setdefault(name, []).append(f"{site.leaf_path} ({shape[axis]})")
    return [
        f"{', '.join(kernels)}: not divisible by mesh.{name} {mesh.shape[name]}, replicated along it"
        for name, kernels in found.items()
    ]


def base_specs(base: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Specs for a model's parameters; what is no kernel is replicated."""
    sites = {site.leaf_path: site for site in find_sites(base)}
    flat = {path: leaf_spec(sites[path], leaf, mesh) if path in sites else P() for path, leaf in flatten(base).items()}
    return unflatten(base, flat)


def adapter_specs(adapter: Adapter, mesh: Mesh | AbstractMesh) -> Adapter:
    """Specs for an adapter, in an adapter's form.

    A site's tensor whose last axis is the kernel's outputs, or whose last but one is its inputs, follows it there.
    """
    specs = jax.tree.map(lambda _: P(), adapter)
    for site in adapter.sites:
        ends = dict(zip((-2, -1), zip((site.in_dim, site.out_dim), site_axes(site), strict=True), strict=True))
        for part, target in ((adapter.trainable, specs.trainable), (adapter.frozen, specs.frozen)):
            for name, leaf in part["sites"].get(site.path, {}).items():
                axes: list[str | None] = [None] * len(leaf.shape)
                for end, (size, axis) in ends.items():
                    if axis == "tensor" and len(leaf.shape) - len(site.stack) >= -end and leaf.shape[end] == size:
                        axes[end] = fit(size, axis, mesh)
                target["sites"][site.path][name] = P(*axes)
    return specs


def like_parameters(tx: optax.GradientTransformation, opt_state: Tree, specs: Tree) -> Tree:
    """Specs for an optimiser's state: like the parameters it belongs to; scalars, and sums over axes, replicated."""
    same = lambda leaf, spec: spec if len(leaf.shape) >= len(spec) and leaf.shape != (1,) else P()
    return optax.tree_utils.tree_map_params(
        tx, same, opt_state, specs, transform_non_params=lambda _: P(), is_leaf=is_spec
    )


def is_spec(node: Any) -> bool:
    return isinstance(node, P)


def shardings(specs: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Specs bound to a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays `(micro-batches, examples, …)`."""
    return NamedSharding(mesh, P(None, BATCH_AXES))


def stored_bytes(tree: Tree) -> int:
    """Bytes of a tree, wherever they are."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_per_device(tree: Tree, specs: Tree, mesh: Mesh | AbstractMesh) -> int:
    """Bytes of a tree on one device."""
    total = 0
    for leaf, spec in zip(jax.tree.leaves(tree), jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
        ways = math.prod(
            mesh.shape[axis] for part in spec if part for axis in ((part,) if isinstance(part, str) else part)
        )
        total += leaf.size * leaf.dtype.itemsize // ways
    return total
