"""LN tuning: the values of norms, `ln_tuning_layers.weight` and `.bias`. huggingface/peft, `tuners/ln_tuning`."""

from vlora_jax.adapters.ln_tuning import LNTuning
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_forms.form import Form


class LNTuningConfig(PeftConfig):
    """PEFT's `LNTuningConfig`."""

    lacks = frozenset({"bias", "layers_to_transform", "layers_pattern"})


LN_TUNING = Form(
    peft_type="LN_TUNING",
    method=LNTuning,
    config=LNTuningConfig,
    options=lambda config, places: {},
    fields=lambda adapter, places, targets: {},
    leaves=lambda method, config, place: {},
    about=lambda fields: "norms trained as they are",
    whole="ln_tuning_layers.",
)
