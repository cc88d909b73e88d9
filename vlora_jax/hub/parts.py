"""Parts of a `config.json` that need more than a renaming, each read into our fields and written back."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from vlora_jax.hub.reader import Reader, of_kind, validated
from vlora_jax.models.rotary import RotaryScaling

Fields = dict[str, Any]
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
WRITTEN = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
WINDOWED, FULL = "sliding_attention", "full_attention"


@runtime_checkable
class Part(Protocol):
    """Some keys of a `config.json` and the fields of ours that they become."""

    def read(self, reader: Reader) -> Fields: ...

    def write(self, config: Any) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Activation:
    """The MLP's activation."""

    key: str
    default: str

    def read(self, reader: Reader) -> Fields:
        return {"activation": reader.choice(self.key, ACTIVATIONS)}

    def write(self, config: Any) -> dict[str, Any]:
        same = ACTIVATIONS[self.default] == config.activation
        return {self.key: self.default if same else WRITTEN[config.activation]}


@dataclass(frozen=True)
class GemmaActivation:
    """Gemma's: configs that say "gelu" mean the tanh form, and the second key overrides the first."""

    key: str = "hidden_activation"

    def read(self, reader: Reader) -> Fields:
        tanh = dict.fromkeys((None, "gelu", "gelu_new", "gelu_pytorch_tanh"), "gelu_tanh")
        reader.choice("hidden_act", tanh)
        return {"activation": reader.choice("hidden_activation", tanh)}

    def write(self, config: Any) -> dict[str, Any]:
        return {self.key: "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class AttentionBias:
    """One switch for the biases of all four attention kernels."""

    def read(self, reader: Reader) -> Fields:
        return dict.fromkeys(("qkv_bias", "out_bias"), reader("attention_bias"))

    def write(self, config: Any) -> dict[str, Any]:
        return {"attention_bias": config.out_bias}


@dataclass(frozen=True)
class MlpBias:
    """Biases of the MLP's kernels."""

    def read(self, reader: Reader) -> Fields:
        return {"mlp_bias": reader("mlp_bias")}

    def write(self, config: Any) -> dict[str, Any]:
        return {"mlp_bias": config.mlp_bias}


@dataclass(frozen=True)
class Window:
    """Mistral's: all layers have it, or none."""

    def read(self, reader: Reader) -> Fields:
        return {"window": reader("sliding_window")}

    def write(self, config: Any) -> dict[str, Any]:
        return {"sliding_window": config.window}


@dataclass(frozen=True)
class LayerTypes:
    """Gemma's: every `every`-th layer sees all, the others a window."""

    every: int

    def read(self, reader: Reader) -> Fields:
        layers = reader.need("num_hidden_layers")
        reader("_sliding_window_pattern")  # what transformers keeps of the key below once it has made the types
        every = reader("sliding_window_pattern", of=int) or self.every
        types = reader("layer_types", of=list) or [WINDOWED if (i + 1) % every else FULL for i in range(layers)]
        return windows(reader, types, reader("sliding_window"))

    def write(self, config: Any) -> dict[str, Any]:
        return {"sliding_window": config.window, "layer_types": types_of(config)}


@dataclass(frozen=True)
class QwenWindow:
    """Qwen's: off by default; else on all layers from one on."""

    def read(self, reader: Reader) -> Fields:
        window = reader("sliding_window")
        window = window if reader("use_sliding_window") else None
        first, layers = reader.need("max_window_layers"), reader.need("num_hidden_layers")
        default = [WINDOWED if window is not None and i >= first else FULL for i in range(layers)]
        return windows(reader, reader("layer_types", of=list) or default, window)

    def write(self, config: Any) -> dict[str, Any]:
        on = config.window is not None
        return {"use_sliding_window": on, "sliding_window": config.window, "layer_types": types_of(config)}


def windows(reader: Reader, types: list, window: int | None) -> Fields:
    """Our fields for a list of layer types."""
    other = [each for each in types if each not in (WINDOWED, FULL)]
    if other:
        reader.refuse("layer_types", other[0], f"{WINDOWED!r} and {FULL!r}")
    flags = tuple(each == WINDOWED for each in types)
    if any(flags) and window is None:
        reader.refuse("sliding_window", None, "a number where layer_types has sliding_attention")
    if not any(flags):
        return {}
    return {"window": window, "window_layers": None if all(flags) else flags}


def types_of(config: Any) -> list[str]:
    """The inverse of `windows`."""
    if config.window is None:
        return [FULL] * config.layers
    return [WINDOWED if each else FULL for each in config.window_layers or (True,) * config.layers]


@dataclass(frozen=True)
class QueryScale:
    """Gemma's factor of q·k, given by the number under the root."""

    def read(self, reader: Reader) -> Fields:
        scalar = reader.need("query_pre_attn_scalar", of=float)
        if not scalar > 0:
            reader.refuse("query_pre_attn_scalar", scalar, "a positive number")
        return {"query_scale": float(scalar) ** -0.5}

    def write(self, config: Any) -> dict[str, Any]:
        scalar = config.dim if config.query_scale is None else config.query_scale**-2
        return {"query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar}


@dataclass(frozen=True)
class Rope:
    """Rotary positions, the same in all layers."""

    theta: float = 10_000.0

    def read(self, reader: Reader) -> Fields:
        key = "rope_scaling" if reader("rope_scaling", of=dict) else "rope_parameters"
        table = reader("rope_scaling") or reader("rope_parameters", of=dict) or {}
        reader("rope_parameters")
        nested = [table[name] for name in (FULL, WINDOWED) if name in table]
        if nested and (len(nested) < len(table) or any(each != nested[0] for each in nested)):
            reader.refuse(key, table, "the same for all layers")
        return stretched(reader, key, nested[0] if nested else table, reader.need("rope_theta", self.theta, float))

    def write(self, config: Any) -> dict[str, Any]:
        return {"rope_parameters": rope_table(config.rotary_theta, config.rotary_scaling)}


@dataclass(frozen=True)
class TwoRopes:
    """Gemma 3's rotary positions: layers with a window have a base of their own, and are not stretched."""

    theta: float = 1_000_000.0
    local: float = 10_000.0

    def read(self, reader: Reader) -> Fields:
        tables = reader("rope_parameters", of=dict) or {}
        if not set(tables) <= {FULL, WINDOWED} or not all(isinstance(table or {}, dict) for table in tables.values()):
            reader.refuse("rope_parameters", tables, f"a table each for {FULL!r} and {WINDOWED!r}")
        full = {**(tables.get(FULL) or {}), **(reader("rope_scaling", of=dict) or {})}
        base = reader.need("rope_local_base_freq", self.local, float)
        local = stretched(reader, "rope_parameters", tables.get(WINDOWED) or {}, base)
        if local["rotary_scaling"] is not None:
            reader.refuse("rope_parameters", tables[WINDOWED], f"rope_type 'default' for {WINDOWED!r}")
        fields = stretched(reader, "rope_parameters", full, reader.need("rope_theta", self.theta, float))
        if reader("layer_types") and WINDOWED not in reader("layer_types"):
            return fields
        return fields | {"rotary_theta_local": local["rotary_theta"]}

    def write(self, config: Any) -> dict[str, Any]:
        full = rope_table(config.rotary_theta, config.rotary_scaling)
        return {"rope_parameters": {FULL: full, WINDOWED: rope_table(config.rotary_theta_local or self.local, None)}}


# Keys of each way to stretch, and our field for each.
STRETCHED = {
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_frequency",
        "high_freq_factor": "high_frequency",
        "original_max_position_embeddings": "original",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention",
        "original_max_position_embeddings": "original",
    },
}
MSCALES = ("mscale", "mscale_all_dim")


def stretched(reader: Reader, key: str, table: Any, theta: float) -> Fields:
    """Our fields for a table of rope parameters."""
    if not isinstance(table, dict):
        reader.refuse(key, table, "a table")
    kind = table.get("rope_type", table.get("type", "default"))
    if not isinstance(kind, str) or kind not in STRETCHED:
        reader.refuse(f"{key}.rope_type", kind, ", ".join(map(repr, STRETCHED)))
    known = {"rope_type", "type", "rope_theta", *STRETCHED[kind], *(MSCALES if kind == "yarn" else ())}
    for name, value in table.items():
        if name not in known and not (name == "partial_rotary_factor" and value in (None, 1.0)):
            reader.refuse(f"{key}.{name}", value, f"{', '.join(STRETCHED[kind]) or 'no more keys'} with {kind!r}")
        if name not in ("rope_type", "type", "truncate") and not (
            value is None or (of_kind(value, float) and value > 0)
        ):
            reader.refuse(f"{key}.{name}", value, "a positive number")
    theta = float(table.get("rope_theta") or theta)
    if kind == "default":
        return {"rotary_theta": theta, "rotary_scaling": None}
    values = {ours: table[name] for name, ours in STRETCHED[kind].items() if table.get(name) is not None}
    if kind != "linear":
        values.setdefault("original", reader.need("max_position_embeddings"))
    if kind == "yarn":
        values.setdefault("factor", reader.need("max_position_embeddings") / max(values["original"], 1))
        if "attention" not in values and all(table.get(name) for name in MSCALES):
            turn = lambda scale: 0.1 * scale * math.log(values["factor"]) + 1.0 if values["factor"] > 1 else 1.0
            values["attention"] = turn(table["mscale"]) / turn(table["mscale_all_dim"])
    required = [name for name in STRETCHED[kind] if name in ("factor", "low_freq_factor", "high_freq_factor")]
    for name in required:
        if STRETCHED[kind][name] not in values:
            reader.refuse(f"{key}.{name}", None, "a number")
    if kind == "llama3" and values["high_frequency"] <= values["low_frequency"]:
        reader.refuse(f"{key}.high_freq_factor", values["high_frequency"], "more than low_freq_factor")
    return {"rotary_theta": theta, "rotary_scaling": validated(RotaryScaling, {"kind": kind, **values}, key)}


def rope_table(theta: float | None, scaling: RotaryScaling | None) -> dict[str, Any] | None:
    """The inverse of `stretched`; None for a model without rotary positions, which no config with a rope can say."""
    if theta is None:
        return None
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    values = {name: getattr(scaling, ours) for name, ours in STRETCHED[scaling.kind].items()}
    values = {name: value for name, value in values.items() if value is not None}
    return {"rope_type": scaling.kind, "rope_theta": theta} | values


@dataclass(frozen=True)
class Positions:
    """The longest context: without a meaning for rotary models but where stretching counts from it."""

    def read(self, reader: Reader) -> Fields:
        reader("max_position_embeddings", of=int)
        return {}

    def write(self, config: Any) -> dict[str, Any]:
        scaling = config.rotary_scaling
        if scaling is None or scaling.original is None:
            return {}
        return {"max_position_embeddings": math.ceil(scaling.original * scaling.factor)}


@dataclass(frozen=True)
class Gpt2Shape:
    """GPT-2's MLP width and attention scale, and its only special token."""

    end: int = 50256

    def read(self, reader: Reader) -> Fields:
        reader("n_ctx")  # the old name of n_positions, beside it
        reader.only("scale_attn_by_inverse_layer_idx", False)
        scaled = reader("scale_attn_weights", True)
        inner = reader("n_inner", of=int) or 4 * reader.need("n_embd")
        return {"mlp_width": inner, "query_scale": None if scaled else 1.0}

    def write(self, config: Any) -> dict[str, Any]:
        written = {"n_inner": config.mlp_width, "scale_attn_weights": config.query_scale is None}
        if config.vocabulary <= self.end:  # transformers warns of a default that is no token
            written |= {"bos_token_id": None, "eos_token_id": None}
        return written


@dataclass(frozen=True)
class Bert:
    """BERT's; RoBERTa counts positions from behind its padding token."""

    padding: int | None = None

    def read(self, reader: Reader) -> Fields:
        reader.only("position_embedding_type", "absolute")
        offset = 0 if self.padding is None else reader.need("pad_token_id", self.padding) + 1
        return {"position_offset": offset}

    def write(self, config: Any) -> dict[str, Any]:
        return {} if self.padding is None else {"pad_token_id": max(0, config.position_offset - 1)}


@dataclass(frozen=True)
class ImageSize:
    """A Vision Transformer's images and patches, which are square here."""

    def read(self, reader: Reader) -> Fields:
        return {"image": self._side(reader, "image_size"), "patch": self._side(reader, "patch_size")}

    def write(self, config: Any) -> dict[str, Any]:
        return {"image_size": config.image, "patch_size": config.patch}

    @staticmethod
    def _side(reader: Reader, key: str) -> Any:
        value = reader(key, of=object)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if not of_kind(value, int):
            reader.refuse(key, value, "squares: one whole number, or twice the same")
        return value


@dataclass(frozen=True)
class T5:
    """T5's MLP, depth and head; version 1.1 does not scale states before the head."""

    def read(self, reader: Reader) -> Fields:
        proj = reader("feed_forward_proj")
        gated, _, name = str(proj).rpartition("-")
        if gated not in ("", "gated") or name not in ACTIVATIONS:
            reader.refuse("feed_forward_proj", proj, "'relu', 'gated-gelu', 'gated-silu' and the like")
        theirs = "gelu_new" if proj == "gated-gelu" else name
        reader.only("dense_act_fn", theirs)
        reader.only("is_gated_act", bool(gated))
        reader("n_positions")  # of no effect: positions are relative
        tied = reader("tie_word_embeddings", True) is not False
        start = reader("decoder_start_token_id", of=int)
        return {
            "activation": ACTIVATIONS[theirs],
            "gated": bool(gated),
            "decoder_layers": reader("num_decoder_layers") or reader("num_layers"),
            "head_scale": reader("scale_decoder_outputs", tied),
            "start_token": reader("pad_token_id", 0) or 0 if start is None else start,
        }

    def write(self, config: Any) -> dict[str, Any]:
        name = {"gelu_tanh": "gelu" if config.gated else "gelu_new"}.get(config.activation, config.activation)
        return {
            "feed_forward_proj": f"gated-{name}" if config.gated else name,
            "num_decoder_layers": config.decoder_layers,
            "tie_word_embeddings": config.tied_head,
            "scale_decoder_outputs": config.head_scale,
            "is_encoder_decoder": True,
            "decoder_start_token_id": config.start_token,
            "pad_token_id": config.start_token,
        }
