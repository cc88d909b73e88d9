"""Every family and head of transformers, tiny and random."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY, LENGTH = 37, 12
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2}
WIDE_HEADS = GROUPED | {"head_dim": 6}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 1}
BERT = SMALL | {"pad_token_id": 0, "type_vocab_size": 3}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3}
T5 |= {
    "decoder_start_token_id": 0,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10,
}
VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT |= {"image_size": 12, "patch_size": 4, "num_channels": 3, "num_labels": 5}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}

# Class, config class, options: causal language models first, the tests below split them by what they compute.
CAUSAL = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | GROUPED),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "llama-biases": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("LlamaForCausalLM", "LlamaConfig", SMALL | WIDE_HEADS | {"rope_parameters": LLAMA3}),
    "linear-rope": (
        "LlamaForCausalLM",
        "LlamaConfig",
        SMALL | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 50.0}},
    ),
    "yarn-rope": ("Qwen2ForCausalLM", "Qwen2Config", SMALL | GROUPED | {"rope_parameters": YARN}),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL | WIDE_HEADS | {"sliding_window": 5}),
    "mistral-full": ("MistralForCausalLM", "MistralConfig", SMALL | GROUPED | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL | GROUPED),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        SMALL | GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL | WIDE_HEADS | {"tie_word_embeddings": True}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SMALL | WIDE_HEADS),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        SMALL
        | WIDE_HEADS
        | {
            "sliding_window": 4,
            "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        SMALL
        | WIDE_HEADS
        | {
            "sliding_window": 4,
            "query_pre_attn_scalar": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-wide": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"n_inner": 20, "scale_attn_weights": False}),
}
STEMS = {
    "llama": ("Llama", "LlamaConfig", SMALL | GROUPED),
    "mistral": ("Mistral", "MistralConfig", SMALL | GROUPED),
    "qwen2": ("Qwen2", "Qwen2Config", SMALL | GROUPED),
    "qwen3": ("Qwen3", "Qwen3Config", SMALL | WIDE_HEADS),
    "gemma": ("Gemma", "GemmaConfig", SMALL | WIDE_HEADS),
    "gemma2": ("Gemma2", "Gemma2Config", SMALL | WIDE_HEADS | {"sliding_window": 4}),
    "gemma3": ("Gemma3Text", "Gemma3TextConfig", SMALL | WIDE_HEADS | {"sliding_window": 4}),
    "gpt2": ("GPT2", "GPT2Config", GPT2),
    "bert": ("Bert", "BertConfig", BERT),
    "roberta": ("Roberta", "RobertaConfig", BERT | {"pad_token_id": 1}),
}
CLASSIFIERS = {
    f"{name}-{kind}": (f"{stem}For{kind.title()}Classification", config, options | {"num_labels": 5})
    for name, (stem, config, options) in STEMS.items()
    for kind in ("sequence", "token")
    if (name, kind) != ("gemma3", "token")
}
ENCODERS = {
    "bert": ("BertModel", "BertConfig", BERT | {"hidden_act": "relu"}),
    "roberta": ("RobertaModel", "RobertaConfig", BERT | {"pad_token_id": 1}),
    "bert-masked": ("BertForMaskedLM", "BertConfig", BERT),
    "roberta-masked": ("RobertaForMaskedLM", "RobertaConfig", BERT | {"pad_token_id": 1}),
}
SEQ2SEQ = {
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}
MATRIX = CAUSAL | CLASSIFIERS | ENCODERS | SEQ2SEQ


def build(case):
    """A model of transformers whose every parameter differs from its trivial start."""
    architecture, config_class, options = case
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    # T5 does not divide its scores: larger weights make its softmax a step, and torch's own float32 is off by 4e-5.
    size = 0.1 if config.model_type == "t5" else 0.3
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape))
    return model


def numbers(tensor):
    return tensor.detach().float().numpy()


def text(seed=0, padded=True):
    """Token ids that avoid every padding id, and segments: rows of different length, padded on the right."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, VOCABULARY, (3, LENGTH)).astype(np.int32)
    lengths = np.array([LENGTH, 7, 9])
    segments = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32) if padded else np.ones_like(tokens)
    return tokens, segments
