"""Sites: the kernels of a model that a method can change, and their selection by name.

A kernel's axes are either layer axes (stacked layers, always counted first), inputs that the layer contracts,
or outputs that it emits. `Layout` says which is which for one layer; `split` writes it beside every kernel of
an NNX model, so that the parameter pytree alone is enough to attach an adapter to any layer type.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from vlora_jax.adapters.quantized import Quantized, whole
from vlora_jax.adapters.trees import Tree, matching, variables
from vlora_jax.errors import BaseMismatchError, ConversionError, TargetError

Patterns = str | Sequence[str]

ATTENTION = re.compile(r"(^|/)[^/]*(attn|attention|mha)[^/]*/", re.IGNORECASE)
MLP = re.compile(
    r"(^|/)([^/]*(mlp|ffn|feed_?forward)[^/]*/|(fc_?\d|linear_?\d|wi(_\d)?|up|down|gate)(_proj)?$)", re.IGNORECASE
)
HEAD = re.compile(r"(^|/)([^/]*_head|head|classifier|logits|score)$", re.IGNORECASE)
CLOSING = re.compile(r"(^|/)(o|down|out|proj|fc2|wo|(o|down|out)_proj)$")
LEAVES = ("kernel", "embedding")
NUMBERED = re.compile(r"((?:^|/)(?:[^/]*_)?)(\d+)(?=/)")  # `layers/3/`, `block_3/`


@dataclass(frozen=True)
class Layout:
    """Which axes of one layer's kernel are inputs and which are outputs, and how many layers use it."""

    kind: str  # "dense", "einsum" or "embed"
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    layers: int | None = None  # only where fewer copies are stored than layers use: vertical stacks


