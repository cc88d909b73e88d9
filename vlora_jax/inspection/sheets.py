"""Records as sheets: which of their fields are shown, under which heading and in which form. One list for the terminal,
CSV and HTML.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vlora_jax.adapters.trees import matching
from vlora_jax.errors import ConfigError, nearest
from vlora_jax.inspection.tables import Spread


@dataclass(frozen=True)
class Column:
    """A field of a record, as people read it.

    Attributes:
      key: the field's name.
      heading: over the column.
      form: of a value; None is shown as nothing.
      numeric: right-aligned, and sorted with the largest first.
    """

    key: str
    heading: str
    form: Callable[[Any], str] = str
    numeric: bool = True

    def text(self, record: Any) -> str:
        """The field of a record, for people."""
        value = getattr(record, self.key)
        return "" if value is None else self.form(value)

    def number(self, record: Any) -> float | None:
        """The field of a record, to sort by; None if it is not known."""
        value = getattr(record, self.key)
        value = value.mean if isinstance(value, Spread) else value
        return None if value is None else float(value)


@dataclass(frozen=True)
class Sheet:
    """Records of one kind.

    Attributes:
      key: its name in JSON.
      legend: what the columns mean, a sentence.
      total: a column whose sum is shown below; None without one.
    """

    key: str
    title: str
    legend: str
    columns: tuple[Column, ...]
    rows: list[Any]
    total: str | None = None

    def only(self, keep: Callable[[Any], bool]) -> "Sheet":
        """The rows that `keep` keeps."""
        return dataclasses.replace(self, rows=[row for row in self.rows if keep(row)])

    def ordered(self, key: str) -> "Sheet":
        """Rows with the largest of a column first, what is not known last; as they are for `"path"` or without it."""
        column = next((each for each in self.columns if each.key == key and each.numeric), None)
        if column is None:
            return self
        size = lambda row: -math.inf if (number := column.number(row)) is None else number
        return dataclasses.replace(self, rows=sorted(self.rows, key=size, reverse=True))

    def first(self, count: int | None) -> "Sheet":
        """The first rows, all with None."""
        return dataclasses.replace(self, rows=self.rows[:count])

    def sum(self) -> int:
        """Of the total's column."""
        return sum(getattr(row, self.total) for row in self.rows) if self.total else 0


def arranged(sheets: Sequence[Sheet], where: str | None, sort: str, top: int | None) -> list[Sheet]:
    """Sheets with the rows that were asked for, in that order.

    Args:
      where: an expression over paths, see `vlora_jax.select`; all with None.
      sort: `"path"`, or a column that some sheet has.
      top: only so many rows of each.

    Raises:
      TargetError: no path matches.
      ConfigError: there is no such column.
    """
    columns = ["path", *dict.fromkeys(column.key for sheet in sheets for column in sheet.columns if column.numeric)]
    if sort not in columns:
        raise ConfigError(f"--sort {sort!r} is no column here; nearest: {', '.join(nearest(sort, columns))}")
    if where is not None:
        paths = {row.path for sheet in sheets for row in sheet.rows}
        kept = set(matching(where, paths, "--where"))
        sheets = [sheet.only(lambda row: row.path in kept) for sheet in sheets]
    return [sheet.ordered(sort).first(top) for sheet in sheets]


def plain(value: Any) -> Any:
    """A record as JSON values; numbers that are not finite, which JSON does not have, as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """A record as one line of CSV: records within it by `field.sub`, shapes and lists as text.

    >>> from vlora_jax.inspection.tables import ParameterRow
    >>> flat(ParameterRow("head", (8, 2), "float32", 16, None))
    {'path': 'head', 'shape': '8×2', 'dtype': 'float32', 'numbers': 16, 'rms': ''}
    """
    line = {}
    for each in dataclasses.fields(value):
        part = getattr(value, each.name)
        if isinstance(part, Spread):
            line |= flat(part, f"{prefix}{each.name}.")
        elif isinstance(part, dict):
            line[f"{prefix}{each.name}"] = shapes(part)
        elif isinstance(part, tuple):
            whole = all(isinstance(size, int) for size in part)
            line[f"{prefix}{each.name}"] = shape(part) if whole else " ".join(f"{size:g}" for size in part)
        else:
            line[f"{prefix}{each.name}"] = "" if part is None else part
    return line


def shape(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes)) or "scalar"


def shapes(tensors: dict[str, tuple[int, ...]]) -> str:
    return " ".join(f"{name}[{shape(sizes)}]" for name, sizes in tensors.items())


def spread(value: Spread) -> str:
    """A mean, with its range where there is one."""
    about = "" if value.low == value.high else f" ({value.low:.2f}–{value.high:.2f})"
    return f"{value.mean:.2f}{about}"


def decimals(places: int) -> Callable[[float], str]:
    """Numbers with so many places; small ones in scientific notation."""

    def form(value: float) -> str:
        if not value:
            return "0"
        small = abs(value) < 10 ** (1 - places)
        return f"{value:.{max(places - 2, 1)}e}" if small else f"{value:.{places}f}"

    return form


def compact(value: float) -> str:
    """A round number, as short as it is."""
    return f"{value:.4g}"


TWO, THREE, FOUR, SIX = map(decimals, (2, 3, 4, 6))


def percent(value: float) -> str:
    return f"{value:.1%}"


def thousands(value: int) -> str:
    return f"{value:,}"
