"""Name tables: our parameters ↔ the modules of transformers' models and the tensors of their files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlora_jax.errors import ConfigError, nearest

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}

LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    **{f"attn/{name}": f"self_attn.{name}_proj" for name in "qkvo"},
    "attn/q_norm": "self_attn.q_norm",
    "attn/k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    **{f"mlp/{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
GEMMA2_BLOCK = LLAMA_BLOCK | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn/qkv": "attn.c_attn",
    "attn/o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
BERT_BLOCK = {
    "attn/q": "attention.self.query",
    "attn/k": "attention.self.key",
    "attn/v": "attention.self.value",
    "attn/o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
VIT_BLOCK = {
    "attn_norm": "layernorm_before",
    **{f"attn/{name}": f"attention.{name}_proj" for name in "qkvo"},
    "mlp_norm": "layernorm_after",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
VIT_STORED_BLOCK = VIT_BLOCK | {  # transformers 5 renames them while it reads and writes files
    "attn/q": "attention.attention.query",
    "attn/k": "attention.attention.key",
    "attn/v": "attention.attention.value",
    "attn/o": "attention.output.dense",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}


def block(path: str, theirs: str, table: Mapping[str, str]) -> dict[str, str]:
    """A block's table under our path and theirs, `{}` standing for the layer."""
    return {f"{path}/{ours}": f"{theirs}.{name}" for ours, name in table.items()}


def t5_block(side: str, gated: bool) -> dict[str, str]:
    """The modules of T5's encoder or decoder; its layers are numbered parts: self-attention, cross-attention, MLP."""
    table = {"attn_norm": "layer.0.layer_norm", **{f"attn/{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"}}
    if side == "decoder":
        table |= {"cross_norm": "layer.1.layer_norm"}
        table |= {f"cross_attn/{name}": f"layer.1.EncDecAttention.{name}" for name in "qkvo"}
    last = "layer.2" if side == "decoder" else "layer.1"
    mlp = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    table |= {"mlp_norm": f"{last}.layer_norm"}
    table |= {f"mlp/{ours}": f"{last}.DenseReluDense.{name}" for ours, name in mlp.items()}
    return block(f"{side}/block", f"{side}.block.{{}}", table) | {
        f"{side}_bias": f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias",
        f"{side}_norm": f"{side}.final_layer_norm",
    }


def _llama(table: Mapping[str, str]) -> dict[str, str]:
    outer = {"embed": "model.embed_tokens", "norm": "model.norm"}
    return outer | block("layers/block", "model.layers.{}", table)


def _bert(prefix: str) -> dict[str, str]:
    tables = {"embed": "word", "positions": "position", "types": "token_type"}
    outer = {ours: f"{prefix}.embeddings.{name}_embeddings" for ours, name in tables.items()}
    outer |= {"embed_norm": f"{prefix}.embeddings.LayerNorm"}
    return outer | block("layers/block", f"{prefix}.encoder.layer.{{}}", BERT_BLOCK)


MODULES: dict[str, dict[str, str]] = {
    **{name: _llama(LLAMA_BLOCK) for name in ("llama", "mistral", "qwen2", "qwen3", "gemma")},
    **{name: _llama(GEMMA2_BLOCK) for name in ("gemma2", "gemma3_text")},
    "gpt2": {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        **block("layers/block", "transformer.h.{}", GPT2_BLOCK),
    },
    "bert": _bert("bert"),
    "roberta": _bert("roberta"),
    "vit": {
        "patch": "vit.embeddings.patch_embeddings.projection",
        "norm": "vit.layernorm",
        **block("layers/block", "vit.layers.{}", VIT_BLOCK),
    },
    "t5": {"embed": "shared"},
}
STORED = {"vit": block("layers/block", "vit.encoder.layer.{}", VIT_STORED_BLOCK)}
PREFIXES = {"gpt2": "transformer.", "bert": "bert.", "roberta": "roberta.", "vit": "vit.", "t5": ""}  # else "model."

