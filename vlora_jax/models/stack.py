"""A stack of equal layers run by `jax.lax.scan`: compile time and program size do not grow with depth."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from vlora_jax.adapters.adapter import FactorDict
from vlora_jax.adapters.bind import child
from vlora_jax.adapters.kept import keeps
from vlora_jax.adapters.method import site_key
from vlora_jax.adapters.options import check_patterns
from vlora_jax.adapters.sites import Layout, Site, find_sites, select, split
from vlora_jax.adapters.trees import Tree
from vlora_jax.distributed.activations import after_layers
from vlora_jax.distributed.within import batch_ways
from vlora_jax.errors import ConfigError
from vlora_jax.vertical.config import Vertical
from vlora_jax.vertical.expand import dense_kernels
from vlora_jax.vertical.plan import Choice, choose
from vlora_jax.vertical.run import BaseKernel, Increments, Plan, run

Remat = Literal["none", "full", "dots", "nested"]
WRITTEN_OUT = 4  # compounds up to this size are written out where activations are kept
WIDE = 64  # inner size from which a product costs more to repeat than to keep


def wide_products(primitive: Any, *arguments: Any, **parameters: Any) -> bool:
    """A rematerialisation policy: keep matrix products, but repeat the thin ones of adapters and attention's."""
    if primitive.name != "dot_general":
        return False
    (contracted, _), (batch, _) = parameters["dimension_numbers"]
    return not batch and math.prod(arguments[0].shape[axis] for axis in contracted) >= WIDE


POLICIES: dict[str, Callable | None] = {"none": keeps, "full": None, "dots": wide_products, "nested": None}


