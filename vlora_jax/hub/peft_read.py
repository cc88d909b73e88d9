"""Adapters from PEFT's files, every tensor accounted for. What a method's files look like is in `peft_forms`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import Adapter, FactorDict
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.sites import Site
from vlora_jax.adapters.token_rows import TokenRows
from vlora_jax.adapters.trees import Tree, flatten
from vlora_jax.errors import AdapterFileError, BaseMismatchError, ConfigError
from vlora_jax.hub.names import Names
from vlora_jax.hub.peft_file import Tensors, find, read_json, read_tensors
from vlora_jax.hub.peft_forms import read_config
from vlora_jax.hub.peft_modules import Module, Modules, exact
from vlora_jax.hub.peft_plan import PREFIX, ROWS, Plan, check_copies, compare

FINGERPRINT = "vlora_jax.base"  # in the metadata of the files that we write
QUANTIZE = "vlora_jax.quantize"  # the same: how that base was held, if in fewer bits


def read_peft(
    directory: Path | str, base: Tree, names: Names, *, fresh: bool = False, any_base: bool = False
) -> list[Adapter]:
    """The adapters of a PEFT directory, to be bound or merged together: one of its method, then token rows if any.

    A file means what PEFT makes of it, but for what PEFT passes over in silence: a tensor too many or too few, a name
    that matches nothing and the like are errors here. PiSSA and OLoRA become a LoRA of twice the rank. Layers of a
    stack that the file does not adapt change nothing; of methods other than LoRA and DoRA they train with the others.

    Args:
      directory: with `adapter_config.json` and `adapter_model.safetensors`.
      base, names: the model, from `hub.load.load_model`.
      fresh: allow an adapter that changes nothing yet.
      any_base: allow a file that we wrote for a base with other values.

    Raises:
      AdapterFileError: the files are damaged, do not fit together or do not fit the base.
      BaseMismatchError: the file says that it was made for another base.
    """
    config_file, tensor_file = find(Path(directory))
    form, config = read_config(read_json(config_file), config_file)
    tensors, metadata = read_tensors(tensor_file)
    try:
        tensors = form.tidy(config, tensors)
    except AdapterFileError as error:
        raise AdapterFileError(f"{tensor_file}: {error}") from None
    plan = Plan.of(_fitting(base, names, tensors), form, config, config_file)
    compare(tensor_file, plan, tensors)
    check_copies(tensor_file, plan, tensors)
    adapters = [_adapter(plan, tensors, tensor_file), *_rows(plan, tensors)]
    if FINGERPRINT in metadata and not any_base:
        found = fingerprint(base, adapters)
        if found != metadata[FINGERPRINT]:
            held = f" as quantize={metadata[QUANTIZE]} holds it" if QUANTIZE in metadata else ""
            raise BaseMismatchError(
                f"{tensor_file} was made for the base {metadata[FINGERPRINT]}{held}, this one is {found}; "
                f"is it another head or dtype, or quantised otherwise? any_base=True (--any-base) uses it all the same"
            )
    if not fresh and not any(changes(adapter, plan.modules) for adapter in adapters):
        raise AdapterFileError(
            f"{tensor_file}: no tensor changes the base; fresh=True (--fresh) reads an adapter that is not trained yet"
        )
    return adapters


def base_form(directory: str | Path) -> Any:
    """In which form the base was held for which we wrote an adapter; None if as it is, or if others wrote it."""
    return read_tensors(find(Path(directory))[1])[1].get(QUANTIZE)


def fingerprint(base: Tree, adapters: Sequence[Adapter]) -> str:
    """Of what adapters need of their base: all but what they train whole, such as a head that started at random."""
    whole = {path for adapter in adapters for path in adapter.trainable["full"]}
    return checkpoint.fingerprint({path: leaf for path, leaf in flatten(base).items() if path not in whole})


def _fitting(base: Tree, names: Names, tensors: Tensors) -> Modules:
    """The base under the module names that a file uses: transformers' own, or those of model files."""
    own, stored = Modules.of(base, names), Modules.of(base, names, stored=True)
    known = lambda modules: sum(owner(modules, key) is not None for key in tensors)
    return stored if known(stored) > known(own) else own


def owner(modules: Modules, key: str) -> Module | None:
    """The module that a key of a file belongs to."""
    parts = key.removeprefix(PREFIX).split(".")
    candidates = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return next((modules.table[name] for name in candidates if name in modules.table), None)


