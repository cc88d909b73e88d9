"""Adapters as PEFT's files: written beside, read back, and only then put in place."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.quantize import form_of as held_form
from vlora_jax.adapters.token_rows import TokenRows
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import AdapterFileError, ConversionError, ResourceError
from vlora_jax.hub.names import ARCHITECTURES, Names
from vlora_jax.hub.peft_config import COMMON, is_saved, named, parse
from vlora_jax.hub.peft_file import CONFIG, TENSORS, Tensors, write_tensors
from vlora_jax.hub.peft_forms import form_of
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place
from vlora_jax.hub.peft_modules import Module, Modules, prefixes
from vlora_jax.hub.peft_plan import PREFIX, ROWS, keys_of, place_of, tied_copies
from vlora_jax.hub.peft_read import FINGERPRINT, QUANTIZE, fingerprint, read_peft

PEFT_VERSION = "0.21.0"  # whose format this is
TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "lm": "CAUSAL_LM"}
HELD = {  # what there is to say of an adapter whose base was held in fewer bits
    "nf4": "trained on a base in 4 bits: load that so in PEFT too, with bitsandbytes, bnb_4bit_quant_type nf4",
    "int8": "trained on a base held as int8, whose values bitsandbytes' int8 has not: merge it for exact answers",
}


@dataclass(frozen=True)
class Exported:
    """What `write_peft` wrote: its directory, tensors, numbers, the config, and what of it is the method's in words."""

    directory: Path
    tensors: int
    numbers: int
    config: dict[str, Any]
    about: str


def write_peft(
    directory: Path | str,
    adapters: Adapter | Sequence[Adapter],
    base: Tree,
    names: Names,
    *,
    base_name: str | None = None,
    like: Mapping[str, Any] | None = None,
) -> Exported:
    """Write an adapter of a method that PEFT has, and token rows beside it, so that PEFT reads them with no key missing
    or unexpected. PiSSA and OLoRA are written as LoRA of twice the rank, which needs no start.

    Args:
      directory: new or empty.
      base, names: the model that the adapters are for, from `hub.load.load_model`.
      base_name: what the config calls it.
      like: a config of PEFT, from which `task_type`, `revision` and the like are taken.

    Raises:
      ConversionError: other adapters than these, or ones that PEFT's format cannot express; `as_lora` converts what
        can be merged.
      AdapterFileError: what was written does not read back as it was.
      ResourceError: the directory is not empty, or cannot be written.
    """
    out = Path(directory)
    given = [adapters] if isinstance(adapters, Adapter) else list(adapters)
    several = [adapter.method.exported(adapter) for adapter in given]
    rows = [adapter for adapter in several if isinstance(adapter.method, TokenRows)]
    others = [adapter for adapter in several if not isinstance(adapter.method, TokenRows)]
    if len(rows) == 1 and not others:  # they have a kind of file of their own
        rows, others = [], rows
    form = form_of(type(others[0].method)) if len(others) == 1 else None
    if form is None:
        kinds = ", ".join(adapter.method.name for adapter in several)
        raise ConversionError(
            f"a PEFT file holds one adapter of a method that PEFT has, and token_rows, not {kinds}; as_lora makes "
            f"them one"
        )
    modules = Modules.of(base, names)
    config, tensors = contents(modules, others[0], rows)
    config |= _kept(like or {}, config) | {
        "base_model_name_or_path": base_name or (like or {}).get("base_model_name_or_path")
    }
    about = form.about({name: value for name, value in config.items() if name not in COMMON})
    metadata = {"format": "pt", FINGERPRINT: fingerprint(base, several)}
    held = held_form(base)
    if held is not None:
        metadata[QUANTIZE] = held
        about += f"; {HELD[held]}"
    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.refuse_used(out)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        write_tensors(partial / TENSORS, tensors, metadata)
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card(config, others[0], about, tensors), encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _read_back(partial, [*others, *rows], base, names)
        partial.chmod(0o755)
        partial.rename(out)
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, len(tensors), sum(array.size for array in tensors.values()), config, about)


