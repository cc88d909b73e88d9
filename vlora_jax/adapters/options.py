"""Options of methods: what they may be, and the values of those that differ from site to site."""

import math
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from vlora_jax.adapters.sites import Patterns, Site, select
from vlora_jax.errors import ConfigError, TargetError


def is_table(value: Any) -> bool:
    """Whether a value is a mapping from patterns, or the pairs of one."""
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    return isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs
    )


def check_type(what: str, value: Any, kind: Any) -> None:
    """Raises ConfigError unless a hyper-parameter has the type of its field and is finite."""
    optional = [each for each in get_args(kind) if each is not type(None)] if isinstance(kind, UnionType) else []
    if len(optional) == 1 and type(None) in get_args(kind):
        kind = None if value is None else optional[0]
    if kind is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError(f"{what} is {value!r}; it must be a whole number")
    if kind is float and (not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value)):
        raise ConfigError(f"{what} is {value!r}; it must be a finite number")
    if kind is bool and not isinstance(value, bool):
        raise ConfigError(f"{what} is {value!r}; it must be true or false")
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ConfigError(f"{what} is {value!r}; it must be one of {', '.join(map(str, get_args(kind)))}")
    if kind == Patterns or (kind == Patterns | None and value is not None):
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(f"{what} is {value!r}; it must be a pattern or a list of patterns")


def check_least(what: str, value: float, least: float) -> None:
    """Raises ConfigError if a hyper-parameter is below the least that makes sense."""
    if value < least:
        raise ConfigError(f"{what} is {value}; it must be at least {least}")


def check_rank(name: str, rank: int, site: Site, has_table: bool = False) -> None:
    """Raises ConfigError if a rank is above the smaller side of a site's kernel."""
    smaller = min(site.in_dim, site.out_dim)
    if rank > smaller:
        raise ConfigError(
            f"{name}: rank {rank} is above the smaller side, {smaller}, of {site.path} {site.shape}; "
            f"lower it{' there with rank_pattern' if has_table else ''}, or exclude the site"
        )


def check_dropout(name: str, dropout: float, field: str = "dropout") -> None:
    """Raises ConfigError unless a dropout is a share of what it drops from."""
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"{name}: {field} is {dropout}; it must be at least 0 and below 1")


def check_steps(name: str, steps: int) -> None:
    """Raises ConfigError if a rule that follows the run's length does not know it."""
    if not steps:
        raise ConfigError(f"{name}: steps is 0 and no run has filled it in; give the number of steps of the training")


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
