"""Where every tensor of a run lies on a mesh, and how much of it each device holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from vlora_jax.adapters.trees import Tree, path_of
from vlora_jax.distributed.specs import bytes_per_device, is_spec


@dataclass(frozen=True)
class SpecRow:
    """One tensor.

    Attributes:
      part: of what: `"base"`, `"trainable"`, `"frozen"` or `"optimizer"`.
      spec: the mesh axes that each of its axes is split over, None where it is not; () if it is replicated.
      bytes: on one device.
    """

    part: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: tuple[Any, ...]
    bytes: int


def spec_rows(parts: Mapping[str, tuple[Tree, Tree]], mesh: Mesh | AbstractMesh) -> list[SpecRow]:
    """A row a tensor.

    Args:
      parts: trees of arrays or shapes with the tree of their specs.
    """
    rows = []
    for part, (tree, specs) in parts.items():
        stored = jax.tree_util.tree_flatten_with_path(tree)[0]  # of a quantised kernel, its codes and its scales
        for (path, leaf), spec in zip(stored, jax.tree.leaves(specs, is_leaf=is_spec), strict=True):
            held = bytes_per_device(leaf, spec, mesh)
            split = tuple(spec) if any(axis is not None for axis in spec) else ()
            rows.append(SpecRow(part, path_of(path), tuple(leaf.shape), str(leaf.dtype), split, held))
    return rows
