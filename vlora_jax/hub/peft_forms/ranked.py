"""Methods with one rank a site: `r` and `rank_pattern` of a config, and other options with a table of that kind."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from vlora_jax.adapters.ranked import Ranked
from vlora_jax.hub.peft_config import PeftConfig, check_patterns, pattern_value
from vlora_jax.hub.peft_forms.form import Places, differing, plain, uniform


class RankedConfig(PeftConfig):
    """PEFT's fields of such a method."""

    r: int = Field(8, gt=0)
    rank_pattern: dict[str, int] | None = None

    def fault(self) -> str | None:
        for pattern, rank in (self.rank_pattern or {}).items():
            if rank <= 0:
                return f"rank_pattern[{pattern!r}] is {rank}; it must be at least 1"
        return super().fault()


def options_of(config: Any, places: Places, names: Sequence[str]) -> dict[str, Any]:
    """Our options `rank` and `names` with their tables, from PEFT's fields of the same names, `r` for the rank."""
    found = {}
    for name in ("rank", *names):
        default, patterns = getattr(config, "r" if name == "rank" else name), getattr(config, f"{name}_pattern")
        check_patterns(f"{name}_pattern", patterns, places)
        value = lambda place: pattern_value(patterns, place.name, default, f"{name}_pattern")  # noqa: B023
        found |= {name: default, f"{name}_pattern": differing(uniform(places, value, f"the {name}"), default)}
    return found


def fields_of(method: Ranked, places: Places, names: Sequence[str]) -> dict[str, Any]:
    """The inverse of `options_of`; tables have the names of modules."""
    found = {}
    for name in ("rank", *names):
        value = lambda place: plain(getattr(method.for_site(place.site), name))  # noqa: B023
        default = plain(getattr(method, name))
        table = differing({module: value(place) for module, place in sorted(places.items())}, default)
        found |= {"r" if name == "rank" else name: default, f"{name}_pattern": table}
    return found
