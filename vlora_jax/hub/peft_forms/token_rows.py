"""Rows of embeddings: `trainable_tokens_delta (rows, dim)`, the rows themselves in spite of the name.

huggingface/peft, `tuners/trainable_tokens`. Beside a LoRA they are part of its file, see `peft_plan.ROWS`.
"""

from vlora_jax.adapters.token_rows import TokenRows
from vlora_jax.hub.peft_config import PeftConfig
from vlora_jax.hub.peft_forms.form import Form, Leaf


class TrainableTokensConfig(PeftConfig):
    """PEFT's `TrainableTokensConfig`."""

    lacks = frozenset({"exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias"})
    ignored = frozenset({"init_weights"})

    token_indices: list[int] = []


TRAINABLE_TOKENS = Form(
    peft_type="TRAINABLE_TOKENS",
    method=TokenRows,
    config=TrainableTokensConfig,
    options=lambda config, places: {"indices": config.token_indices},
    fields=lambda adapter, places, targets: {"token_indices": list(adapter.method.indices)},
    leaves=lambda method, config, place: {
        "trainable_tokens_delta": Leaf("rows", (len(config.token_indices), place.site.out_dim))
    },
    about=lambda fields: f"Rows {', '.join(map(str, fields['token_indices']))}",
    kernels=False,
    embeddings=True,
    ties=True,
)
