"""`adapter_config.json` of PEFT: the fields that its methods have in common, and which modules they match.

Source: huggingface/peft, `tuners/*/config.py` and `tuners/tuners_utils.py`, `check_target_module_exists`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vlora_jax.errors import AdapterFileError, nearest

# Of no effect on the weights: provenance.
PROVENANCE = frozenset({"auto_mapping", "peft_version", "inference_mode", "revision"})
HEADS = ("classifier", "score")  # PEFT adds them to modules_to_save for classification

ConfigType = TypeVar("ConfigType", bound="PeftConfig")


class PeftConfig(BaseModel):
    """The fields that matter to the weights and that most of PEFT's methods have, with its defaults.

    A method's own class adds its fields and says what of these it lacks.

    Attributes:
      lacks: fields of this class that PEFT's config of the method does not have.
      ignored: fields of no effect on the weights: starts, schedules, other switches' options.
      unsupported: switches that change the model itself.
      only: the value of `bias` that means those of adapted modules, `"lora_only"`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    lacks: ClassVar[frozenset[str]] = frozenset()
    ignored: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[frozenset[str]] = frozenset()
    only: ClassVar[str] = ""

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    bias: str = "none"

    @field_validator("bias")
    @classmethod
    def _known_bias(cls, bias: str) -> str:
        if bias not in ("none", "all", cls.only):
            raise ValueError(f"it must be none, all or {cls.only}")
        return bias

    @classmethod
    def names(cls) -> list[str]:
        """The fields that PEFT's config of the method has."""
        return [name for name in cls.model_fields if name not in cls.lacks]

    @property
    def saved(self) -> list[str]:
        """`modules_to_save`, with what PEFT adds for a task, where the method has such a field."""
        if "modules_to_save" in self.lacks:
            return []
        heads = HEADS if self.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
        return [*(self.modules_to_save or ()), *(head for head in heads if head not in (self.modules_to_save or ()))]

    def fault(self) -> str | None:
        """What is wrong with fields that have the right types each."""
        for field in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"):
            value = getattr(self, field, None)
            for pattern in (value,) if isinstance(value, str) else value or () if isinstance(value, Mapping) else ():
                try:
                    re.compile(pattern)
                except re.error as error:
                    return f"{field}: {pattern!r} is not a regular expression: {error}"
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            return "target_modules is a regular expression, which layers_to_transform and layers_pattern cannot go with"
        if self.layers_pattern and self.layers_to_transform is None:
            return "layers_pattern needs layers_to_transform"
        return None


COMMON = frozenset(PeftConfig.model_fields) | PROVENANCE | {"fan_in_fan_out"}


def parse(kind: type[ConfigType], raw: Mapping[str, Any], where: Any) -> ConfigType:
    """A config of one method, checked.

    Raises:
      AdapterFileError: an unknown field or one of a wrong type, fields that contradict each other, or it asks for what
        is not supported; the message starts with `where`.
    """
    for name in kind.unsupported:
        if raw.get(name):
            raise AdapterFileError(
                f"{where}: {name} is {raw[name]!r}; it changes the model itself and is not supported"
            )
    aside = kind.unsupported | kind.ignored | PROVENANCE
    known = {name: value for name, value in raw.items() if name not in aside}
    unknown = next((name for name in known if name not in kind.names()), None)
    if unknown is not None:
        raise AdapterFileError(f"{where}: unknown field {unknown!r}; nearest: {nearest(unknown, kind.names(), 1)[0]!r}")
    try:
        config = kind.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise AdapterFileError(f"{where}: {name} is {first['input']!r}: {first['msg']}") from None
    fault = config.fault()
    if fault:
        raise AdapterFileError(f"{where}: {fault}")
    return config


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any, where: str) -> Any:
    """The value for a module in `rank_pattern` or `alpha_pattern`; `default` if no pattern matches it.

    Raises:
      AdapterFileError: two patterns with different values match, so that the order of a JSON object would decide.
    """
    hits = {key: value for key, value in (patterns or {}).items() if pattern_matches(key, module)}
    if len(set(hits.values())) > 1:
        raise AdapterFileError(f"{where}: {sorted(hits)} both match {module} and differ")
    return next(iter(hits.values()), default)


def pattern_matches(pattern: str, module: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` is for a module."""
    return bool(re.match(rf"(.*\.)?({pattern})$", module))


def check_patterns(where: str, patterns: Mapping[str, Any] | None, modules: Iterable[str]) -> None:
    """Raises AdapterFileError if a key of `rank_pattern` or `alpha_pattern` is for none of the adapted modules."""
    modules = list(modules)
    for pattern in patterns or {}:
        if not any(pattern_matches(pattern, module) for module in modules):
            hints = ", ".join(nearest(pattern, modules))
            raise AdapterFileError(f"{where} {pattern!r} matches no module that is adapted; nearest: {hints}")


def is_saved(patterns: Iterable[str], module: str) -> bool:
    """Whether one of `modules_to_save` names a module, as PEFT compares them: by the end of the path."""
    return any(module.endswith(pattern) for pattern in patterns)


def is_target(config: PeftConfig, module: str) -> bool:
    """Whether a module is adapted; `target_modules` must not be `"all-linear"`."""
    exclude, targets = config.exclude_modules, config.target_modules or ()
    if isinstance(exclude, str) and exclude:
        if re.fullmatch(exclude, module):
            return False
    elif exclude and any(named(module, each) for each in exclude):
        return False
    if any(re.match(rf"(^|.*\.){each}($|\..*)", module) for each in config.saved):
        return False
    if isinstance(targets, str):
        return bool(re.fullmatch(targets, module))
    if module in targets:
        return True
    return any(named(module, each) for each in targets) and in_layers(config, module)


def named(module: str, name: str) -> bool:
    """Whether a module's path ends with the components of `name`."""
    return module == name or module.endswith(f".{name}")


def in_layers(config: PeftConfig, module: str) -> bool:
    """Whether a module belongs to `layers_to_transform`; its layer is the first number in its path."""
    layers = config.layers_to_transform
    if layers is None or layers == []:
        return True
    patterns = config.layers_pattern
    named_stacks = [patterns] if isinstance(patterns, str) else patterns or ()
    places = [rf"(?:^|.*?\.){stack}\.(\d+)\." for stack in named_stacks] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for place in places if (match := re.match(place, module))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)
