"""FourierFT: `fourierft_spectrum (n,)`; the places of its coefficients follow from the seed in the config.

huggingface/peft, `tuners/fourierft`.
"""

from typing import Any

from pydantic import Field

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.fourierft import FourierFT
from vlora_jax.hub.peft_config import PeftConfig, check_patterns, pattern_value
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, plain, uniform


class FourierFTConfig(PeftConfig):
    """PEFT's `FourierFTConfig`."""

    ignored = frozenset({"init_weights"})
    only = "fourier_only"

    n_frequency: int = Field(1000, gt=0)
    n_frequency_pattern: dict[str, int] | None = None
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False


def count_of(config: FourierFTConfig, place: Place) -> int:
    return pattern_value(config.n_frequency_pattern, place.name, config.n_frequency, "n_frequency_pattern")


def options(config: FourierFTConfig, places: Places) -> dict[str, Any]:
    check_patterns("n_frequency_pattern", config.n_frequency_pattern, places)
    counts = uniform(places, lambda place: count_of(config, place), "n_frequency")
    return {
        "frequencies": config.n_frequency,
        "frequencies_pattern": {pattern: n for pattern, n in counts.items() if n != config.n_frequency},
        "scaling": config.scaling,
        "seed": config.random_loc_seed,
    }


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: FourierFT = adapter.method
    counts = {place.name: method.for_site(place.site).frequencies for place in places.values()}
    return {
        "n_frequency": method.frequencies,
        "n_frequency_pattern": {name: n for name, n in counts.items() if n != method.frequencies},
        "scaling": plain(method.scaling),
        "random_loc_seed": method.seed,
    }


def leaves(method: FourierFT, config: FourierFTConfig, place: Place) -> dict[str, Leaf]:
    return {"fourierft_spectrum": Leaf("spectrum", (count_of(config, place),))}


FOURIERFT = Form(
    peft_type="FOURIERFT",
    method=FourierFT,
    config=FourierFTConfig,
    options=options,
    fields=fields,
    leaves=leaves,
)
