"""Families of models: between transformers' `config.json` and our model configs, in both directions.

A family is a table: keys that mean the same under another name, transformers' defaults for absent keys, our switches
that all its models share, and parts for what needs more than a renaming. Both the form of transformers 5
(`rope_parameters`, `layer_types`) and that of 4 (`rope_theta`, `rope_scaling`, …) are read, see `configs.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlora_jax.errors import ConfigError
from vlora_jax.hub import parts
from vlora_jax.hub.names import Names, names_of
from vlora_jax.hub.parts import Part
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.encoder import EncoderConfig
from vlora_jax.models.seq2seq import Seq2SeqConfig
from vlora_jax.models.vit import ViTConfig

__all__ = ["FAMILIES", "Family", "Names", "family_of", "names_of"]


@dataclass(frozen=True)
class Family:
    """A `model_type` of transformers.

    Attributes:
      config: our config class.
      keys: their key to our field, where the values are the same.
      defaults: what transformers takes where a key is absent.
      switches: our fields that are the same in all its models.
      parts: the other keys.
    """

    config: type
    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    switches: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[Part] = ()


ROTARY_KEYS = {
    "vocab_size": "vocabulary",
    "hidden_size": "width",
    "intermediate_size": "mlp_width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tied_head",
}
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
QWEN_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
GEMMA_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GEMMA2_DEFAULTS = GEMMA_DEFAULTS | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
GEMMA3_DEFAULTS = GEMMA2_DEFAULTS | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
GEMMA = {"norm_offset": True, "embed_scale": True}
GEMMA2 = GEMMA | {"norm_place": "both"}
GEMMA2_KEYS = ROTARY_KEYS | {"attn_logit_softcapping": "softcap", "final_logit_softcapping": "logit_softcap"}
GPT2_KEYS = {
    "vocab_size": "vocabulary",
    "n_positions": "max_positions",
    "n_embd": "width",
    "n_layer": "layers",
    "n_head": "heads",
    "layer_norm_epsilon": "norm_eps",
    "tie_word_embeddings": "tied_head",
}
GPT2_DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}
GPT2 = {
    "norm": "layer",
    "gated": False,
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "rotary_theta": None,
    "fused_qkv": True,
}
VIT_KEYS = {
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "norm_eps",
    "num_channels": "channels",
    "qkv_bias": "qkv_bias",
}
VIT_DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
BERT_KEYS = {key: name for key, name in VIT_KEYS.items() if name not in ("channels", "qkv_bias")} | {
    "vocab_size": "vocabulary",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "token_types",
}
BERT_DEFAULTS = VIT_DEFAULTS | {"vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2}
T5_KEYS = {
    "vocab_size": "vocabulary",
    "d_model": "width",
    "d_kv": "head_dim",
    "d_ff": "mlp_width",
    "num_layers": "layers",
    "num_heads": "heads",
    "relative_attention_num_buckets": "buckets",
    "relative_attention_max_distance": "max_distance",
    "layer_norm_epsilon": "norm_eps",
}
T5_DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
SILU, TANH = parts.Activation("hidden_act", "silu"), parts.GemmaActivation()
GELU = parts.Activation("hidden_act", "gelu")
PAST = parts.Positions()

FAMILIES: dict[str, Family] = {
    "llama": Family(
        DecoderConfig,
        ROTARY_KEYS,
        LLAMA_DEFAULTS,
        {},
        (SILU, parts.AttentionBias(), parts.MlpBias(), parts.Rope(), PAST),
    ),
    "mistral": Family(
        DecoderConfig,
        ROTARY_KEYS,
        LLAMA_DEFAULTS
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        {},
        (SILU, parts.Window(), parts.Rope(), PAST),
    ),
    "qwen2": Family(
        DecoderConfig,
        {key: name for key, name in ROTARY_KEYS.items() if key != "head_dim"},
        QWEN_DEFAULTS,
        {"qkv_bias": True},
        (SILU, parts.QwenWindow(), parts.Rope(), PAST),
    ),
    "qwen3": Family(
        DecoderConfig,
        ROTARY_KEYS,
        QWEN_DEFAULTS | {"head_dim": 128},
        {"qk_norm": True},
        (SILU, parts.AttentionBias(), parts.QwenWindow(), parts.Rope(), PAST),
    ),
    "gemma": Family(
        DecoderConfig,
        ROTARY_KEYS,
        GEMMA_DEFAULTS,
        GEMMA,
        (parts.GemmaActivation("hidden_act"), parts.AttentionBias(), parts.Rope(), PAST),
    ),
    "gemma2": Family(
        DecoderConfig,
        GEMMA2_KEYS,
        GEMMA2_DEFAULTS,
        GEMMA2,
        (TANH, parts.AttentionBias(), parts.QueryScale(), parts.LayerTypes(2), parts.Rope(), PAST),
    ),
    "gemma3_text": Family(
        DecoderConfig,
        GEMMA2_KEYS,
        GEMMA3_DEFAULTS,
        GEMMA2 | {"qk_norm": True},
        (TANH, parts.AttentionBias(), parts.QueryScale(), parts.LayerTypes(6), parts.TwoRopes(), PAST),
    ),
    "gpt2": Family(
        DecoderConfig,
        GPT2_KEYS,
        GPT2_DEFAULTS,
        GPT2,
        (parts.Activation("activation_function", "gelu_new"), parts.Gpt2Shape()),
    ),
    "bert": Family(EncoderConfig, BERT_KEYS, BERT_DEFAULTS, {}, (GELU, parts.Bert())),
    "roberta": Family(
        EncoderConfig,
        BERT_KEYS,
        BERT_DEFAULTS | {"vocab_size": 50265},
        {},
        (GELU, parts.Bert(padding=1)),
    ),
    "vit": Family(
        ViTConfig,
        VIT_KEYS,
        VIT_DEFAULTS,
        {"class_token": True},
        (GELU, parts.ImageSize()),
    ),
    "t5": Family(Seq2SeqConfig, T5_KEYS, T5_DEFAULTS, {"query_scale": 1.0}, (parts.T5(),)),
}


def family_of(given: Mapping[str, Any]) -> tuple[str, Family]:
    """The family that a `config.json` names.

    Raises:
      ConfigError: it names none, or one that is not here.
    """
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        if model_type == "gemma3":
            raise ConfigError(
                "config.json: model_type 'gemma3' has an image tower, only its text model is supported, 'gemma3_text'; "
                "save its language model by itself"
            )
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    return model_type, FAMILIES[model_type]
