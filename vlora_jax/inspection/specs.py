"""Where every tensor of a run lies on a mesh, and how much of it each device holds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from vlora_jax.adapters.trees import Tree, flatten
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
        paired = zip(flatten(tree).items(), jax.tree.leaves(specs, is_leaf=is_spec), strict=True)
        for (path, leaf), spec in paired:
            held = bytes_per_device(leaf, spec, mesh)
            split = tuple(spec) if any(axis is not None for axis in spec) else ()
            rows.append(SpecRow(part, path, tuple(leaf.shape), str(leaf.dtype), split, held))
    return rows
