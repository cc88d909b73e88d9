"""What users write: YAML files, `key.sub=value` overrides, and the one line that a mistake in them gets."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from vlora_jax.errors import ConfigError

TAGS = ("model.family", "model.vertical.increment.method", "adapter.method", "data.name")  # which of several sections


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `"key.sub=value"`.

    Raises:
      ConfigError: it is something else.
    """
    key, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {override!r} must look like key.sub=value")
    try:
        return key.strip(), yaml.load(text, Loader=Loader)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None


class Loader(yaml.SafeLoader):
    """YAML with `1e-3` a number and `10:12` none and dates as text, as in YAML 1.2; a key given twice is an error."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # of `0b_`, or of a value that does not fit its tag
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in keys[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int | str:
        return node.value if ":" in node.value else super().construct_yaml_int(node)


Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for letter, resolvers in Loader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping.

    Raises:
      ConfigError: it is missing, unreadable, or holds something else.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except FileNotFoundError:
        nearby = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = difflib.get_close_matches(str(path), nearby, 1, 0)
        raise ConfigError(f"{path} does not exist" + (f"; nearest: {hint[0]}" if hint else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {getattr(error, 'problem', None) or 'not a YAML file'}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, not {type(values).__name__}")
    return values


def set_key(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested dictionaries, making them on the way.

    A new tag empties its section: the other keys belonged to the old one.

    Raises:
      ConfigError: what should hold the key is no section.
    """
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        if not isinstance(values[parent], dict):
            raise ConfigError(f"{key}: {parent} is {values[parent]!r}, which has no keys")
        values = values[parent]
    if key in TAGS and values.get(last) not in (None, value):
        values.clear()
    values[last] = value


def flat_keys(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries by dotted key.

    >>> flat_keys({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    flat = {}
    for key, value in values.items():
        inner = flat_keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
        flat |= inner
    return flat


def explain(error: ValidationError, section: type[BaseModel]) -> str:
    """A pydantic error about a section as one line: the first mistake, with the nearest valid key."""
    first, *others = error.errors()
    if first["type"] == "missing":  # perhaps because it is misspelt
        beside = lambda other: other["type"] == "extra_forbidden" and other["loc"][:-1] == first["loc"][:-1]
        first = next(filter(beside, others), first)
    keys, found = located(section, first["loc"])
    key = ".".join(keys)
    if first["type"] == "extra_forbidden":
        names = sorted(models_in(found)[0].model_fields)
        near = difflib.get_close_matches(keys[-1], names, 1, 0)
        prefix = "".join(f"{part}." for part in keys[:-1])
        return f"unknown key {key!r}" + (f"; nearest: {prefix + near[0]!r}" if near else "")
    if first["type"] in ("union_tag_not_found", "union_tag_invalid"):
        context = first.get("ctx", {})
        tag, options = context["discriminator"].strip("'"), context.get("expected_tags")
        return f"{key}.{tag}: {context['tag']!r} is none of {options}" if "tag" in context else f"{key} needs a {tag}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = f" (it is {given!r})" if isinstance(given, str | int | float | bool | None) else ""
    return f"{key}: {message}{shown}" if key else message


def located(annotation: Any, location: Sequence[str | int]) -> tuple[list[str], Any]:
    """The keys that lead from a type annotation to the place of a pydantic error, and the annotation there.

    A place also says which of several sections or types was tried, which is no key.
    """
    keys = []
    for part in location:
        several = models_in(annotation)
        kind, inner = get_origin(annotation), get_args(annotation)
        chosen = next((model for model in several if len(several) > 1 and has_tag(model, part)), None)
        if chosen is not None:
            annotation = chosen
        elif several:
            keys.append(str(part))
            field = several[0].model_fields.get(str(part))
            annotation = several[0] if field is None else without_none(field.annotation)
        elif kind in (dict, list) and part != "[key]":
            keys.append(str(part))
            annotation = without_none(inner[-1])
        elif isinstance(part, int):
            keys.append(str(part))
    return keys, annotation


def has_tag(section: type[BaseModel], tag: str | int) -> bool:
    """Whether one of a section's fields can only have this value: it tells the section from others."""
    return any(get_args(field.annotation) == (tag,) for field in section.model_fields.values())


def without_none(annotation: Any) -> Any:
    """`X` of `X | None`."""
    inner = [each for each in get_args(annotation) if each is not type(None)]
    return inner[0] if get_origin(annotation) in (Union, UnionType) and len(inner) == 1 else annotation


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [model for inner in get_args(annotation) for model in models_in(inner)]
    return []
