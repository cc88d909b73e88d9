"""The contract of a parameter-efficient method: a frozen record of hyper-parameters with pure functions.

A method holds no arrays. Everything that is not its own maths (selecting sites, binding, merging, counting,
checkpoints, inspection) is written once over this contract.
"""

import dataclasses
import functools
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import jax
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.options import check_dropout, check_type, is_table
from vlora_jax.adapters.sites import Patterns, Site
from vlora_jax.adapters.trees import Tree, flatten, shapes_only
from vlora_jax.adapters.view import thin
from vlora_jax.errors import ConfigError, ConversionError

MethodType = TypeVar("MethodType", bound="Method")


@dataclass(frozen=True)
class Factors:
    """What a method keeps for one layer of one site: tensors that train and tensors that don't."""

    trainable: FactorDict
    frozen: FactorDict = field(default_factory=dict)


jax.tree_util.register_dataclass(Factors, ["trainable", "frozen"], [])


@dataclass(frozen=True)
class Slope:
    """What a train step learns from examples of its batch.

    Attributes:
      grads: the gradient of their mean loss, like `adapter.trainable`.
      sums: over these examples: `"loss"`, `"weight"` and others.
      probe: what the method's probe measured on them, `{path: {name: array}}`.
    """

    grads: Tree
    sums: dict[str, Any]
    probe: dict[str, Any]


jax.tree_util.register_dataclass(Slope, ["grads", "sums", "probe"], [])