class Stack(nnx.Module):
    """`layers` blocks with stacked parameters; vertical if told so.

    Attributes:
      block: one block whose parameters carry a leading layer axis. Kernels that a vertical stack shares carry its
        compounds instead.
      sites: the kernels that a vertical stack shares, by their path in a block; `stack` is that of its increments.
      increments: a vertical stack's `{method: {target: {name: (compounds, increments, …)}}}`.
    """

    def __init__(
        self,
        make_block: Callable[[nnx.Rngs], nnx.Module],
        layers: int,
        *,
        vertical: Vertical | None = None,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        """
        Args:
          make_block: builds one block from its random keys; any NNX module that maps `(h, *inputs)` to `h`.
          layers: depth.
          vertical: share kernels across depth.
          remat: what the backward pass computes again: `"none"` elementwise steps only; `"full"` each layer, keeping
            its input; `"dots"` each layer but for its matrix products; `"nested"` each layer and each compound,
            keeping one input a compound (the least memory, one more forward pass).

        Raises:
          ConfigError: the compound size does not divide the depth, or the block has state (dropout, batch statistics).
          TargetError: a vertical target, or a pattern of its increments, selects no kernel of the block.
        """
        if layers < 1:
            raise ConfigError(f"a stack needs at least one layer, not {layers}")
        self.layers, self.vertical, self.remat = layers, vertical, remat
        keys = jax.random.split(rngs.params(), layers)
        graphdef, shapes = split(nnx.eval_shape(lambda: make_block(nnx.Rngs(0))))
        state = [path for path, leaf in nnx.to_flat_state(shapes) if not isinstance(leaf, nnx.Param)]
        if state:
            raise ConfigError(f"a stack's block can have parameters only; {'/'.join(map(str, state[0]))} is state")
        draw = jax.vmap(lambda key: dict(nnx.to_flat_state(split(make_block(nnx.Rngs(key)))[1])))
        self.sites: tuple[Site, ...] = ()
        if vertical is None:
            leaves, increments = jax.jit(draw)(keys), {}
        else:
            shapes = nnx.from_flat_state(list(jax.eval_shape(draw, keys).items()))
            self.sites = shared_sites(vertical, layers, shapes)
            parameters = functools.partial(draw_vertical, vertical, self.sites, draw)
            leaves, increments = jax.jit(parameters)(keys, rngs.params())
        self.block = nnx.merge(graphdef, nnx.from_flat_state(list(leaves.items())))
        self.increments = nnx.data(jax.tree.map(nnx.Param, increments))

    def choices(self, tokens: int, train: bool) -> list[Choice]:
        """How each target of a vertical stack is applied to this many tokens, and what decided it."""
        if self.vertical is None or not self.vertical.methods:
            return []
        return [choose(self.vertical, site, tokens, train) for site in self.sites]

    def __call__(self, h: Any, *inputs: Any, each: Any = None, train: bool = False) -> Any:
        """All layers in turn.

        Args:
          h: `(…, features)`, what the first layer receives.
          inputs: passed on to every layer as they are (positions, segments).
          each: a pytree of `(layers, …)`; every layer receives its own part after `inputs`. None: nothing.
          train: a vertical stack takes the form that is cheaper with a backward pass.
        """
        call = lambda block, h, own: block(h, *inputs) if own is None else block(h, *inputs, own)
        layer_remat, compound_remat = self._remats()
        if self.vertical is not None:
            rows = math.prod(jax.tree.leaves(h)[0].shape[:-1])
            factored = frozenset(c.path for c in self.choices(per_device(rows), train) if c.factored)
            # A loop in a loop copies what is kept for the backward pass twice; small compounds do without the inner.
            written_out = self.remat in ("none", "dots") and self.vertical.size <= WRITTEN_OUT
            plan = Plan(self.vertical, self.sites, factored, layer_remat, compound_remat, written_out)
            return after_layers(run(plan, self.block, self._tensors(), h, call, each))
        graphdef, layers = nnx.split(self.block)
        body = layer_remat(lambda h, layer, own: call(nnx.merge(graphdef, layer), h, own))
        return after_layers(jax.lax.scan(lambda h, inputs: (body(h, *inputs), None), h, (layers, each))[0])

    def thread(self, h: Any, each: Any, step: Callable[[Any, Any, Any], tuple]) -> tuple:
        """All layers of a dense stack in turn, each taking its part of `each` and giving something back.

        Args:
          h: what the first layer receives.
          each: a pytree of `(layers, …)`.
          step: `(block, h, part) → (h, given back)`.

        Returns:
          The last `h`, and what the layers gave back with a layer axis first.
        """
        graphdef, layers = nnx.split(self._dense())
        return jax.lax.scan(lambda h, inputs: step(nnx.merge(graphdef, inputs[0]), h, inputs[1]), h, (layers, each))

    def apart(self) -> list[nnx.Module]:
        """The layers of a dense stack as blocks of their own, for programs that don't loop over them."""
        graphdef, layers = nnx.split(self._dense())
        own = lambda index: jax.tree.map(lambda leaf: leaf[index], layers)
        return [nnx.merge(graphdef, own(index)) for index in range(self.layers)]

    def _dense(self) -> nnx.Module:
        if self.vertical is not None:
            raise ConfigError("this needs one kernel a layer; expand the vertical model first (vlora_jax.expand)")
        return self.block

    def _tensors(self) -> Increments:
        return jax.tree.map(lambda v: v.get_value(), self.increments, is_leaf=lambda v: isinstance(v, nnx.Variable))

    def _remats(self) -> tuple[Callable, Callable]:
        # Inside a loop XLA cannot merge the recomputation with the first pass, so it needs no barrier.
        turns = self.layers if self.vertical is None else self.vertical.compounds(self.layers)
        wrap = lambda f: jax.checkpoint(f, prevent_cse=turns == 1, policy=POLICIES[self.remat])
        return wrap, (wrap if self.remat == "nested" else lambda f: f)

    def densify(self) -> None:
        """Turn this stack into its dense twin, in place: one kernel a layer, no increments."""
        vertical, increments = self.vertical, self._tensors()
        if vertical is None:
            return
        for site in self.sites:
            module = child(self.block, site.path)
            stored = getattr(module, site.leaf)
            kernels = dense_kernels(vertical, site, site.matrix(stored.get_value()), increments)
            setattr(module, site.leaf, nnx.Param(site.kernel(kernels).astype(stored.dtype), layout=_layout(site)))
        self.vertical, self.sites = None, ()
        self.increments = nnx.data({})

    def share(self, vertical: Vertical, fit: Callable[[Site, Array], tuple[Array, dict[str, FactorDict]]]) -> None:
        """Turn this dense stack into a vertical one, in place.

        Args:
          fit: takes a shared kernel's site and every layer's values `(layers, in, out)`; gives base kernels
            `(compounds, in, out)` and the increments' tensors `(compounds, increments, …)` by method.

        Raises:
          ConfigError, TargetError: as for a new vertical stack.
        """
        sites = shared_sites(vertical, self.layers, split(self.block)[1])
        increments: Increments = {method.name: {} for method in vertical.methods}
        for site in sites:
            module = child(self.block, site.path)
            stored = getattr(module, site.leaf)
            bases, tensors = fit(site, site.matrix(stored.get_value()))
            values = site.kernel(bases).astype(stored.dtype)
            setattr(module, site.leaf, BaseKernel(values, layout=_layout(site, self.layers)))
            for name, of_site in tensors.items():
                increments[name][site.path] = of_site
        self.vertical, self.sites = vertical, sites
        self.increments = nnx.data(jax.tree.map(nnx.Param, increments))


def _layout(site: Site, layers: int | None = None) -> Layout:
    return Layout(site.kind, site.inputs, site.outputs, layers)


def shared_sites(vertical: Vertical, layers: int, block: Tree) -> tuple[Site, ...]:
    """The kernels of a stacked block that a vertical stack shares; their `stack` is that of the increments.

    Raises:
      ConfigError: the compound size does not divide the depth.
      TargetError: a target, or a pattern of the increments, selects no kernel of the block.
    """
    stack = (vertical.compounds(layers), vertical.increments)
    sites = [replace(site, stack=stack) for site in select(find_sites(block), vertical.targets)]
    for method in vertical.methods:
        for table in (each.name for each in fields(method) if each.name.endswith("_pattern")):
            check_patterns(f"{method.name}: {table}", getattr(method, table), sites)
    return tuple(sites)


def draw_vertical(vertical: Vertical, sites: Sequence[Site], draw: Callable, keys: Array, key: Array) -> tuple:
    """Parameters of a vertical stack, drawn layer by layer like those of its dense twin.

    Args:
      draw: keys `(n,)` to the parameters of n blocks, `{path: Variable}`.
      keys: one a layer. A compound's base kernel is the dense twin's of its first layer.
      key: for the increments.

    Returns:
      The block's parameters by path, and the increments.
    """
    layers = len(keys)
    first_layers = vertical.grid(jnp.arange(layers), layers)[:, 0]
    every, bases = draw(keys), draw(keys[first_layers])  # jit drops what is used of neither
    leaves, increments = dict(every), {method.name: {} for method in vertical.methods}
    for site in sites:
        path = tuple(site.leaf_path.split("/"))
        leaves[path] = BaseKernel(bases[path].get_value(), layout=_layout(site, layers))
        for method in vertical.methods:
            kernel = None
            if method.reads_base:
                base = site.matrix(bases[path].get_value())
                kernel = jnp.broadcast_to(base[:, None], (*site.stack, *base.shape[1:]))
            increments[method.name][site.path] = method.init_stack(site_key(key, site.path), site, kernel).trainable
    return leaves, increments


def per_device(tokens: int) -> int:
    """Tokens of one device: batches are split over the mesh axes `data` and `fsdp`."""
    return max(1, tokens // batch_ways())
