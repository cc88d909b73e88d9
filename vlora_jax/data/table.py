"""Rows by column, from local files or from Hugging Face `datasets`."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlora_jax.data.network import hub
from vlora_jax.errors import DataError, nearest

SUFFIXES = (".parquet", ".json", ".jsonl", ".csv", ".tsv")
LONGEST_FIELD = 1 << 30  # characters of a csv field; Python's own limit is 128 thousand


@dataclass(frozen=True)
class Table:
    """Some rows of a set.

    Attributes:
      name: for messages.
      columns: values by column; parquet and hub columns are read when they are asked for.
      rows: numbers, in the columns, of the rows that the table has.
      labels: names of the values of a column of classes, where the set declares them.
    """

    name: str
    columns: dict[str, Sequence[Any]]
    rows: np.ndarray
    labels: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> Sequence[Any]:
        """All values of a column, whether the table has their rows or not.

        Raises:
          DataError: there is no such column; the nearest is named.
        """
        if name not in self.columns:
            shown = ", ".join(repr(column[:40]) for column in self.columns)
            raise DataError(
                f"{self.name} has no column {name!r}; nearest: {nearest(name, self.columns, 1)[0]!r} of {shown} "
                "(a csv or tsv file without a line of names needs data.header)"
            )
        return self.columns[name]

    def values(self, name: str) -> list[Any]:
        """A column's values in the table's rows."""
        column = self.column(name)
        everything = column.to_pylist() if hasattr(column, "to_pylist") else list(column)  # type: ignore[attr-defined]
        return [everything[row] for row in self.rows]

    def select(self, places: Any) -> "Table":
        """The rows at these places of the table."""
        return replace(self, rows=self.rows[np.asarray(places, np.int64)])

    def where(self, place: int) -> str:
        """A row, for messages."""
        return f"{self.name}, row {self.rows[place] + 1}"


def spread(table: Table, limit: int | None) -> Table:
    """`limit` rows of a table, evenly spread, or all."""
    if limit is None or limit >= len(table):
        return table
    return table.select(np.linspace(0, len(table) - 1, limit).astype(int))


def is_local(path: str) -> bool:
    """Whether a path means a file or a directory, not a hub name."""
    return Path(path).suffix in SUFFIXES or Path(path).exists()


def read(path: str | list[str], subset: str | None, split: str, header: list[str] | None = None) -> Table:
    """All rows of a split.

    Args:
      path: a file, several with the same columns, a directory, or a hub name.
      subset: of a hub name.
      split: of a hub name or a directory, where it is the first part of the files' names.
      header: column names of csv and tsv files that have no line of them.

    Raises:
      DataError: missing, unreadable, of another kind, or without rows.
    """
    if isinstance(path, str) and not is_local(path):
        return read_hub(path, subset, split)
    if isinstance(path, str) and (Path(path) / "state.json").exists() | (Path(path) / "dataset_dict.json").exists():
        return read_saved(Path(path), split)
    files = [Path(each) for each in path] if isinstance(path, list) else files_of(Path(path), split)
    tables = [read_file(file, header) for file in files]
    for file, table in zip(files[1:], tables[1:], strict=True):
        if set(table) != set(tables[0]):
            raise DataError(f"{file} has columns {sorted(table)}, but {files[0]} has {sorted(tables[0])}")
    name = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    columns: dict[str, Sequence[Any]] = tables[0]
    if len(tables) > 1:
        columns = {column: [value for table in tables for value in table[column]] for column in tables[0]}
    count = len(next(iter(columns.values()), ()))
    if not count:
        raise DataError(f"{name} has no rows; data.path names what is read, data.split which part of it")
    return Table(name, columns, np.arange(count))


def files_of(path: Path, split: str) -> list[Path]:
    """The file itself, or a directory's files of a split: `train.csv`, `train-00000-of-00002.parquet`."""
    if not path.is_dir():
        return [path]
    known = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    found = [file for file in known if re.fullmatch(re.escape(split) + r"([-_.].*)?", file.stem)]
    if not found:
        shown = ", ".join(file.name for file in known) or f"no {', '.join(SUFFIXES)} file"
        raise DataError(f"{path} has no file for split {split!r}; it has {shown}")
    return found