def contents(modules: Modules, adapter: Adapter, rows: Sequence[Adapter]) -> tuple[dict[str, Any], Tensors]:
    """The config and tensors of a PEFT file.

    Raises:
      ConversionError: PEFT cannot express the adapter.
    """
    form = form_of(type(adapter.method))
    if form is None:
        raise ConversionError(f"PEFT does not have {adapter.method.name}")
    places = adapted_places(form, modules, adapter)
    refusal = next(filter(None, map(form.refusal, places.values())), None)
    if refusal:
        raise ConversionError(refusal)
    full = {path: value for each in (adapter, *rows) for path, value in each.trainable["full"].items()}
    own = own_modules(modules, adapter) if form.whole is not None else {}
    inside = {path for module in own.values() for path in module.leaves.values()}
    beside = {path: value for path, value in full.items() if path not in inside}
    bias, saved, whole = whole_tensors(modules, beside, set(places), form)
    for module in own.values():
        whole |= {
            f"{PREFIX}{module.name}.{form.whole}{leaf}": _trained(modules, full, module, leaf) for leaf in module.leaves
        }
    model_type, head = ARCHITECTURES[modules.names.architecture]
    task = "SEQ_2_SEQ_LM" if model_type == "t5" else TASKS.get(head)
    if task in ("SEQ_CLS", "TOKEN_CLS") and not saved & {"classifier", "score"}:
        task = None  # else PEFT expects a trained head
    targets = compact({*places, *own}, modules.table)
    common = {
        "bias": bias,
        "target_modules": targets,
        "modules_to_save": sorted(saved) or None,
        "fan_in_fan_out": any(place.as_is for place in places.values()),
        "trainable_token_indices": _row_indices(modules, rows),
    }
    known = {name: value for name, value in common.items() if name in form.config.names()}
    if rows and "trainable_token_indices" not in known:
        raise ConversionError(f"PEFT has no trained rows beside {form.peft_type}; write them beside lora or dora")
    fields = {"peft_type": form.peft_type, "task_type": task} | known | form.fields(adapter, places, targets)
    config = parse(form.config, fields, "the config to be written")
    tensors: Tensors = {}
    leaves, shared = keys_of(form, adapter.method, config, places)
    for key, (place, leaf) in leaves.items():
        own = adapter.factors(place.site.path)[leaf.factor][... if place.layer is None else place.layer]
        tensors[key] = in_file(leaf, own)
    tensors |= {copy: tensors[key] for copy, key in tied_copies(modules, form, leaves).items()}
    for key, leaf in shared.items():
        tensors[key] = in_file(leaf, adapter.shared[leaf.factor])
    for each in rows:
        (site,) = each.sites
        rows_key = f"{PREFIX}{modules.names.module(site.path)}.{ROWS}"
        tensors[rows_key] = np.asarray(each.factors(site.path)["rows"], np.float32)
    return fields | {"peft_version": PEFT_VERSION, "inference_mode": True}, tensors | whole


def in_file(leaf: Leaf, factor: Any) -> np.ndarray:
    """One layer's factor as files have it."""
    return np.ascontiguousarray(leaf.to_file(np.asarray(factor)), leaf.dtype)


def adapted_places(form: Form, modules: Modules, adapter: Adapter) -> dict[str, Place]:
    """The layers that a file has: see `Form.adapted`."""
    by_path: dict[str, list[Place]] = {site.path: [] for site in adapter.sites}
    for module in modules.table.values():
        if module.path in by_path:
            by_path[module.path].append(place_of(modules, module))
    every = [place for places in by_path.values() for place in places]
    if form.adapted is not None:
        return {place.name: place for place in every if form.adapted(adapter, place)}
    start = form.start(adapter.method, adapter.sites, modules.leaves)
    moved = {place.name for place in every if _differs(adapter, start, place)}
    alive = {place.site.path for place in every if place.name in moved}
    return {place.name: place for place in every if place.name in moved or place.site.path not in alive}


def _differs(adapter: Adapter, start: Adapter, place: Place) -> bool:
    ours, theirs = (each.factors(place.site.path) for each in (adapter, start))
    layer = ... if place.layer is None else place.layer
    return any(not np.array_equal(value[layer], theirs[name][layer]) for name, value in ours.items())


def _row_indices(modules: Modules, rows: Sequence[Adapter]) -> Any:
    """Token rows as PEFT's config lists them: by module, or those of the input embedding alone."""
    indices = {modules.names.module(each.sites[0].path): list(each.method.indices) for each in rows}
    if [*indices] == [modules.names.modules.get("embed")]:
        return next(iter(indices.values()))
    return indices or None


def own_modules(modules: Modules, adapter: Adapter) -> dict[str, Module]:
    """The modules, by name, that a method trains whole because it found them, and not because they were named."""
    paths = set(adapter.method.whole(modules.leaves)) & set(adapter.trainable["full"])
    return {name: module for name, module in modules.table.items() if set(module.leaves.values()) <= paths}


