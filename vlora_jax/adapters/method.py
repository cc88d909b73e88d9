"""The contract of a parameter-efficient method: a frozen record of hyper-parameters with pure functions.

A method holds no arrays. Everything that is not its own maths (selecting sites, binding, merging, counting,
checkpoints, inspection) is written once over this contract.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import jax
from jaxtyping import Array, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.sites import Patterns, Site, select
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.adapters.view import thin
from vlora_jax.errors import ConfigError, ConversionError, TargetError

MethodType = TypeVar("MethodType", bound="Method")


@dataclass(frozen=True)
class Factors:
    """What a method keeps for one layer of one site: tensors that train and tensors that don't."""

    trainable: FactorDict
    frozen: FactorDict = field(default_factory=dict)


jax.tree_util.register_dataclass(Factors, ["trainable", "frozen"], [])


@dataclass(frozen=True, kw_only=True)
class Method:
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
    verified: ClassVar[str] = ""  # by which independent evidence

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

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        """A new adapter on `sites`; sees all of them at once, for shared tensors and SVD starts."""
        raise NotImplementedError

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        """The change of `y` at one site, factored wherever the maths allows: no ΔW is built.

        Args:
          x: input `(tokens, in)`; for an embedding an object whose `x @ A` looks rows of `A` up.
          y: `x @ kernel` without bias, `(tokens, out)`.
          kernel: frozen kernel `(in, out)`.
          factors: this site's tensors of one layer, and the shared ones, by name.

        Returns:
          `(tokens, out)`, to be added to `y`. Adapters that are bound together are each given the same `y`,
          so their changes add.
        """
        raise NotImplementedError

    def delta(self, kernel: Array, factors: FactorDict) -> Array:
        """ΔW `(in, out)` of one layer in float32.

        Raises:
          ConversionError: the change depends on the input, so no ΔW exists.
        """
        raise ConversionError(f"{self.name} depends on the input and cannot be merged into a kernel")

    def low_rank(self, factors: FactorDict) -> tuple[Array, Array] | None:
        """`(left (in, r), right (r, out))` with ΔW = left @ right of one layer, if ΔW is such a product; else None.

        Inspection then finds norm and spectrum of a change without building it.
        """
        return None

    def sum_factors(self, factors: FactorDict, weights: Array) -> FactorDict:
        """Factors of one layer whose change is the weighted sum of several; for methods with `adds_up`.

        Args:
          factors: `(n, …)` each.
          weights: `(n,)`.
        """
        raise ConversionError(f"changes of {self.name} do not add up to one change of the same form")

    def for_site(self: MethodType, site: Site) -> MethodType:
        """This method with patterns over sites resolved for one of them."""
        return self

    def groups(self, adapter: Adapter) -> Tree:
        """A learning-rate group's name for each leaf of `adapter.trainable`."""
        return jax.tree.map(lambda _: "adapter", adapter.trainable)

    def rates(self) -> dict[str, float]:
        """Learning rate of each group relative to the run's; 1 where absent."""
        return {}

    def penalty(self, adapter: Adapter) -> Array | float:
        """An addition to the loss; 0 for most methods."""
        return 0.0

    def advance(self, step: Array, adapter: Adapter, grads: Tree, opt_state: Tree) -> tuple[Adapter, Tree]:
        """The method's own rule after an optimiser step; changes nothing for most methods."""
        return adapter, opt_state

    def config(self) -> dict[str, Any]:
        """This method as plain JSON values; `vlora_jax.adapters.registry.from_config` reads it back."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        tables = {name: dict(value) for name, value in values.items() if name.endswith("_pattern")}
        return {"method": self.name, **values, **tables}


@dataclass(frozen=True, kw_only=True)
class SiteMethod(Method):
    """A method whose tensors belong to one site each: it says how one layer starts, `vmap` does the stack."""

    reads_base: ClassVar[bool] = False  # init_site needs the kernel's values

    def init_site(self, key: PRNGKeyArray, site: Site, kernel: Array | None) -> Factors:
        """Factors of one layer. `kernel` is `(in, out)` if the method reads the base, else None."""
        raise NotImplementedError

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        trainable, frozen = {}, {}
        leaves = flatten(base)
        for site in sites:
            kernel = site.read(leaves) if self.reads_base else None
            factors = self.init_stack(site_key(key, site.path), site, kernel)
            trainable[site.path] = factors.trainable
            frozen[site.path] = factors.frozen
        return Adapter.of(self, sites, trainable=trainable, frozen=frozen)

    def init_stack(self, key: PRNGKeyArray, site: Site, kernel: Array | None = None) -> Factors:
        """Factors of all layers of a site, each drawn on its own; `kernel` is `(*stack, in, out)` or None."""
        method = self.for_site(site)
        keys = jax.random.split(key, site.stack)
        return over_stack(lambda key, kernel: method.init_site(key, site, kernel), len(site.stack))(keys, kernel)


@dataclass(frozen=True, kw_only=True)
class LowRank(SiteMethod):
    """A method whose change starts with a thin product `x @ down(factors)`.

    Sites that read the same input then share one product, with their `down` matrices side by side.
    """

    def down(self, factors: FactorDict) -> Array:
        """The `(in, r)` matrix that `x` meets first."""
        raise NotImplementedError

    def up(self, xa: Array, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        """The change of `y`, given `xa = x @ down(factors)`, `(tokens, r)`."""
        raise NotImplementedError

    def forward(self, x: Any, y: Array, kernel: Array, factors: FactorDict) -> Array:
        return self.up(thin(x, self.down(factors)), x, y, kernel, factors)


def is_table(value: Any) -> bool:
    """Whether a value is a mapping, or the pairs of one."""
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in value)
    )


def check_type(what: str, value: Any, kind: Any) -> None:
    """Raises ConfigError unless a hyper-parameter has the type of its field and is finite."""
    if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError(f"{what} is {value!r}; it must be a whole number")
    if kind is float and (not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value)):
        raise ConfigError(f"{what} is {value!r}; it must be a finite number")
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{what} is {value!r}; it must be true or false")
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ConfigError(f"{what} is {value!r}; it must be one of {', '.join(map(str, get_args(kind)))}")
    if kind in (Patterns, Patterns | None):
        texts = (value,) if isinstance(value, str) or value is None else value
        if not isinstance(texts, Sequence) or not all(isinstance(text, str | None) for text in texts):
            raise ConfigError(f"{what} is {value!r}; it must be a pattern or a list of patterns")


def site_key(key: PRNGKeyArray, path: str) -> PRNGKeyArray:
    """A key of its own for each path, so that a further target leaves the other draws as they were."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def over_stack(function: Callable, dims: int) -> Callable:
    """`function` of one layer's arrays, mapped over `dims` leading layer axes of every argument."""
    for _ in range(dims):
        function = jax.vmap(function)
    return function


def by_pattern(name: str, patterns: tuple[tuple[str, Any], ...], site: Site, default: Any) -> Any:
    """The value for `site` in a table from pattern to value.

    Raises:
      ConfigError: two patterns match the site.
    """
    hits = {pattern: value for pattern, value in patterns if pattern_selects(pattern, site)}
    if len(hits) > 1:
        raise ConfigError(f"{name}: {list(hits)} both match {site.path}; make them exclusive")
    return next(iter(hits.values()), default)


def pattern_selects(pattern: str, site: Site) -> bool:
    try:
        return bool(select([site], pattern))
    except TargetError:
        return False


def check_patterns(name: str, patterns: tuple[tuple[str, Any], ...], sites: list[Site]) -> None:
    """Raises TargetError if a pattern of a table matches none of the sites."""
    for pattern, _ in patterns:
        try:
            select(sites, pattern)
        except TargetError as error:
            raise TargetError(f"{name}: {error}") from None
