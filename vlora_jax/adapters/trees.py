"""Pytrees by path: one flat `{"a/b/kernel": leaf}` view of any parameter tree, and back."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
from flax import nnx

from vlora_jax.adapters.quantized import is_quantized
from vlora_jax.errors import CheckpointError, TargetError, nearest

Tree = Any


def path_of(key_path: tuple) -> str:
    """The path of a leaf as text; the `.value` that NNX puts in for a Variable is left out."""
    key_path = tuple(key for key in key_path if key != jax.tree_util.GetAttrKey("value"))
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def flatten(tree: Tree) -> dict[str, Any]:
    """Leaves of any pytree keyed by their path; a quantised kernel is one leaf.

    >>> flatten({"layers": {"kernel": 1, "bias": 2}})
    {'layers/bias': 2, 'layers/kernel': 1}
    """
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_quantized)[0]}


def unflatten(template: Tree, flat: Mapping[str, Any], what: str = "tree") -> Tree:
    """`template` with every leaf taken from `flat`; the paths must be the same on both sides.

    Raises:
      CheckpointError: a path of either side is missing on the other.
    """
    paths = list(flatten(template))
    missing, unexpected = [p for p in paths if p not in flat], [p for p in flat if p not in set(paths)]
    if missing or unexpected:
        hints = nearest((missing or unexpected)[0], flat if missing else paths)
        raise CheckpointError(
            f"{what}: {len(missing)} leaves missing {missing[:3]}, {len(unexpected)} unexpected "
            f"{unexpected[:3]}; nearest names: {', '.join(hints)}"
        )
    return jax.tree.unflatten(jax.tree.structure(template, is_quantized), [flat[p] for p in paths])


def replace_leaves(tree: Tree, values: Mapping[str, Any]) -> Tree:
    """`tree` with the leaves at the given paths exchanged; every path must exist."""
    if not values:
        return tree
    return unflatten(tree, flatten(tree) | dict(values))


def variables(tree: Tree) -> dict[str, Any]:
    """Like `flatten`, but an NNX Variable stays whole, so that its metadata can be read."""
    whole = lambda node: isinstance(node, nnx.Variable) or is_quantized(node)
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=whole)[0]
    return {path_of(path): leaf for path, leaf in leaves}


def shapes_only(tree: Tree) -> bool:
    """Whether a tree, or a leaf, has shapes where values should be."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def matches(pattern: str, path: str) -> bool:
    """Whether a regular expression matches one or more whole components of a path.

    >>> matches("q|v", "layers/attn/q"), matches("attn", "layers/attn/q"), matches("att", "layers/attn/q")
    (True, True, False)
    """
    return bool(re.search(rf"(^|/)(?:{pattern})(/|$)", path))


def matching(pattern: str, paths: Iterable[str], what: str, names: Iterable[str] = ()) -> list[str]:
    """The paths that a pattern matches.

    Args:
      what: names the pattern's role in errors.
      names: what else would have been valid, for the hint in errors.

    Raises:
      TargetError: it matches none, or is no regular expression.
    """
    paths = list(paths)
    try:
        hits = [path for path in paths if matches(pattern, path)]
    except re.error as error:
        raise TargetError(f"{what} {pattern!r} is not a regular expression: {error}") from None
    if not hits:
        raise TargetError(
            f"{what} {pattern!r} matches nothing; nearest: {', '.join(nearest(pattern, [*paths, *names])) or 'none'}"
        )
    return hits


def map_alike(function: Callable[..., Any], tree: Tree, template: Tree, *others: Tree) -> Tree:
    """`tree` with `function(leaf, like, *others)` in each subtree built like `template`: an optimiser's moments.

    Args:
      function: of a leaf, the one of `template` in the same place, and those of `others`.

    >>> map_alike(lambda leaf, like: leaf * like, (3, {"w": 2}), {"w": 5})
    (3, {'w': 10})
    """
    structure = jax.tree.structure(template)
    alike = lambda node: jax.tree.structure(node) == structure
    change = lambda node: jax.tree.map(function, node, template, *others) if alike(node) else node
    return jax.tree.map(change, tree, is_leaf=alike)
