"""Which columns a format reads, and their values as text or as classes."""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.table import Table
from vlora_jax.errors import DataError

USUAL: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"text": ("text", "content", "document", "sentence")},
    "completion": {
        "prompt": ("prompt", "question", "instruction", "input", "source"),
        "completion": ("completion", "answer", "output", "response", "target"),
    },
    "chat": {"messages": ("messages", "conversations", "conversation")},
    "classification": {
        "text": ("text", "sentence", "sentence1", "premise", "question1", "question", "review"),
        "pair": ("pair", "sentence2", "hypothesis", "question2"),
        "label": ("label", "labels", "class", "sentiment", "target"),
    },
    "images": {"image": ("image", "img", "images"), "label": ("label", "labels", "fine_label", "class")},
}
OPTIONAL = ("pair",)


def columns_of(config: DatasetConfig, table: Table) -> dict[str, str]:
    """The column of each role: as configured, or the first of the usual names that the table has.

    With templates, a role's column is every column that its template names.

    Raises:
      DataError: a column is missing, or no usual name is there for a role.
    """
    if config.prompt_template is not None and config.completion_template is not None:
        names = [*fields(config.prompt_template), *fields(config.completion_template)]
        for name in names:
            table.column(name)
        return {name: name for name in names}
    found = {}
    for role, usual in USUAL[config.format].items():
        if role in config.columns:
            table.column(config.columns[role])
            found[role] = config.columns[role]
            continue
        present = [name for name in usual if name in table.columns and name not in found.values()]
        if present:
            found[role] = present[0]
        elif role not in OPTIONAL:
            shown = ", ".join(repr(name[:40]) for name in table.columns)
            raise DataError(
                f"{table.name} has no column for {role} ({', '.join(usual)}); it has {shown}: name one by "
                f"data.columns.{role}, or the columns of a csv or tsv file without a line of names by data.header"
            )
    return found


def fields(template: str) -> list[str]:
    """The columns that a template names.

    >>> fields("Question: {question} Answer: ")
    ['question']

    Raises:
      DataError: it is no template, or does more than to name columns.
    """
    try:
        parsed = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}; write {{{{ and }}}} for braces") from None
    for name in parsed:
        if not name or any(mark in name for mark in ".[]"):
            raise DataError(f"template {template!r}: {{{name}}} is no column name; write {{{{ and }}}} for braces")
    return list(dict.fromkeys(parsed))


def texts(table: Table, column: str) -> list[str]:
    """A column's values.

    Raises:
      DataError: one is missing or no text.
    """
    values = table.values(column)
    for place, value in enumerate(values):
        if not isinstance(value, str):
            what = "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
            raise DataError(f"{table.where(place)}: {column} is {what}, not text")
    return values


def prompts_and_completions(config: DatasetConfig, table: Table) -> tuple[list[str], list[str]]:
    """Both texts of each row, by the templates if there are any."""
    columns = columns_of(config, table)
    if config.prompt_template is None or config.completion_template is None:
        return texts(table, columns["prompt"]), texts(table, columns["completion"])
    values = {name: texts(table, name) for name in columns}
    rows = [{name: values[name][place] for name in columns} for place in range(len(table))]
    return [config.prompt_template.format(**row) for row in rows], [
        config.completion_template.format(**row) for row in rows
    ]


def class_names(table: Table, column: str) -> list[str]:
    """The classes, in the order of their numbers: as the set declares them, else in the order of their values.

    Raises:
      DataError: a value is missing or no class, or there are fewer than two classes.
    """
    if column in table.labels:
        return table.labels[column]
    values = list(table.column(column))  # of rows that are held out or left out too
    for number, value in enumerate(values, 1):
        if not isinstance(value, str | int):
            shown = repr(value)[:40]
            raise DataError(f"{table.name}, row {number}: {column} is {shown}, no class (a text or a whole number)")
    kinds = {type(value) for value in values}
    if len(kinds) > 1:
        raise DataError(f"{table.name}: {column} holds both text and numbers; make it one of them")
    unique: set[Any] = set(values)
    numeric = all(isinstance(value, int) or value.lstrip("-").isdecimal() for value in unique)
    names = [str(value) for value in sorted(unique, key=int if numeric else str)]
    if len(names) < 2:
        raise DataError(f"{table.name}: {column} is {names[0]!r} in every row; two classes are needed")
    return names


def classes(table: Table, column: str, names: Sequence[str]) -> np.ndarray:
    """The number of each row's class.

    Raises:
      DataError: a value is none of the classes.
    """
    declared = column in table.labels
    numbers = {name: number for number, name in enumerate(names)}
    found = np.zeros(len(table), np.int32)
    for place, value in enumerate(table.values(column)):
        number = value if declared and isinstance(value, int) else numbers.get(str(value))
        if value is None or number is None or not 0 <= number < len(names):
            shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
            raise DataError(f"{table.where(place)}: {column} {str(value)[:40]!r} is none of the classes {shown}")
        found[place] = number
    return found


def few_shot(labels: np.ndarray, names: Sequence[str], shots: int, seed: int) -> np.ndarray:
    """Places of `shots` rows of each class, drawn by `seed`, in the order of the rows.

    Raises:
      DataError: a class has fewer rows.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    chosen = []
    for number, name in enumerate(names):
        mine = order[labels[order] == number][:shots]
        if len(mine) < shots:
            raise DataError(f"data.shots {shots}: class {name!r} has {len(mine)} rows")
        chosen.append(mine)
    return np.sort(np.concatenate(chosen))
