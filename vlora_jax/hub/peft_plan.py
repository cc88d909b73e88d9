"""What a PEFT config says that its file must hold, on a given base, and whether the file does."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlora_jax.adapters.method import Method
from vlora_jax.adapters.registry import from_config
from vlora_jax.errors import AdapterFileError, ConfigError, nearest
from vlora_jax.hub.peft_config import PeftConfig, is_saved, is_target
from vlora_jax.hub.peft_file import FLOATS, INTEGERS, Tensors, code_of
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place
from vlora_jax.hub.peft_modules import Module, Modules, exact

PREFIX, SHARED = "base_model.model.", "base_model."
ROWS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Plan:
    """What a config says that a file must hold.

    Attributes:
      method: ours, with all its options.
      places: adapted modules.
      leaves: keys of their tensors, and what they are.
      shared: keys of the tensors that modules share, and what they are.
      whole: keys of tensors that are trained whole, and what they are: our leaf path and layer.
      rows: modules of which rows are trained, and which rows.
      shapes: of every key.
      copies: keys that may be there too, and our leaf path and layer, or another key, that they must equal.
    """

    modules: Modules
    form: Form
    config: PeftConfig
    method: Method
    places: Mapping[str, Place]
    leaves: Mapping[str, tuple[Place, Leaf]]
    shared: Mapping[str, Leaf]
    whole: Mapping[str, tuple[str, int | None]]
    rows: Mapping[str, tuple[Module, tuple[int, ...]]]
    shapes: Mapping[str, tuple[int, ...]]
    copies: Mapping[str, tuple[str, int | None] | str]

    @property
    def every(self) -> dict[str, Leaf]:
        """The tensors of the method by their keys."""
        return {key: leaf for key, (_, leaf) in self.leaves.items()} | dict(self.shared)

    @classmethod
    def of(cls, modules: Modules, form: Form, config: PeftConfig, file: Path) -> "Plan":
        """The plan of a config on a base.

        Raises:
          AdapterFileError: they do not fit together.
        """
        if not form.ties:
            refuse_ties(modules, config, file)
        own = None if form.whole is None else form.method().whole(modules.leaves)
        targets = modules.targets(config, file, own)
        places = {module.name: place_of(modules, module) for module in targets} if own is None else {}
        saved = modules.saved(config, file)
        rows = row_modules(modules, config, file)
        twice = next((name for name in rows if name in {*places, *(module.name for module in saved)}), None)
        if twice is not None:
            raise AdapterFileError(f"{file}: {twice} has trained rows and is adapted or trained whole as well")
        whole = {f"{PREFIX}{m.name}.{leaf}": (path, m.layer) for m in saved for leaf, path in m.leaves.items()}
        copies: dict[str, tuple[str, int | None] | str] = {}
        for module in modules.table.values():
            path, adapted = module.leaves.get("bias"), module.name in places
            if path is not None and module not in saved and config.bias in ("all", config.only if adapted else "all"):
                inner = "base_layer." if adapted else ""
                whole[f"{PREFIX}{module.name}.{inner}bias"] = path, module.layer
            if path is not None and module in saved and config.bias == "all":  # PEFT's sieve takes every "*.bias"
                copies |= bias_copies(config, module, path)
            if adapted and module.name.rpartition(".")[2] in ("embed_tokens", "lm_head"):
                copies[f"{PREFIX}{module.name}.base_layer.weight"] = module.leaves["weight"], module.layer
        try:
            beside = {path for path, _ in whole.values()}
            method = method_of(modules, form, config, places, [exact(m.path, modules.paths) for m in targets], beside)
            leaves, shared = keys_of(form, method, config, places)
        except (AdapterFileError, ConfigError) as error:
            raise AdapterFileError(f"{file}: {error}") from None
        copies |= tied_copies(modules, form, leaves)
        if form.whole is not None:
            whole |= {
                f"{PREFIX}{m.name}.{form.whole}{leaf}": (p, m.layer) for m in targets for leaf, p in m.leaves.items()
            }
        shapes = {key: modules.tensor(*place).shape for key, place in whole.items()}
        shapes |= {key: leaf.shape for key, (_, leaf) in leaves.items()}
        shapes |= {key: leaf.shape for key, leaf in shared.items()}
        shapes |= {f"{PREFIX}{n}.{ROWS}": (len(i), modules.sites[m.path].out_dim) for n, (m, i) in rows.items()}
        return cls(modules, form, config, method, places, leaves, shared, whole, rows, shapes, copies)


def place_of(modules: Modules, module: Module) -> Place:
    """An adapted module as forms see it."""
    site, shape = modules.sites[module.path], modules.file_shape(module)
    as_is = modules.as_is(module)
    return Place(module.name, site, module.layer, shape, as_is, exact(module.path, modules.sites))


def method_of(
    modules: Modules, form: Form, config: PeftConfig, places: Mapping[str, Place], targets: list[str], full: set[str]
) -> Method:
    """Our method with what a config says of it.

    Args:
      targets: patterns of what it changes.
      full: leaf paths of what is trained whole beside that.

    Raises:
      AdapterFileError: PEFT does not have it for one of the modules, or see `Form.options`.
      ConfigError: it does not have such options.
    """
    refusal = next(filter(None, map(form.refusal, places.values())), None)
    if refusal:
        raise AdapterFileError(refusal)
    return from_config(
        {"method": form.method.name}
        | form.options(config, places)
        | {
            "targets": tuple(dict.fromkeys(targets)),
            "full": tuple(exact(path, modules.leaves) for path in modules.leaves if path in full) or None,
        }
    )


def keys_of(
    form: Form, method: Method, config: PeftConfig, places: Mapping[str, Place]
) -> tuple[dict[str, tuple[Place, Leaf]], dict[str, Leaf]]:
    """The tensors of adapted modules, and those that they share, by their keys."""
    leaves = {
        f"{PREFIX}{place.name}.{name}": (place, leaf)
        for place in places.values()
        for name, leaf in form.leaves(method.for_site(place.site), config, place).items()
    }
    return leaves, {f"{SHARED}{name}": leaf for name, leaf in form.shared(method, config, places).items()}


def tied_copies(modules: Modules, form: Form, leaves: Mapping[str, tuple[Place, Leaf]]) -> dict[str, str]:
    """What a head that follows its embedding has in files, and the embedding's keys that it equals."""
    return {
        key.replace(place.name, head): key
        for key, (place, _) in leaves.items()
        for head, path in modules.tied().items()
        if form.ties and path == place.site.leaf_path
    }


