"""IA³: `ia3_l (out, 1)`, or `(1, in)` at modules whose input is scaled. huggingface/peft, `tuners/ia3`."""

import re
from typing import Any

from vlora_jax.adapters import ia3
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.errors import AdapterFileError, nearest
from vlora_jax.hub.peft_config import PeftConfig, named
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, reshaped, uniform


class Ia3Config(PeftConfig):
    """PEFT's `IA3Config`."""

    lacks = frozenset({"bias", "layers_to_transform", "layers_pattern"})
    ignored = frozenset({"init_ia3_weights"})

    feedforward_modules: str | list[str] | None = None
    fan_in_fan_out: bool = False

    def scales_input(self, module: str) -> bool:
        """Whether a module is in `feedforward_modules`: PEFT compares ends of paths, not their components."""
        given = self.feedforward_modules or ()
        return bool(re.fullmatch(given, module)) if isinstance(given, str) else any(map(module.endswith, given))

    def fault(self) -> str | None:
        if self.feedforward_modules is None:
            return "feedforward_modules is null, which stands for a list that the file does not have; write the list"
        return super().fault()


def options(config: Ia3Config, places: Places) -> dict[str, Any]:
    given = config.feedforward_modules
    for name in given if isinstance(given, list) else ():
        if not any(map(str.endswith, places, [name] * len(places))):
            hints = ", ".join(nearest(name, places))
            raise AdapterFileError(f"feedforward_modules {name!r} matches no module that is adapted; nearest: {hints}")
    sides = uniform(places, lambda place: config.scales_input(place.name), "the scaled side")
    return {"feedforward": tuple(pattern for pattern, input_side in sides.items() if input_side) or None}


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    """A list of names among the targets, as PEFT wants it; an expression where no such list means the same."""
    method: ia3.IA3 = adapter.method
    scaled = {name for name, place in places.items() if method.scales_input(place.site)}
    listed = [target for target in targets if any(named(name, target) for name in scaled)]
    if {name for name in places if any(map(name.endswith, listed))} == scaled:
        return {"feedforward_modules": listed}
    return {"feedforward_modules": "|".join(map(re.escape, sorted(scaled)))}


def leaves(method: ia3.IA3, config: Ia3Config, place: Place) -> dict[str, Leaf]:
    site = place.site
    if method.scales_input(site):
        return {"ia3_l": reshaped("l_in", (1, site.in_dim), (site.in_dim,))}
    return {"ia3_l": reshaped("l_out", (site.out_dim, 1), (site.out_dim,))}


IA3 = Form(peft_type="IA3", method=ia3.IA3, config=Ia3Config, options=options, fields=fields, leaves=leaves)