def read_file(path: Path, header: list[str] | None = None) -> dict[str, Sequence[Any]]:
    """A file's values by column, read anew every time.

    Raises:
      DataError: it is missing, unreadable, damaged, empty, or its suffix is unknown.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is none of {', '.join(SUFFIXES)}")
    if header is not None and path.suffix not in (".csv", ".tsv"):
        raise DataError(f"{path} names its columns itself: data.header is for csv and tsv files")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not content.strip():
        raise DataError(f"{path} is empty")
    if path.suffix == ".parquet":
        return parquet(path, content)
    text = decoded(path, content)
    if path.suffix in (".json", ".jsonl"):
        return by_column(path, json_rows(path, text))
    lines = tsv_rows(text) if path.suffix == ".tsv" else csv_rows(path, text)
    return delimited(path, lines, header)


def decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: byte {error.start} is not UTF-8; convert the file to UTF-8") from None


def parquet(path: Path, content: bytes) -> dict[str, Sequence[Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no whole parquet file: {str(error).splitlines()[0]}") from None
    refuse_twice(path, table.column_names)
    return {name: Cells(table.column(name)) for name in table.column_names}


@dataclass(frozen=True)
class Cells(Sequence):
    """A column of an Arrow table; a value becomes a Python object when it is asked for."""

    column: Any

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, index: Any) -> Any:
        return self.column[int(index)].as_py()

    def to_pylist(self) -> list[Any]:
        return self.column.to_pylist()


def json_rows(path: Path, text: str) -> list[Any]:
    """The objects of a JSON array, or of one JSON object a line."""
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            return json.loads(text, object_pairs_hook=lambda pairs: unique(path, pairs))
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not JSON: {error}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line, object_pairs_hook=lambda pairs: unique(path, pairs)))
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            said = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}, line {number} is not JSON: {said}") from None
    return rows


def unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        refuse_twice(path, [key for key, _ in pairs])
    return found


def refuse_twice(path: Path, names: Iterable[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path} has two columns {twice[0]!r}; rename one of them")


def by_column(path: Path, rows: list[Any]) -> dict[str, Sequence[Any]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number} is {type(row).__name__}, not an object of columns")
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def tsv_rows(text: str) -> list[list[str]]:
    """Fields between tabs. Quotes are text, as in the files of GLUE."""
    return [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]


def csv_rows(path: Path, text: str) -> list[list[str]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        return [row for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not csv: {error}") from None


def delimited(path: Path, lines: list[list[str]], header: list[str] | None) -> dict[str, Sequence[Any]]:
    names, lines = (lines[0], lines[1:]) if header is None else (header, lines)
    refuse_twice(path, names)
    for number, line in enumerate(lines, 1):
        if len(line) != len(names):
            raise DataError(f"{path}, row {number} has {len(line)} fields, but there are {len(names)} columns")
    return {name: [line[place] for line in lines] for place, name in enumerate(names)}


def read_hub(name: str, subset: str | None, split: str) -> Table:
    """A split of a set on the hub, or of its copy in the hub's cache."""
    import datasets

    try:
        with hub():
            found: Any = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # of many kinds: no network, no such set, subset or split, a script, a damaged cache
        first = " ".join(str(error).split())[:300]
        raise DataError(
            f"data.path {name!r} is no file here, and from the hub: {type(error).__name__}: {first}; "
            "without network, give files (parquet, json, jsonl, csv, tsv)"
        ) from None
    return of_datasets(f"{name}{'/' + subset if subset else ''} {split}", found)


def read_saved(path: Path, split: str) -> Table:
    """A directory that `datasets` wrote by `save_to_disk`."""
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever Arrow finds wrong in the files
        raise DataError(f"{path} is no whole saved set: {' '.join(str(error).split())[:300]}") from None
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(f"{path} has no split {split!r}; it has {', '.join(map(str, found))}")
        found = found[split]
    return of_datasets(f"{path} {split}", found)


def of_datasets(name: str, found: Any) -> Table:
    if not len(found):
        raise DataError(f"{name} has no rows; data.path names what is read, data.split which part of it")
    labels = {column: list(kind.names) for column, kind in found.features.items() if hasattr(kind, "names")}
    columns = {column: found[column] for column in found.column_names}
    return Table(name, columns, np.arange(len(found)), labels)