def whole_tensors(
    modules: Modules, full: Mapping[str, Any], adapted: set[str], form: Form
) -> tuple[str, set[str], Tensors]:
    """What is trained whole, as PEFT keeps it: its `bias`, `modules_to_save`, and the tensors.

    Raises:
      ConversionError: PEFT can only keep whole modules or all biases, and no module that is adapted.
    """
    saved, biases, tensors = set(), set(), {}
    array = lambda module, leaf: _trained(modules, full, module, leaf)
    for module in modules.table.values():
        mine = [leaf for leaf, path in module.leaves.items() if path in full]
        if mine and len(mine) == len(module.leaves) and module.name not in adapted:
            saved.add(module.name)
            tensors |= {f"{PREFIX}{module.name}.{leaf}": array(module, leaf) for leaf in mine}
        elif mine == ["bias"]:
            if module.name in adapted or not np.array_equal(array(module, "bias"), _base(modules, module, "bias")):
                biases.add(module.name)
        elif mine:
            raise ConversionError(f"{module.leaves[mine[0]]} is trained whole; PEFT's files keep whole modules only")
    every = {name for name, module in modules.table.items() if "bias" in module.leaves}
    of_adapted = every & adapted
    if not biases:
        return "none", _shortened(modules, saved), tensors
    if "bias" not in form.config.names():
        raise ConversionError(f"{sorted(biases)[0]}.bias is trained; PEFT's {form.peft_type} has no place for it")
    if biases <= of_adapted:
        bias, kept = form.config.only, of_adapted
    else:
        bias, kept = "all", every - saved
    for name in kept:
        module = modules.table[name]
        value = array(module, "bias") if module.leaves["bias"] in full else _base(modules, module, "bias")
        tensors[f"{PREFIX}{name}.{'base_layer.' if name in adapted else ''}bias"] = value
    return bias, _shortened(modules, saved), tensors


def _trained(modules: Modules, full: Mapping[str, Any], module: Module, leaf: str) -> np.ndarray:
    """A tensor of what is trained whole, as files have it."""
    path = module.leaves[leaf]
    value = np.asarray(full[path][... if module.layer is None else module.layer], np.float32)
    return np.ascontiguousarray(modules.names.to_file(path, value))


def _base(modules: Modules, module: Module, leaf: str) -> np.ndarray:
    return modules.tensor(module.leaves[leaf], module.layer).astype(np.float32)


def _shortened(modules: Modules, saved: set[str]) -> set[str]:
    """Names for `modules_to_save`: a container if all in it is trained, a last component if it means the same."""
    inside = lambda container: {name for name in modules.table if f"{name}.".startswith(f"{container}.")}
    containers = {part for name in saved for part in prefixes(name) if inside(part) <= saved}
    tops = {name for name in containers if not any(part in containers for part in prefixes(name)[:-1])}
    parts = {part for name in modules.table for part in prefixes(name)}
    return set(compact(tops, parts, is_alike=lambda part, name: is_saved([name], part)))


def compact(chosen: set[str], table: Collection[str], is_alike: Any = named) -> list[str]:
    """Names that select `chosen` among `table` and nothing else: last components where that is so, else whole paths."""
    short = {name.rpartition(".")[2] for name in chosen}
    clear = {last for last in short if {name for name in table if is_alike(name, last)} <= chosen}
    return sorted(clear | {name for name in chosen if name.rpartition(".")[2] not in clear})


def _kept(like: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of another config that say nothing about the weights."""
    kept = {name: like[name] for name in ("revision", "auto_mapping", "inference_mode") if name in like}
    if like.get("task_type") and (config["task_type"] or like["task_type"] not in ("SEQ_CLS", "TOKEN_CLS")):
        kept["task_type"] = like["task_type"]
    return kept


def _read_back(directory: Path, adapters: Sequence[Adapter], base: Tree, names: Names) -> None:
    """Raises AdapterFileError unless a directory holds these adapters, value for value."""
    again = read_peft(directory, base, names, fresh=True)
    for one, other in zip(adapters, again, strict=True):
        ours, theirs = (_computing(adapter) for adapter in (one, other))
        differing = [path for path in ours if path not in theirs or not np.array_equal(ours[path], theirs[path])]
        leaves, got = flatten(base), other.trainable["full"]
        full = [p for p, v in one.trainable["full"].items() if not np.array_equal(v, got.get(p, leaves[p]))]
        if differing or full or set(theirs) != set(ours):
            raise AdapterFileError(
                f"{directory}: {(differing or full or sorted(theirs))[0]} does not read back as written"
            )


def _computing(adapter: Adapter) -> dict[str, Any]:
    """What an adapter computes with, by path; not what it trains whole, nor what only its method's rule reads."""
    every = flatten((adapter.trainable | {"full": {}}, adapter.frozen))
    return {path: leaf for path, leaf in every.items() if path.rpartition("/")[2] not in adapter.method.memory}


def card(config: Mapping[str, Any], adapter: Adapter, about: str, tensors: Tensors) -> str:
    """The model card."""
    name, kind = config["base_model_name_or_path"], type(adapter.method).__name__
    tag = config["peft_type"].lower()
    lines = ["---", *([f"base_model: {name}"] if name else []), "library_name: peft", "tags:", f"- {tag}", "---", ""]
    numbers = sum(array.size for array in tensors.values())
    lines += [
        f"# {kind}{f' for {name}' if name else ''}",
        "",
        f"Written by vlora_jax. {about}; {numbers:,} numbers in {len(tensors)} tensors; on "
        f"{', '.join(config['target_modules'])}.",
        "",
    ]
    return "\n".join(lines)