Gradient = Callable[..., Slope]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyper-parameters and maths of one method.

    Attributes:
      targets: which sites it changes; see `vlora_jax.select`.
      exclude: which of those it leaves alone.
      full: parameters of the base that are trained whole beside it (PEFT's `modules_to_save`), as patterns
        over leaf paths: `"head"`, `".*norm"`.
    """

    name: ClassVar[str]
    paper: ClassVar[str]  # arXiv id
    formula: ClassVar[str]
    trains: ClassVar[str]  # numbers trained at a site, as a formula
    mergeable: ClassVar[bool] = True  # ΔW exists: a function of the kernel and the factors alone
    vertical: ClassVar[bool] = True  # can be the increment of a vertical stack
    adds_up: ClassVar[bool] = False  # a sum of changes is a change of the same form: see sum_factors
    on_sites: ClassVar[bool] = True  # changes kernels; else it trains what `full` names and nothing else
    verified: ClassVar[str] = ""  # by which independent evidence
    peft: ClassVar[str] = ""  # the peft_type of its files, where PEFT has it
    size: ClassVar[str] = (
        "rank"  # the whole number among its options that says how many numbers it trains, if it has it
    )
    cost: ClassVar[str] = ""  # why a step takes clearly longer than LoRA's, where it does
    decays: ClassVar[frozenset[str]] = frozenset()  # tensors that weight decay pulls towards zero, where it means none
    default_rate: ClassVar[float] = 1e-3  # AdamW's learning rate at which its defaults train
    layerwise: ClassVar[bool] = False  # `delta` takes several times the memory of ΔW: one layer at a time
    reads_output: ClassVar[bool] = False  # the gradient needs the layer's own output, which is kept in place of the sum
    # Options that say where it goes, how it starts and how it trains, but not what its tensors do.
    aside: ClassVar[frozenset[str]] = frozenset({"targets", "exclude", "full", "dropout", "start"})
    memory: ClassVar[frozenset[str]] = frozenset()  # frozen tensors of sites that only `advance` reads

    targets: Patterns = "all-linear"
    exclude: Patterns | None = None
    full: Patterns | None = None

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):  # static metadata of a pytree must be hashable
            value = getattr(self, each.name)
            if isinstance(value, list):
                object.__setattr__(self, each.name, tuple(value))
            if isinstance(value, Mapping):
                object.__setattr__(self, each.name, tuple(value.items()))
            if each.name.endswith("_pattern") and not is_table(value):
                raise ConfigError(f"{self.name}: {each.name} is {value!r}; it must map patterns to values")
            check_type(f"{self.name}: {each.name}", value, each.type)
            if each.name == "dropout":
                check_dropout(self.name, getattr(self, each.name))

    @property
    def opening(self) -> "Method":
        """The method a run starts with where this one's start is made of a gradient; itself for most methods."""
        return self

    def opened(self, adapter: Adapter, gradients: Tree) -> Adapter:
        """This method's start.

        Args:
          adapter: of `opening`, as `init` made it.
          gradients: of the loss on the run's first batch, without dropout, like `adapter.trainable`; of any scale.
        """
        return adapter

    @abstractmethod
    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        """A new adapter on `sites`; sees all of them at once, for shared tensors and SVD starts."""

    @abstractmethod
    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        """The change of `y` at one site, factored wherever the maths allows: no ΔW is built.

        Args:
          x: input `(tokens, in)`; for an embedding an object whose `x @ A` looks rows of `A` up.
          y: `x @ kernel` without bias, `(tokens, out)`; under dropout that of all inputs, unless it `reads_output`.
          kernel: frozen kernel `(in, out)`.
          factors: this site's tensors of one layer, and the shared ones, by name.

        Returns:
          `(tokens, out)`, to be added to `y`. Adapters that are bound together are each given the same `y`,
          so their changes add.
        """

    def delta(self, kernel: Array, factors: FactorDict) -> Array:
        """ΔW `(in, out)` of one layer in float32.

        Raises:
          ConversionError: the change depends on the input, so no ΔW exists.
        """
        raise ConversionError(f"{self.name} depends on the input and cannot be merged into a kernel")

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array] | None:
        """`(left (in, r), right (r, out))` with ΔW = left @ right of one layer, if ΔW is such a product; else None.

        Inspection then finds norm and spectrum of a change without building it.

        Args:
          shape: `(in, out)` of the kernel, which the slices of shared tensors depend on.
          factors: of one layer, and the shared ones.
        """
        return None

    def shift(self, factors: FactorDict) -> Array | None:
        """Change of the layer's bias `(out,)` of one layer, which `forward` contains; None for most methods."""
        return None

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        """Factors of one layer whose change is the weighted sum of several; for methods with `adds_up`.

        Args:
          factors: `(n, …)` each.
          weights: `(n,)`.
        """
        raise ConversionError(f"changes of {self.name} do not add up to one change of the same form")

    def whole(self, leaves: Mapping[str, Any]) -> list[str]:
        """Which of a base's parameters, by path, it trains whole beside those that `full` names; none for most."""
        return []

    def for_site(self: MethodType, site: Site) -> MethodType:
        """This method with patterns over sites resolved for one of them."""
        return self

    def for_run(self: MethodType, steps: int) -> MethodType:
        """This method for a run of so many steps: where it has an option `steps` and that is 0, it is filled in."""
        return dataclasses.replace(self, steps=steps) if getattr(self, "steps", None) == 0 else self

    def groups(self, adapter: Adapter) -> Tree:
        """A learning-rate group's name for each leaf of `adapter.trainable`."""
        return jax.tree.map(lambda _: "adapter", adapter.trainable)

    @property
    def usual_rate(self) -> float:
        """The run's learning rate where it gives none: `default_rate`, unless options ask for another."""
        return self.default_rate

    def rates(self) -> dict[str, float]:
        """Learning rate of each group relative to the run's; 1 where absent."""
        return {}

    def penalty(self, adapter: Adapter) -> Array | float:
        """An addition to the loss; 0 for most methods."""
        return 0.0

    def allow(self, adapter: Adapter, updates: Tree) -> Tree:
        """What is added to the tensors of the optimiser's final updates, weight decay among them; all for most methods.

        Args:
          adapter: before the step.
        """
        return updates

    def probe(self, step: Array, adapter: Adapter) -> dict[str, FactorDict]:
        """Leaves that join a site's factors in training steps only, `{path: {name: array}}`; none for most methods.

        `forward` hands them to `probe.measured`. Their "gradients", summed over the micro-batches and not divided by
        the weight, are measurements for `advance`; neither the optimiser nor the clipped norm sees them. Like a site's
        factors they carry its layer axes first.

        The first micro-batch of a step gets these values, the others zeros of their shapes, so that a leaf which is not
        zero tells the first one.
        """
        return {}

    def gradients(self, gradient: Gradient, adapter: Adapter, ids: Array) -> Slope:
        """What a step hands to the optimiser; for most methods the plain gradient of the mean loss.

        Args:
          gradient: `(trainable, chosen=None)` to the `Slope` of the step's examples at that point; differentiable.
            `chosen` weights the examples, in the shape of `ids`, and needs a loss that heeds the batch's `weight`.
          ids: number of each example in its data set, `(micro-batches, examples)`.
        """
        return gradient(adapter.trainable)

    def advance(self, step: Array, adapter: Adapter, grads: Tree, opt_state: Tree) -> tuple[Adapter, Tree]:
        """The method's own rule after an optimiser step; changes nothing for most methods.

        Args:
          step: steps done before this one.
          adapter: after the step.
          grads: of this step, the penalty's with them, not clipped. A method with a probe also finds
            `grads["probe"]`: `{"sites": {path: {name: measured}}, "weight": by which a mean divides}`.
          opt_state: after the step.
        """
        return adapter, opt_state

    def joined(self: MethodType) -> MethodType:
        """This method without the options in which adapters that train in one program may differ; itself for most.

        Methods whose `joined` is the same apply adapters that went through `join` in the same way.
        """
        return self

    def join(self, adapter: Adapter) -> Adapter:
        """An adapter of this method as one of `joined`, with the same change and the same gradients.

        What options decided is now in frozen tensors. Such adapters may differ in their sites and in the sizes of their
        tensors: filled up with zeros to a common shape they still change and train as before.
        """
        return adapter

    def exported(self, adapter: Adapter) -> Adapter:
        """What PEFT's files are written of: an adapter of the same change, as they hold it; itself for most methods."""
        return adapter

    def config(self) -> dict[str, Any]:
        """This method as plain JSON values; `vlora_jax.adapters.registry.from_config` reads it back."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        tables = {name: dict(value) for name, value in values.items() if name.endswith("_pattern")}
        return {"method": self.name, **values, **tables}


@dataclass(frozen=True, kw_only=True)
class SiteMethod(Method):
    """A method whose tensors belong to one site each: it says how one layer starts, `vmap` does the stack."""

    reads_base: ClassVar[bool] = False  # init_site needs the kernel's values

    @abstractmethod
    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        """Factors of one layer. `kernel` is `(in, out)` if the method reads the base, else None."""

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        trainable, frozen = {}, {}
        leaves = flatten(base)
        for site in sites:
            if self.reads_base and shapes_only(leaves[site.leaf_path]):
                raise ConfigError(f"{self.name}: it starts from the values of {site.path}; the base has shapes only")
            kernel = site.read(leaves) if self.reads_base else None
            factors = self.init_stack(site_key(key, site.path), site, kernel)
            trainable[site.path] = factors.trainable
            frozen[site.path] = factors.frozen
        return Adapter.of(self, sites, trainable=trainable, frozen=frozen)

    def init_stack(self, key: PRNGKeyArray, site: Site, kernel: Array | None = None) -> Factors:
        """Factors of all layers of a site, each drawn on its own; `kernel` is `(*stack, in, out)` or None."""
        method, keys = self.for_site(site), jax.random.split(key, site.stack)
        if kernel is not None:
            return _init_from_kernels(method, site, keys, kernel)
        return over_stack(lambda key: method.init_site(key, site, None), len(site.stack))(keys)

    def flops(self, site: Site) -> tuple[float, float]:
        """FLOPs of `forward` for one token and of `delta`, for one layer of a site; an estimate by its numbers.

        A vertical stack chooses by it whether to apply changes as they are or to build them.
        """
        kernel = jax.ShapeDtypeStruct((site.in_dim, site.out_dim), "float32") if self.reads_base else None
        draw = lambda key, kernel: self.init_site(key, site, kernel).trainable
        numbers = sum(math.prod(leaf.shape) for leaf in jax.eval_shape(draw, jax.random.key(0), kernel).values())
        return 2.0 * numbers, 2.0 * getattr(self, "rank", 1) * site.in_dim * site.out_dim


@functools.partial(jax.jit, static_argnums=(0, 1))  # a loop outside of jit would be compiled anew by every call
def _init_from_kernels(method: SiteMethod, site: Site, keys: Array, kernels: Array) -> Factors:
    start = lambda key, kernel: method.init_site(key, site, kernel)
    return one_by_one(start, len(site.stack))(keys, kernels)


@dataclass(frozen=True, kw_only=True)
class LowRank(SiteMethod):
    """A method whose change starts with a thin product `x @ down(factors)`.

    Sites that read the same input then share one product, with their `down` matrices side by side.
    """

    @abstractmethod
    def down(self, factors: FactorDict) -> Array:
        """The `(in, r)` matrix that `x` meets first."""

    @abstractmethod
    def up(self, xa: Array, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        """The change of `y`, given `xa = x @ down(factors)`, `(tokens, r)`."""

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        return self.up(thin(x, self.down(factors)), x, y, kernel, factors)


@dataclass(frozen=True, kw_only=True)
class Product(LowRank):
    """A method whose ΔW is the product of two thin matrices that the factors of a layer give."""

    @abstractmethod
    def pair(self, factors: FactorDict) -> tuple[Array, Array]:
        """`(in, r)` and `(r, out)` whose product is ΔW, every scale in the second: there it costs next to nothing."""

    def down(self, factors: FactorDict) -> Array:
        return self.pair(factors)[0]

    def up(self, xa: Array, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        return xa @ self.pair(factors)[1].astype(xa.dtype)

    def delta(self, kernel: Array, factors: FactorDict) -> Array:
        left, right = self.pair(factors)
        return left @ right

    def low_rank(self, shape: tuple[int, ...], factors: FactorDict) -> tuple[Array, Array] | None:
        return self.pair(factors)


def site_key(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key of its own for each path, so that a further target leaves the other draws as they were."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def over_stack(function: Callable, dims: int) -> Callable:
    """`function` of one layer's arrays, mapped over `dims` leading layer axes of every argument."""
    for _ in range(dims):
        function = jax.vmap(function)
    return function


def one_by_one(function: Callable, dims: int) -> Callable:
    """`over_stack` with one layer in memory at a time: SVDs need several times the memory of what they factorise."""
    if not dims:
        return function

    def mapped(*arguments: Any) -> Any:
        stack = jax.tree.leaves(arguments)[0].shape[:dims]
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[dims:]), arguments)
        out = jax.lax.map(lambda each: function(*each), flat)
        return jax.tree.map(lambda leaf: leaf.reshape(*stack, *leaf.shape[1:]), out)

    return mapped