# {our path: theirs} of what belongs to a head, by model type and head; without an entry, by head alone.
HEADS: dict[tuple[str, str], dict[str, str]] = {
    ("gpt2", "token"): {"head": "classifier"},
    ("bert", "sequence"): {"pooler": "bert.pooler.dense", "head": "classifier"},
    ("bert", "token"): {"head": "classifier"},
    ("bert", "masked_lm"): {
        "transform": "cls.predictions.transform.dense",
        "transform_norm": "cls.predictions.transform.LayerNorm",
        "head_bias": "cls.predictions.bias",
    },
    ("bert", "none"): {"pooler": "bert.pooler.dense"},
    ("roberta", "sequence"): {"pooler": "classifier.dense", "head": "classifier.out_proj"},
    ("roberta", "token"): {"head": "classifier"},
    ("roberta", "masked_lm"): {
        "transform": "lm_head.dense",
        "transform_norm": "lm_head.layer_norm",
        "head_bias": "lm_head.bias",
    },
    ("roberta", "none"): {"pooler": "roberta.pooler.dense"},
    ("vit", "image"): {"head": "classifier"},
    ("", "lm"): {"head": "lm_head"},
    ("", "sequence"): {"head": "score"},
    ("", "token"): {"head": "score"},
}
TENSORS = {"vit": {"token": "vit.embeddings.cls_token", "positions": "vit.embeddings.position_embeddings"}}
# Modules beside the base model, of whatever head; without the prefix even in files that have it.
BESIDE = ("lm_head.", "score.", "classifier.", "cls.", "qa_outputs.")
# Copies of a tied embedding, or of a bias, that files may carry: {tensor: our parameter}.
COPIES: dict[str, dict[str, str]] = {
    "bert": {"cls.predictions.decoder.weight": "embed/embedding", "cls.predictions.decoder.bias": "head_bias"},
    "roberta": {"lm_head.decoder.weight": "embed/embedding", "lm_head.decoder.bias": "head_bias"},
    "t5": {f"{name}.weight": "embed/embedding" for name in ("lm_head", "encoder.embed_tokens", "decoder.embed_tokens")},
}
LM_COPIES = {"lm_head.weight": "embed/embedding"}
BUFFERS = re.compile(
    r"(^|\.)(inv_freq|position_ids|token_type_ids|attn\.(masked_)?bias|mask_token)$"
    r"|EncDecAttention\.relative_attention_bias\.weight$"
)


def _classes(stem: str, **others: str) -> dict[str, str]:
    ours = {"sequence": f"{stem}ForSequenceClassification", "token": f"{stem}ForTokenClassification"}
    return others | ours | {"none": f"{stem}Model"}


# transformers' class for each head.
CLASSES: dict[str, dict[str, str]] = {
    **{
        model_type: _classes(stem, lm=f"{stem}ForCausalLM")
        for model_type, stem in (
            ("llama", "Llama"),
            ("mistral", "Mistral"),
            ("qwen2", "Qwen2"),
            ("qwen3", "Qwen3"),
            ("gemma", "Gemma"),
            ("gemma2", "Gemma2"),
        )
    },
    "gemma3_text": {
        "lm": "Gemma3ForCausalLM",
        "sequence": "Gemma3TextForSequenceClassification",
        "none": "Gemma3TextModel",
    },
    "gpt2": _classes("GPT2", lm="GPT2LMHeadModel"),
    "bert": _classes("Bert", masked_lm="BertForMaskedLM"),
    "roberta": _classes("Roberta", masked_lm="RobertaForMaskedLM"),
    "vit": {"image": "ViTForImageClassification"},
    "t5": {"lm": "T5ForConditionalGeneration"},
}
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "BertForPreTraining": ("bert", "masked_lm"),
    **{name: (model_type, head) for model_type, heads in CLASSES.items() for head, name in heads.items()},
}


