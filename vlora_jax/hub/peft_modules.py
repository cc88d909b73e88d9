"""A model's parameters under the module names that PEFT uses, and what an adapter's config selects among them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlora_jax.adapters.sites import Site, find_sites
from vlora_jax.adapters.trees import Tree, flatten, matches
from vlora_jax.errors import AdapterFileError, nearest
from vlora_jax.hub.names import ARCHITECTURES, Names
from vlora_jax.hub.peft_config import HEADS, PeftConfig, in_layers, is_saved, is_target, named


@dataclass(frozen=True)
class Module:
    """One module of transformers' model.

    Attributes:
      name: `"model.layers.3.self_attn.q_proj"`.
      path: where ours is, `"layers/block/attn/q"`.
      layer: which layer of ours; None if it is not in a stack.
      leaves: our leaf path of each of its tensors, `{"weight": "layers/block/attn/q/kernel"}`.
    """

    name: str
    path: str
    layer: int | None
    leaves: Mapping[str, str]


@dataclass(frozen=True)
class Modules:
    """A base model by module.

    Attributes:
      names: the table of its class.
      leaves: its parameters by path.
      sites: its kernels by the path of their module.
      table: its modules by their name.
    """

    names: Names
    leaves: Mapping[str, Any]
    sites: Mapping[str, Site]
    table: Mapping[str, Module]

    @classmethod
    def of(cls, base: Tree, names: Names, stored: bool = False) -> "Modules":
        """The modules of a base.

        Args:
          stored: under the names that model files use, where these are not transformers' own (adapters made by
            earlier releases have them).
        """
        leaves, table = flatten(base), {}
        for leaf_path in leaves:
            path = leaf_path.rpartition("/")[0]
            layers = names.layers(path)
            for layer in (None,) if layers is None else range(layers):
                module, _, tensor = names.tensor(leaf_path, layer).rpartition(".")
                if leaf_path not in names.tensors and not stored:
                    module = names.module(path, layer)
                known = table.get(module, Module(module, path, layer, {}))
                table[module] = Module(module, known.path, layer, {**known.leaves, tensor: leaf_path})
        return cls(names, leaves, {site.path: site for site in find_sites(base)}, table)

    @property
    def paths(self) -> dict[str, None]:
        """Where our modules are."""
        return dict.fromkeys(module.path for module in self.table.values())

    def site(self, module: Module) -> Site | None:
        """The kernel of a module that can be adapted; None for norms and the like."""
        site = self.sites.get(module.path)
        return site if site is not None and module.leaves.get("weight") == site.leaf_path else None

    def value(self, leaf_path: str, layer: int | None) -> np.ndarray:
        """One layer's parameter as we keep it."""
        return np.asarray(self.leaves[leaf_path] if layer is None else self.leaves[leaf_path][layer])

    def matrix(self, site: Site, layer: int | None) -> np.ndarray:
        """One layer's kernel `(in, out)` in float32."""
        return np.asarray(site.matrix(jnp.asarray(self.value(site.leaf_path, layer))), np.float32)

    def tensor(self, leaf_path: str, layer: int | None) -> np.ndarray:
        """One layer's parameter as files have it."""
        return np.asarray(self.names.to_file(leaf_path, self.value(leaf_path, layer)))

    def file_shape(self, module: Module) -> tuple[int, ...]:
        """The shape of a module's weight in files: four sides for the patches of images, else two."""
        site = self.sites[module.path]
        return tuple(self.names.to_file(site.leaf_path, np.broadcast_to(np.float32(0), site.shape)).shape)

    def as_is(self, module: Module) -> bool:
        """Whether a module's kernel lies in files as ours does: GPT-2's."""
        return module.path in self.names.as_is

    def targets(self, config: PeftConfig, file: Path, among: Collection[str] | None = None) -> list[Module]:
        """The modules that a config adapts.

        Args:
          among: leaf paths of which all of their tensors must be; None: they must be kernels.

        Raises:
          AdapterFileError: one of its names or patterns matches nothing, or something else.
        """
        fits = lambda m: self.site(m) is not None if among is None else set(m.leaves.values()) <= set(among)
        targets, linear = config.target_modules, [m for m in self.table.values() if self.site(m) is not None]
        if isinstance(targets, str) and targets.lower() == "all-linear":
            heads = self.heads(config)
            hits = [m for m in linear if self.sites[m.path].kind != "embed" and m.path not in heads]
            hits = [module for module in hits if len(self.file_shape(module)) == 2]
            every = config.model_copy(update={"target_modules": [module.name for module in hits]})
            return [module for module in hits if is_target(every, module.name)]
        hits = [module for module in self.table.values() if is_target(config, module.name)]
        wrong = next((module for module in hits if not fits(module)), None)
        if wrong is not None:
            what = "has no kernel to adapt" if among is None else "is not what this method trains"
            raise AdapterFileError(f"{file}: target_modules selects {wrong.name}, which {what}")
        lists = {"target_modules": targets, "exclude_modules": config.exclude_modules}
        for field, given in lists.items():
            for name in given if isinstance(given, list) else ():
                if not any(named(module, name) for module in self.table):
                    self.no_match(file, field, name)
        if not hits:
            self.no_match(file, "target_modules", targets if isinstance(targets, str) else str(targets))
        layers = config.layers_to_transform
        for layer in [layers] if isinstance(layers, int) else layers or ():
            one = config.model_copy(update={"layers_to_transform": layer})
            if not any(in_layers(one, module.name) for module in hits):
                raise AdapterFileError(f"{file}: layers_to_transform has {layer}, in which nothing is adapted")
        return hits

    def heads(self, config: PeftConfig) -> set[str]:
        """Our modules that PEFT leaves out of `"all-linear"`: an output embedding, or the classifier of a sequence."""
        head = ARCHITECTURES[self.names.architecture][1]
        if head in ("lm", "masked_lm"):
            return {"head"}
        return set(self.names.head) - {"pooler"} if config.task_type == "SEQ_CLS" else set()

    def saved(self, config: PeftConfig, file: Path) -> list[Module]:
        """The modules that `modules_to_save` trains whole, containers with all that is in them.

        Raises:
          AdapterFileError: a name matches nothing; of the heads that PEFT adds by itself, one may.
        """
        for name in config.modules_to_save or ():
            added = config.task_type in ("SEQ_CLS", "TOKEN_CLS") and name in HEADS
            if not added and not any(is_saved([name], part) for module in self.table for part in prefixes(module)):
                self.no_match(file, "modules_to_save", name)
        return [m for m in self.table.values() if any(is_saved(config.saved, part) for part in prefixes(m.name))]

    def tied(self) -> dict[str, str]:
        """Modules that share one of our parameters, `{"lm_head": "embed/embedding"}`."""
        if ARCHITECTURES[self.names.architecture][1] not in ("lm", "masked_lm"):
            return {}
        pairs = {tensor.rpartition("."): leaf for tensor, leaf in self.names.copies.items()}
        return {module: leaf for (module, _, tensor), leaf in pairs.items() if tensor == "weight"}

    def no_match(self, file: Path, field: str, name: str) -> None:
        """Raises AdapterFileError that names the nearest modules."""
        hints = ", ".join(nearest(name, self.table))
        raise AdapterFileError(f"{file}: {field} {name!r} matches no module; nearest: {hints}")


def prefixes(module: str) -> list[str]:
    """A module and the containers that it is in: `"a.b.c"` gives `["a", "a.b", "a.b.c"]`."""
    parts = module.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def exact(path: str, paths: Mapping[str, Any]) -> str:
    """A pattern that selects one path only: the path itself, unless it matches inside of another."""
    return f"^{path}$" if any(matches(path, other) for other in paths if other != path) else path
