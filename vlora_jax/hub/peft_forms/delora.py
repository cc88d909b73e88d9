"""DeLoRA: `delora_A (r, in)`, `delora_B (out, r)`, ours transposed, `delora_lambda (1,)` and `delora_w_norm (in,)`.

huggingface/peft, `tuners/delora`. The strength of a layer is in its tensor; `lambda_pattern` is of starts only.
"""

from typing import Any

from pydantic import Field

from vlora_jax.adapters import delora
from vlora_jax.adapters.adapter import Adapter
from vlora_jax.errors import ConversionError
from vlora_jax.hub.peft_forms.form import Form, Leaf, Place, Places, plain, reshaped, turned
from vlora_jax.hub.peft_forms.ranked import RankedConfig, fields_of, options_of


class DeloraConfig(RankedConfig):
    """PEFT's `DeloraConfig`."""

    ignored = frozenset({"init_weights", "lambda_pattern"})
    only = "delora_only"

    delora_lambda: float = 15.0
    module_dropout: float = Field(0.0, ge=0, lt=1)


def options(config: DeloraConfig, places: Places) -> dict[str, Any]:
    return options_of(config, places, []) | {"boundary": config.delora_lambda, "dropout": config.module_dropout}


def fields(adapter: Adapter, places: Places, targets: list[str]) -> dict[str, Any]:
    method: delora.DeLoRA = adapter.method
    if method.start == "residual":
        raise ConversionError(
            "delora: with start=residual the first change is subtracted, for which PEFT's files have no place; "
            "as_lora converts it, or start with zero_b"
        )
    own = {"delora_lambda": plain(method.boundary), "module_dropout": method.dropout}
    return fields_of(method, places, []) | own


def leaves(method: delora.DeLoRA, config: DeloraConfig, place: Place) -> dict[str, Leaf]:
    site, rank = place.site, method.rank
    return {
        "delora_A": turned("a", (rank, site.in_dim)),
        "delora_B": turned("b", (site.out_dim, rank)),
        "delora_lambda": reshaped("boundary", (1,), ()),
        "delora_w_norm": Leaf("w", (site.in_dim,)),
    }


DELORA = Form(
    peft_type="DELORA",
    method=delora.DeLoRA,
    config=DeloraConfig,
    options=options,
    fields=fields,
    leaves=leaves,
    turned=False,
)