@dataclass(frozen=True)
class Names:
    """What a model's parameters are called outside, and how one layer's array looks there.

    Attributes:
      architecture: transformers' class, `"LlamaForCausalLM"`.
      modules: our module path to theirs as transformers and PEFT name it; `{}` stands for the layer.
      stacks: layers of each stack, by the path that its modules start with.
      prefix: of all of the base model's tensors; files of a bare base model leave it out.
      head: our paths that belong to the head.
      stored: module paths that are called otherwise in model files.
      tensors: parameters without a module of their own, by their leaf path.
      as_is: modules whose kernels lie in files as ours do, (in, out).
      patch: side and channels of an image patch.
      copies: tensors that files may carry a second time, and our parameter that they equal.
    """

    architecture: str
    modules: Mapping[str, str]
    stacks: Mapping[str, int]
    prefix: str
    head: frozenset[str] = frozenset()
    stored: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    as_is: frozenset[str] = frozenset()
    patch: tuple[int, int] | None = None
    copies: Mapping[str, str] = field(default_factory=dict)

    def module(self, path: str, layer: int | None = None) -> str:
        """Their path of a module: `("layers/block/attn/q", 3)` to `"model.layers.3.self_attn.q_proj"`.

        Raises:
          ConfigError: they have none.
        """
        return self._fill(self.modules, path, layer)

    def tensor(self, leaf_path: str, layer: int | None = None) -> str:
        """The name in model files of one layer's parameter."""
        if leaf_path in self.tensors:
            return self.tensors[leaf_path]
        path, _, leaf = leaf_path.rpartition("/")
        return f"{self._fill({**self.modules, **self.stored}, path, layer)}.{LEAVES[leaf]}"

    def layers(self, path: str) -> int | None:
        """How many layers a path stands for; None if it is not in a stack."""
        return next((count for start, count in self.stacks.items() if path.startswith(start + "/")), None)

    def to_file(self, leaf_path: str, array: Any) -> Any:
        """One layer's array as files have it."""
        path, _, leaf = leaf_path.rpartition("/")
        if self.patch is not None and path == "patch" and leaf == "kernel":
            side, channels = self.patch
            return array.reshape(side, side, channels, -1).transpose(3, 2, 0, 1)
        if leaf == "kernel" and path not in self.as_is:
            return array.T
        lead = {"token": (1, 1), "positions": (1,)}.get(leaf_path) if leaf_path in self.tensors else None
        return array if lead is None else array.reshape(*lead, *array.shape)

    def from_file(self, leaf_path: str, array: Any) -> Any:
        """The inverse of `to_file`."""
        path, _, leaf = leaf_path.rpartition("/")
        if self.patch is not None and path == "patch" and leaf == "kernel":
            return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        if leaf == "kernel" and path not in self.as_is:
            return array.T
        lead = {"token": 2, "positions": 1}.get(leaf_path, 0) if leaf_path in self.tensors else 0
        return array.reshape(array.shape[lead:])

    def changes(self, leaf_path: str) -> bool:
        """Whether a parameter lies otherwise in files than here."""
        path, _, leaf = leaf_path.rpartition("/")
        return (leaf == "kernel" and path not in self.as_is) or (leaf_path in self.tensors and leaf_path != "head_bias")

    def full(self, tensor: str) -> str:
        """A tensor's name with the prefix that files of a bare base model leave out, and LayerNorm's old terms."""
        tensor = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", tensor))
        return tensor if tensor.startswith((self.prefix, *BESIDE)) else self.prefix + tensor

    def _fill(self, table: Mapping[str, str], path: str, layer: int | None) -> str:
        if path not in table:
            hints = ", ".join(nearest(path, table))
            raise ConfigError(f"{self.architecture} has no module for {path!r}; nearest: {hints}")
        return table[path].format(layer)


def names_of(config: Any, architecture: str) -> Names:
    """The names of a model in transformers' class `architecture`.

    Raises:
      ConfigError: that class is not known here.
    """
    if architecture not in ARCHITECTURES:
        hints = ", ".join(nearest(architecture, ARCHITECTURES))
        raise ConfigError(f"architecture {architecture!r} is not supported; nearest: {hints}")
    model_type, head = ARCHITECTURES[architecture]
    of_head = HEADS.get((model_type, head), HEADS.get(("", head), {}))
    tied = head == "lm" and config.tied_head
    modules = MODULES[model_type] | ({} if tied else {k: v for k, v in of_head.items() if k != "head_bias"})
    stacks = {"layers/block": config.layers}
    if model_type == "t5":
        modules |= t5_block("encoder", config.gated) | t5_block("decoder", config.gated)
        stacks = {"encoder/block": config.layers, "decoder/block": config.decoder_layers}
    copies = COPIES.get(model_type, LM_COPIES) if head in ("lm", "masked_lm") else {}
    return Names(
        architecture,
        modules,
        stacks,
        PREFIXES.get(model_type, "model."),
        frozenset() if tied else frozenset(of_head),
        STORED.get(model_type, {}),
        TENSORS.get(model_type, {}) | {k: v for k, v in of_head.items() if k == "head_bias"},
        frozenset(f"layers/block/{path}" for path in GPT2_BLOCK) if model_type == "gpt2" else frozenset(),
        (config.patch, config.channels) if model_type == "vit" else None,
        {name: leaf for name, leaf in copies.items() if tied or name != "lm_head.weight"},
    )