@dataclass(frozen=True)
class Site:
    """One kernel that a method changes.

    Attributes:
      path: where its module is in the model, `"layers/block/attn/q"`.
      leaf: the parameter's name there, `"kernel"` or `"embedding"`.
      kind: `"dense"`, `"einsum"` or `"embed"`.
      stack: sizes of the layer axes; `()` for a layer that is not stacked.
      shape: the kernel of one layer as the model stores it.
      inputs, outputs: the axes of `shape` that are contracted with the input and emitted.
      stack_axis: where the model stores the layer axes (Linen's `nn.scan` may put them elsewhere than first).
    """

    path: str
    leaf: str
    kind: str
    stack: tuple[int, ...]
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    stack_axis: int = 0

    @property
    def leaf_path(self) -> str:
        return f"{self.path}/{self.leaf}" if self.path else self.leaf

    @property
    def in_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.inputs)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.outputs)

    @property
    def in_dim(self) -> int:
        return math.prod(self.in_shape)

    @property
    def out_dim(self) -> int:
        return math.prod(self.out_shape)

    @property
    def closing(self) -> bool:
        """Whether its layer ends a residual branch, or is an embedding: its outputs are as wide as the model."""
        return self.kind == "embed" or bool(CLOSING.search(self.path))

    @property
    def layers(self) -> int:
        return math.prod(self.stack)

    def matrix(self, stored: Array | Quantized) -> Array:
        """A stored kernel as `(*stack, in, out)`; without the layer axes if it was sliced inside a scan."""
        kernel: Array = whole(stored)
        stack = kernel.ndim - len(self.shape)
        if stack:
            sources = tuple(range(self.stack_axis, self.stack_axis + stack))
            kernel = jnp.moveaxis(kernel, sources, tuple(range(stack)))
        order = (*range(stack), *(stack + axis for axis in (*self.inputs, *self.outputs)))
        return kernel.transpose(order).reshape(*kernel.shape[:stack], self.in_dim, self.out_dim)

    def kernel(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        stack = matrix.ndim - 2
        axes = (*self.inputs, *self.outputs)
        kernel = matrix.reshape(*matrix.shape[:stack], *(self.shape[axis] for axis in axes))
        order = (*range(stack), *(stack + axes.index(axis) for axis in range(len(axes))))
        targets = tuple(range(self.stack_axis, self.stack_axis + stack))
        return jnp.moveaxis(kernel.transpose(order), tuple(range(stack)), targets)

    def read(self, base: dict[str, Any]) -> Array:
        """This site's kernel `(*stack, in, out)` from the flat parameters of a model.

        Raises:
          BaseMismatchError: the kernel has another size.
          ConversionError: layers share the stored kernel (a vertical model), so there is none for each layer.
        """
        stored = base[self.leaf_path]
        if tuple(stored.shape[-len(self.shape) :]) != self.shape and self.stack_axis == 0:
            raise BaseMismatchError(
                f"{self.leaf_path} is {tuple(stored.shape)}, the adapter was made for {(*self.stack, *self.shape)}"
            )
        if stored.ndim - len(self.shape) != len(self.stack) or math.prod(stored.shape) != self.layers * math.prod(
            self.shape
        ):
            raise ConversionError(
                f"{self.leaf_path} stores {stored.shape} for {self.layers} layers of {self.shape}: the model is "
                f"vertical; expand it to dense parameters first (vlora_jax.expand)"
            )
        return self.matrix(stored)


def einsum_layout(equation: str) -> Layout | None:
    """The layout of an einsum kernel, `"btd,ndh->btnh"`: inputs `d`, outputs `n h`.

    None where the layer is no matrix: the kernel has an axis that is both in the input and in the output (one kernel
    per group), or an axis of either is summed away.
    """
    terms, result = equation.replace(" ", "").split("->")
    inputs, kernel = terms.split(",")
    contracted = tuple(i for i, name in enumerate(kernel) if name in inputs and name not in result)
    emitted = tuple(i for i, name in enumerate(kernel) if name not in inputs and name in result)
    whole = len(contracted) + len(emitted) == len(kernel) and set(inputs) <= set(kernel) | set(result)
    return Layout("einsum", contracted, emitted) if whole else None


def layout_of(module: nnx.Module) -> tuple[str, Layout | None] | None:
    """The parameter name and layout of one of Flax NNX's linear layers, None for any other module.

    The layout is None for an einsum that is no matrix.
    """
    if isinstance(module, nnx.Linear):
        return "kernel", Layout("dense", (0,), (1,))
    if isinstance(module, nnx.LinearGeneral) and not module.batch_axis:
        inputs, total = len(module.in_features), len(module.in_features) + len(module.out_features)
        return "kernel", Layout("dense", tuple(range(inputs)), tuple(range(inputs, total)))
    if isinstance(module, nnx.Einsum):
        return "kernel", einsum_layout(module.einsum_str) if module.einsum_str else None
    if isinstance(module, nnx.Embed):
        return "embedding", Layout("embed", (0,), (1,))
    return None


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """`nnx.split`, with the layout of every linear kernel written beside it in the parameter pytree.

    Serves any NNX model, also third-party ones with unstacked `nnx.Linear`, `LinearGeneral`, `Einsum` and
    `Embed`, and layers stacked with `nnx.vmap`.

    >>> graphdef, base = split(nnx.Linear(4, 2, rngs=nnx.Rngs(0)))
    >>> find_sites(base)[0].shape
    (4, 2)
    """
    layouts = {}
    for path, module in nnx.iter_modules(model):
        found = layout_of(module)
        if found:
            layouts[(*path, found[0])] = found[1]
    graphdef, state = nnx.split(model)
    marked = [
        (path, leaf.replace(layout=layouts[path]) if path in layouts and "layout" not in leaf.get_metadata() else leaf)
        for path, leaf in nnx.to_flat_state(state)
    ]
    return graphdef, nnx.from_flat_state(marked)


def find_sites(base: Tree) -> list[Site]:
    """Every kernel of a parameter pytree that a method could change, in path order.

    Args:
      base: what `split` returned, or any pytree with leaves named `kernel` or `embedding`. Without the layouts
        that `split` writes, only two-dimensional kernels are unambiguous; the others are not sites.
    """
    sites = []
    for path, leaf in variables(base).items():
        parent, _, name = path.rpartition("/")
        known = leaf.get_metadata() if isinstance(leaf, nnx.Variable) else {}
        layout = known.get("layout")
        if "layout" not in known and name in LEAVES and len(leaf.shape) == 2:
            layout = Layout("embed" if name == "embedding" else "dense", (0,), (1,))
        if layout is None:
            continue
        dims = len(layout.inputs) + len(layout.outputs)
        stack = tuple(leaf.shape[:-dims])
        if layout.layers is not None:
            stack = (layout.layers,)
        sites.append(Site(parent, name, layout.kind, stack, tuple(leaf.shape[-dims:]), layout.inputs, layout.outputs))
    return sites


def _hits(pattern: str, sites: list[Site], what: str) -> list[Site]:
    linear = [site for site in sites if site.kind != "embed"]
    presets = {
        "attention": [site for site in linear if ATTENTION.search(site.path)],
        "mlp": [site for site in linear if MLP.search(site.path) and not ATTENTION.search(site.path)],
        "all-linear": [site for site in linear if not HEAD.search(site.path)],
    }
    presets["embeddings"] = [site for site in sites if site.kind == "embed"]
    if presets.get(pattern):
        return presets[pattern]
    others = [name for name, hits in presets.items() if hits]
    hits = set(matching(pattern, [site.path for site in sites], what, others))
    return [site for site in sites if site.path in hits]


def role(path: str) -> str:
    """What a module is in whichever layer: its path without the number of the first numbered module above it.

    Modules of one role are the same part of layers that are not stacked; stacked layers have one path anyway.

    >>> role("layers/3/attn/q"), role("block_3/experts/0/up"), role("layers/attn/q"), role("mlp/0")
    ('layers/*/attn/q', 'block_*/experts/0/up', 'layers/attn/q', 'mlp/0')
    """
    return NUMBERED.sub(r"\1*", path, count=1)


def layer_number(path: str) -> int:
    """The number that `role` leaves out; 0 without one.

    >>> layer_number("layers/3/attn/q"), layer_number("mlp/0")
    (3, 0)
    """
    found = NUMBERED.search(path)
    return int(found[2]) if found else 0


def as_patterns(patterns: Patterns | None) -> tuple[str, ...]:
    """One pattern or several as a tuple."""
    return () if patterns is None else (patterns,) if isinstance(patterns, str) else tuple(patterns)


def select(sites: Iterable[Site], targets: Patterns, exclude: Patterns | None = None) -> list[Site]:
    """The sites that at least one pattern of `targets` and none of `exclude` selects.

    Args:
      sites: from `find_sites`.
      targets: a preset (`"attention"`, `"mlp"`, `"all-linear"`, `"embeddings"`), a regular expression, or several of
        them. An expression must match one or more whole components of the path: `"q|v"` selects `layers/attn/q`,
        `"attn"` everything below `attn`, `"layers/block/.*"` all of the stack.
      exclude: the same, for what to leave out.

    Raises:
      TargetError: a pattern of either list matches nothing (the nearest paths are named), is no regular
        expression, or nothing is left.
    """
    sites = list(sites)
    chosen = {site for pattern in as_patterns(targets) for site in _hits(pattern, sites, "target")}
    dropped = {site for pattern in as_patterns(exclude) for site in _hits(pattern, sites, "exclude")}
    selected = [site for site in sites if site in chosen - dropped]
    if not selected:
        raise TargetError(
            f"targets {list(as_patterns(targets))} select nothing once {list(as_patterns(exclude))} is excluded"
        )
    return selected
