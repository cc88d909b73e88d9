"""What methods with one rank a site have in common: tables of options by site, checks, starts."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jaxtyping import Array, Float, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.method import Factors, SiteMethod
from vlora_jax.adapters.options import by_pattern, check_least, check_patterns, check_rank
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError

RankedType = TypeVar("RankedType", bound="Ranked")


@dataclass(frozen=True, kw_only=True)
class Ranked(SiteMethod):
    """A method with a rank; its fields `<option>_pattern` give `option` other values at the sites of a pattern.

    Attributes:
      rank: inner size of its products.
      rank_pattern: other ranks for the sites that a pattern matches, `{"mlp": 4}`.
    """

    rank: int = 8
    rank_pattern: Any = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(f"{self.name}: rank", self.rank, 1)
        for option, table in self.tables.items():
            for pattern, value in getattr(self, table):
                try:
                    self.resolved({option: value})
                except ConfigError as error:
                    what = str(error).removeprefix(f"{self.name}: ")
                    raise ConfigError(f"{self.name}: {table}[{pattern!r}]: {what}") from None

    @property
    def tables(self) -> dict[str, str]:
        """Options that can differ between sites, with the fields that say so."""
        names = [each.name for each in dataclasses.fields(self)]
        return {name.removesuffix("_pattern"): name for name in names if name.endswith("_pattern")}

    def resolved(self: RankedType, options: dict[str, Any]) -> RankedType:
        """This method with other options and without tables."""
        return dataclasses.replace(self, **dict.fromkeys(self.tables.values(), ()), **options)

    def for_site(self: RankedType, site: Site) -> RankedType:
        value = lambda option, table: by_pattern(
            f"{self.name}: {table}", getattr(self, table), site, getattr(self, option)
        )
        return self.resolved({option: value(option, table) for option, table in self.tables.items()})

    def init(self, key: PRNGKeyArray, sites: list[Site], base: Tree) -> Adapter:
        for table in self.tables.values():
            check_patterns(f"{self.name}: {table}", getattr(self, table), sites)
        return super().init(key, sites, base)

    def init_stack(self, key: PRNGKeyArray, site: Site, kernel: Array | None = None) -> Factors:
        self.for_site(site).check_site(site)
        return super().init_stack(key, site, kernel)

    def check_site(self, site: Site) -> None:
        """Raises ConfigError if a site cannot be changed."""
        check_rank(self.name, self.rank, site, has_table=True)


def uniform(key: PRNGKeyArray, shape: tuple[int, ...], fan: int) -> Float[Array, "rows columns"]:
    """Uniform in ±1/√fan: what torch calls `kaiming_uniform_(a=√5)`, with which PEFT's layers start."""
    bound = 1 / math.sqrt(fan)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