def bias_copies(config: PeftConfig, module: Module, path: str) -> dict[str, tuple[str, int | None] | str]:
    """What `bias: all` writes of a module that is trained whole, beside its bias: the base's, and the same again."""
    copies: dict[str, tuple[str, int | None] | str] = {}
    parts = module.name.split(".")
    for end in range(1, len(parts) + 1):
        container, rest = ".".join(parts[:end]), "".join(f"{part}." for part in parts[end:])
        if any(container.endswith(each) for each in config.saved):
            copies[f"{PREFIX}{container}.original_module.{rest}bias"] = path, module.layer
            for inner in ("modules_to_save.", "modules_to_save.default."):
                copies[f"{PREFIX}{container}.{inner}{rest}bias"] = f"{PREFIX}{module.name}.bias"
    return copies


def row_modules(modules: Modules, config: PeftConfig, file: Path) -> dict[str, tuple[Module, tuple[int, ...]]]:
    given = getattr(config, "trainable_token_indices", None)
    if given is None:
        return {}
    table = given if isinstance(given, dict) else {modules.names.module("embed"): given}
    found = {}
    for name, indices in table.items():
        hits = [module for module in modules.table.values() if module.name.endswith(name)]
        if not hits:
            modules.no_match(file, "trainable_token_indices", name)
        for module in hits:
            site = modules.site(module)
            if site is None or site.kind != "embed":
                raise AdapterFileError(f"{file}: trainable_token_indices has {module.name}, which is no embedding")
            if not indices or len(set(indices)) < len(indices) or not 0 <= min(indices) <= max(indices) < site.in_dim:
                raise AdapterFileError(
                    f"{file}: trainable_token_indices {indices} must be different rows of {module.name}, "
                    f"which has {site.in_dim}"
                )
            found[module.name] = module, tuple(indices)
    return found


def refuse_ties(modules: Modules, config: PeftConfig, file: Path) -> None:
    """A head and an embedding that share one array: PEFT changes one of them, or both, and merges it wrongly."""
    tied = modules.tied()
    embedding = next((m.name for m in modules.table.values() if set(m.leaves.values()) & set(tied.values())), "")
    for name in (*tied, embedding) if tied else ():
        if is_target(config, name) or is_saved(config.saved, name):
            raise AdapterFileError(
                f"{file} changes {name}; {embedding} shares its values with {', '.join(tied)}: load the base untied, "
                f"vlora_jax.load(..., untie=True), so that each has its own"
            )


def compare(file: Path, plan: Plan, tensors: Tensors) -> None:
    """Raises AdapterFileError unless a file has the keys that it must have, no others, and of the right shapes."""
    missing = [key for key in plan.shapes if key not in tensors]
    unexpected = [key for key in tensors if key not in plan.shapes and key not in plan.copies]
    if len(missing) == len(plan.shapes):
        raise AdapterFileError(
            f"{file}: none of its {len(tensors)} tensors fits this model: the file has "
            f"{next(iter(tensors), 'nothing')}, the model needs {missing[0]}"
        )
    if missing or unexpected:
        first, there = (missing[0], tensors) if missing else (unexpected[0], plan.shapes)
        raise AdapterFileError(
            f"{file}: {len(missing)} of {len(plan.shapes)} tensors are missing {missing[:3]}, {len(unexpected)} are "
            f"unexpected {unexpected[:3]}; nearest to {first}: {', '.join(nearest(first, there)) or 'none'}"
        )
    whole_numbers = {key for key, leaf in plan.every.items() if leaf.whole_numbers}
    for key, shape in plan.shapes.items():
        code, possible = code_of(tensors[key]), INTEGERS if key in whole_numbers else FLOATS
        if code not in possible:
            raise AdapterFileError(f"{file}: {key} is {code}; {', '.join(possible)} are possible")
        if tensors[key].shape != tuple(shape):
            raise AdapterFileError(f"{file}: {key} is {list(tensors[key].shape)}, expected {list(shape)}")


def check_copies(file: Path, plan: Plan, tensors: Tensors) -> None:
    for key, original in plan.copies.items():
        if key not in tensors:
            continue
        wanted = tensors[original] if isinstance(original, str) else plan.modules.tensor(*original)
        if tensors[key].shape != wanted.shape or not np.array_equal(tensors[key].astype(wanted.dtype), wanted):
            what = original if isinstance(original, str) else "the base's"
            raise AdapterFileError(
                f"{file}: {key} must be a copy of {what}, and differs: the adapter is for another base"
            )
