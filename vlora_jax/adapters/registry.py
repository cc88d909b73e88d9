"""Every method by name. A new method is one file and one line here."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from vlora_jax.adapters.adalora import AdaLoRA
from vlora_jax.adapters.bilora import BiLoRA
from vlora_jax.adapters.bitfit import BitFit
from vlora_jax.adapters.deep_lora import DeepLoRA
from vlora_jax.adapters.delora import DeLoRA
from vlora_jax.adapters.diagonal import Diagonal
from vlora_jax.adapters.dora import DoRA
from vlora_jax.adapters.flylora import FlyLoRA
from vlora_jax.adapters.fourierft import FourierFT
from vlora_jax.adapters.hira import HiRA
from vlora_jax.adapters.ia3 import IA3
from vlora_jax.adapters.lamda import LaMDA
from vlora_jax.adapters.ln_tuning import LNTuning
from vlora_jax.adapters.loha import LoHa
from vlora_jax.adapters.lokr import LoKr
from vlora_jax.adapters.lora import LoRA
from vlora_jax.adapters.lora_xs import LoRAXS
from vlora_jax.adapters.lorta import LoRTA
from vlora_jax.adapters.method import Method
from vlora_jax.adapters.miss import MiSS
from vlora_jax.adapters.olora import OLoRA
from vlora_jax.adapters.pissa import PiSSA
from vlora_jax.adapters.randlora import RandLoRA
from vlora_jax.adapters.sara import SARA, MoSARA
from vlora_jax.adapters.selective import Selective
from vlora_jax.adapters.sine_lora import SineLoRA
from vlora_jax.adapters.spiel import SpIEL
from vlora_jax.adapters.svfit import SVFit
from vlora_jax.adapters.tied_lora import TiedLoRA
from vlora_jax.adapters.token_rows import TokenRows
from vlora_jax.adapters.vblora import VBLoRA
from vlora_jax.adapters.vera import VeRA
from vlora_jax.errors import ConfigError

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        LoRA, DoRA, AdaLoRA, BiLoRA, PiSSA, OLoRA, LoRAXS, SVFit, LaMDA, SARA, MoSARA, TiedLoRA, LoRTA,
        DeepLoRA, SineLoRA, FlyLoRA, VeRA, RandLoRA, VBLoRA, DeLoRA, HiRA, LoHa, LoKr, MiSS, FourierFT, IA3,
        SpIEL, Diagonal, TokenRows, LNTuning, BitFit, Selective,
    )
}  # fmt: skip


def from_config(config: Any) -> Method:
    """A method from plain values, `{"method": "lora", "rank": 8}`; the inverse of `Method.config`.

    Raises:
      ConfigError: no mapping, or an unknown method or option; the nearest name is given.

    >>> from_config({"method": "lora", "rank": 4}).rank
    4
    """
    if not isinstance(config, Mapping) or not all(isinstance(key, str) for key in config):
        raise ConfigError(f"a method is written {{method: lora, rank: 8}}, not {config!r}")
    options = dict(config)
    name = str(options.pop("method", "lora"))
    if name not in METHODS:
        hint = difflib.get_close_matches(name, METHODS, 1, 0)[0]
        raise ConfigError(f"unknown method {name!r}; nearest: {hint!r}")
    fields = [each.name for each in dataclasses.fields(METHODS[name])]
    for option in options:
        if option not in fields:
            hint = difflib.get_close_matches(option, fields, 1, 0)[0]
            raise ConfigError(f"{name} has no option {option!r}; nearest: {hint!r}")
    return METHODS[name](**options)