def _adapter(plan: Plan, tensors: Tensors, file: Path) -> Adapter:
    """A file's adapter, with what is trained whole beside it."""
    modules, form = plan.modules, plan.form
    layers: dict[str, set[int]] = {}
    for place in plan.places.values():
        layers.setdefault(place.site.path, set()).add(place.layer or 0)
    sites = [site for path, site in modules.sites.items() if path in layers]
    try:
        start = form.start(plan.method, sites, modules.leaves)
        for site in sites:
            _refuse_moving(start, site, [layer for layer in range(site.layers) if layer not in layers[site.path]], plan)
        adapter = form.finish(_filled(start, plan, tensors), plan.config, plan.places, modules)
    except (AdapterFileError, ConfigError) as error:
        raise AdapterFileError(f"{file}: {error}") from None
    full = whole_leaves(plan, tensors)
    adapter = adapter.with_trainable(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), adapter.trainable))
    return adapter.with_trainable(adapter.trainable | {"full": full})


def _refuse_moving(start: Adapter, site: Site, missing: list[int], plan: Plan) -> None:
    """Raises AdapterFileError if layers that a file does not adapt would be changed by the start all the same."""
    for layer in missing:
        if not start.method.mergeable or layer_changes(start, site, layer, plan.modules):
            raise AdapterFileError(
                f"layer {layer} of {site.path} is not adapted, others are; {start.method.name} has no values that "
                f"change nothing to stand for it"
            )


def _filled(start: Adapter, plan: Plan, tensors: Tensors) -> Adapter:
    """An adapter with a file's tensors in the place of its own."""
    parts = jax.tree.map(np.array, (start.trainable, start.frozen))
    read = lambda key, leaf: leaf.from_file(tensors[key] if leaf.whole_numbers else tensors[key].astype(np.float32))
    for key, leaf in plan.shared.items():
        shared = next(part["shared"] for part in parts if leaf.factor in part["shared"])
        shared[leaf.factor] = np.array(read(key, leaf), shared[leaf.factor].dtype)
    for key, (place, leaf) in plan.leaves.items():
        of_site = [part["sites"].get(place.site.path, {}) for part in parts]
        own = next(factors for factors in of_site if leaf.factor in factors)
        own[leaf.factor][... if place.layer is None else place.layer] = read(key, leaf)
    frozen = jax.tree.map(jnp.asarray, parts[1])
    return Adapter(trainable=parts[0], frozen=frozen, method=start.method, sites=start.sites)


def whole_leaves(plan: Plan, tensors: Tensors) -> dict[str, Any]:
    """What a file trains whole, by our leaf path; layers that it does not have keep the base's values."""
    modules, full = plan.modules, {}
    for key, (path, layer) in plan.whole.items():
        if path not in full:
            full[path] = np.asarray(modules.leaves[path]).astype(np.float32)
        value = np.asarray(modules.names.from_file(path, tensors[key])).astype(np.float32)
        full[path][... if layer is None else layer] = value
    return {path: jnp.asarray(value) for path, value in full.items()}


def _rows(plan: Plan, tensors: Tensors) -> list[Adapter]:
    adapters = []
    for name, (module, indices) in plan.rows.items():
        site = plan.modules.sites[module.path]
        method = TokenRows(targets=exact(site.path, plan.modules.sites), indices=indices)
        rows = jnp.asarray(tensors[f"{PREFIX}{name}.{ROWS}"].astype(np.float32))
        adapters.append(Adapter.of(method, [site], trainable={site.path: {"rows": rows}}))
    return adapters


def changes(adapter: Adapter, modules: Modules) -> bool:
    """Whether an adapter changes anything of its base."""
    for path, value in adapter.trainable["full"].items():
        if not np.array_equal(value.astype(modules.leaves[path].dtype), modules.leaves[path]):
            return True
    if not adapter.method.mergeable:  # it depends on the input
        return bool(adapter.sites)
    return any(layer_changes(adapter, site, layer, modules) for site in adapter.sites for layer in range(site.layers))


def layer_changes(adapter: Adapter, site: Site, layer: int, modules: Modules) -> bool:
    """Whether an adapter that has a ΔW changes one layer's kernel or bias."""
    method: Method = adapter.method.for_site(site)
    place = np.unravel_index(layer, site.stack)
    own = {name: value[place] for name, value in adapter.factors(site.path).items()}
    factors: FactorDict = own | adapter.shared_at(site.path)
    pair, shift = method.low_rank((site.in_dim, site.out_dim), factors), method.shift(factors)
    if shift is not None and np.asarray(shift).any():
        return True
    if pair is not None:
        return all(bool(np.asarray(side).any()) for side in pair)
    kernel = modules.matrix(site, layer if site.stack else None)
    return float(jnp.abs(method.delta(jnp.asarray(kernel), factors)).max()) > 1e-6 * float(np.abs(kernel).max())
