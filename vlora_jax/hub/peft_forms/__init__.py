"""Every method that goes in and out of PEFT's files, one form each.

A new one is a module here with its config class and a `Form`, a name in `FORMS`, and a line in
`tests/parity/test_methods_peft.py`. Of two forms of one method the first is written; the other is only read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlora_jax.adapters.method import Method
from vlora_jax.errors import AdapterFileError
from vlora_jax.hub.peft_config import PeftConfig, parse
from vlora_jax.hub.peft_forms.adalora import ADALORA
from vlora_jax.hub.peft_forms.delora import DELORA
from vlora_jax.hub.peft_forms.form import Form
from vlora_jax.hub.peft_forms.fourierft import FOURIERFT
from vlora_jax.hub.peft_forms.hira import HIRA
from vlora_jax.hub.peft_forms.ia3 import IA3
from vlora_jax.hub.peft_forms.ln_tuning import LN_TUNING
from vlora_jax.hub.peft_forms.lora import DORA, LORA
from vlora_jax.hub.peft_forms.lycoris import LOHA, LOKR
from vlora_jax.hub.peft_forms.miss import BONE, MISS
from vlora_jax.hub.peft_forms.randlora import RANDLORA
from vlora_jax.hub.peft_forms.token_rows import TRAINABLE_TOKENS
from vlora_jax.hub.peft_forms.vblora import VBLORA
from vlora_jax.hub.peft_forms.vera import VERA

FORMS: tuple[Form, ...] = (
    LORA, DORA, ADALORA, VERA, RANDLORA, VBLORA, DELORA, HIRA, LOHA, LOKR, MISS, BONE, FOURIERFT, IA3, LN_TUNING,
    TRAINABLE_TOKENS,
)  # fmt: skip


def form_of(method: type[Method]) -> Form | None:
    """The form in which a method is written; None if PEFT does not have it."""
    return next((form for form in FORMS if form.method is method), None)


def read_config(raw: Mapping[str, Any], file: Path) -> tuple[Form, PeftConfig]:
    """A config and its form.

    Raises:
      AdapterFileError: it is of no method that can be read, or see `parse`.
    """
    forms = [form for form in FORMS if form.peft_type == raw.get("peft_type")]
    if not forms:
        known = ", ".join(dict.fromkeys(form.peft_type for form in FORMS))
        raise AdapterFileError(f"{file}: peft_type is {raw.get('peft_type')!r}; it can be {known}")
    config = parse(forms[0].config, raw, file)
    return next(form for form in forms if form.when(config)), config
