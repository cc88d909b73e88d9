"""Tiny random models of transformers, as they are and as we load them, for tests against PEFT."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vlora_jax as vj
from vlora_jax.hub.load import load_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
load_peft_weights = peft.utils.save_and_load.load_peft_weights

IDS = np.random.default_rng(0).integers(3, 61, (2, 7))
IMAGES = np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32)
LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
ENCODER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 128}  # 4-bit kernels have blocks of 64 inputs
FOLDER = tempfile.TemporaryDirectory()  # of model files, removed at the end


def model_of(family):
    """A tiny random model of transformers; of the family "llama_nf4", its layers as bitsandbytes holds them."""
    return in_4_bits(stored(family)[0]) if family == "llama_nf4" else whole_model_of(family)


def in_4_bits(directory):
    """The model in a directory for QLoRA: every linear layer but the head in NF4, computing in float32."""
    pytest.importorskip("bitsandbytes")
    held = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=held).eval()
    for module in model.modules():  # on some CPUs bitsandbytes lays codes out anew, where PEFT's DoRA misreads them
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.manual_seed(0)  # whatever was drawn before: what is drawn next is the same in every order of tests
    return model


def decoded(model):
    """The whole model that one of "llama_nf4" stands for, by bitsandbytes' own decoder."""
    decode = pytest.importorskip("bitsandbytes").functional.dequantize_4bit
    whole_value = lambda value: decode(value.data, value.quant_state) if hasattr(value, "quant_state") else value
    whole = whole_model_of("llama_nf4")
    whole.load_state_dict({name: whole_value(value) for name, value in model.named_parameters()})
    return whole


def whole_model_of(family):
    """Of transformers, biases and norms random as well, so that none is zero or one."""
    torch.manual_seed(0)
    t = transformers
    makers = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
        "llama_nf4": lambda: t.LlamaForCausalLM(t.LlamaConfig(**WIDE)),
        "llama_tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA | {"tie_word_embeddings": True})),
        "llama_classes": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**LLAMA, num_labels=3, pad_token_id=0)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=4)),
        "bert": lambda: t.BertForSequenceClassification(
            t.BertConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **ENCODER)
        ),
        "roberta": lambda: t.RobertaForSequenceClassification(
            t.RobertaConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **ENCODER)
        ),
        "vit": lambda: t.ViTForImageClassification(
            t.ViTConfig(image_size=8, patch_size=4, num_channels=3, num_labels=3, **ENCODER)
        ),
    }
    model = makers[family]().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:  # transformers' 0.02 is for wide layers; here it would hide what an adapter does
                parameter.mul_(4 if family == "llama_nf4" else 8)
    return model


@functools.cache
def stored(family):
    """The model's directory, and the model as we load it."""
    directory = Path(FOLDER.name) / family
    whole_model_of(family).save_pretrained(directory)
    return directory, loaded(directory, quantize="nf4" if family == "llama_nf4" else None)


@functools.cache
def loaded(directory, **options):
    return load_model(directory, notify=lambda line: None, **options)


def inputs(family):
    if family == "vit":
        return {"pixel_values": torch.from_numpy(IMAGES.transpose(0, 3, 1, 2).copy())}
    return {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.ones(IDS.shape, dtype=torch.long)}


def our_input(family):
    return jnp.asarray(IMAGES if family == "vit" else IDS)


def logits(family, graphdef, base, adapters):
    return jax.jit(functools.partial(vj.apply, graphdef))(base, adapters, our_input(family))


def their_logits(family, model):
    with torch.no_grad():
        return model(**inputs(family)).logits.numpy()


def error(ours, theirs):
    return np.abs(np.asarray(ours) - np.asarray(theirs)).max()
