"""The Transformer block that all models here share, and its parts."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from vlora_jax.adapters.kept import keep
from vlora_jax.distributed.activations import along, between, by_row
from vlora_jax.models.attention import attention
from vlora_jax.models.blocks import Mask, heads_first
from vlora_jax.models.elementwise import GATED, PLAIN, light, normalised
from vlora_jax.models.linear import Linear
from vlora_jax.models.rotary import Rotary, RotaryScaling, frequencies
from vlora_jax.models.stack import Remat
from vlora_jax.vertical.config import Vertical

Flags = Annotated[tuple[bool, ...], Field(strict=False)]  # JSON has lists only


class BlockConfig(BaseModel):
    """One Transformer block. The defaults are a Vision Transformer's; see `LLAMA_STYLE`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    width: PositiveInt = 64
    heads: PositiveInt = 4
    kv_heads: PositiveInt | None = Field(
        default=None, description="key and value heads; fewer than heads is grouped-query"
    )
    head_dim: PositiveInt | None = Field(default=None, description="width / heads if not given")
    mlp_width: PositiveInt = 256
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: PositiveFloat = 1e-6
    norm_place: Literal["pre", "post", "both"] = Field(
        default="pre", description="before a branch, after the sum, or around the branch (Gemma 2)"
    )
    norm_offset: bool = Field(default=False, description="scales are stored minus one (Gemma)")
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
    gated: bool = Field(default=False, description="SwiGLU-style MLP: activation(gate) · up")
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    fused_qkv: bool = Field(default=False, description="one kernel for query, key and value")
    causal: bool = False
    qk_norm: bool = Field(default=False, description="normalise each head's queries and keys (Qwen3, Gemma 3)")
    query_scale: PositiveFloat | None = Field(default=None, description="factor of q·k; None: 1/√head_dim")
    softcap: PositiveFloat | None = Field(default=None, description="bound of attention scores (Gemma 2)")
    window: PositiveInt | None = Field(default=None, description="a token sees so many tokens, itself included")
    window_layers: Flags | None = Field(default=None, description="which layers have the window; None: all")
    rotary_theta: PositiveFloat | None = Field(
        default=None, description="rotary position embedding with this base; None: none"
    )
    rotary_theta_local: PositiveFloat | None = Field(
        default=None, description="another base, unscaled, for layers with the window (Gemma 3)"
    )
    rotary_scaling: RotaryScaling | None = None
    kernel_std: PositiveFloat | None = Field(
        default=None,
        description="deviation of kernels at the start, .02 in ViT and GPT-2; None: 1/√in, which fits any width",
    )

    @model_validator(mode="after")
    def _check(self) -> "BlockConfig":
        if self.heads % self.key_heads:
            raise ValueError(f"heads {self.heads} must be a multiple of kv_heads {self.key_heads}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width {self.width} must be a multiple of heads {self.heads}, or give head_dim")
        if self.rotary_theta is not None and self.dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.dim}")
        return self

    @property
    def dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads


class StackConfig(BlockConfig):
    """What every model of stacked blocks can be told beside its blocks' shape."""

    layers: PositiveInt = 8
    vertical: Vertical | None = Field(default=None, description="share kernels across depth")
    remat: Remat = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"


LLAMA_STYLE: dict[str, Any] = {
    "norm": "rms",
    "activation": "silu",
    "gated": True,
    "qkv_bias": False,
    "out_bias": False,
    "mlp_bias": False,
    "causal": True,
    "rotary_theta": 10_000.0,
}


def linear(
    config: BlockConfig, features_in: int, features_out: int, bias: bool, rngs: nnx.Rngs, **dtypes: Any
) -> Linear:
    """A dense layer whose kernel starts truncated-normal with deviation `kernel_std`."""
    # Flax's truncated_normal(std) has a deviation of .88 std; variance_scaling makes up for the cut.
    scale = 1.0 if config.kernel_std is None else config.kernel_std**2 * features_in
    init = nnx.initializers.variance_scaling(scale, "fan_in", "truncated_normal")
    return Linear(features_in, features_out, use_bias=bias, kernel_init=init, rngs=rngs, **dtypes)


def together(x: Array, *layers: Callable) -> tuple[Array, ...]:
    """Layers that read the same `x`; a layer may offer to compute them jointly (adapters do)."""
    for layer in layers:
        if hasattr(layer, "together"):
            return layer.together(x, layers)
    return tuple(layer(x) for layer in layers)


class Norm(nnx.Module):
    """Layer norm, or root-mean-square norm (arXiv 1910.07467), computed in float32."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs, width: int | None = None, **dtypes: Any):
        self.centred, self.eps, self.offset = config.norm == "layer", config.norm_eps, float(config.norm_offset)
        self.dtype = dtypes.get("dtype")
        width, param_dtype = width or config.width, dtypes.get("param_dtype", jnp.float32)
        start = jnp.zeros if config.norm_offset else jnp.ones
        self.scale = nnx.Param(start((width,), param_dtype))
        if self.centred:
            self.bias = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        bias = self.bias.get_value() if self.centred else None
        return light(functools.partial(normalised, self.eps, self.offset, self.dtype))(x, self.scale.get_value(), bias)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer reads beside its input.

    Attributes:
      segments: a token sees only tokens of its own segment.
      key_segments: those of a cache's slots.
      rotary, local_rotary: position tables, and those of the layers with a window where they differ.
      bias: added to the scores of self-attention, `(heads, length, keys)`.
      memory, memory_segments: what cross-attention reads.
      offset: slot of a cache where the first of these tokens goes.
    """

    segments: Any = None
    key_segments: Any = None
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    bias: Any = None
    memory: Any = None
    memory_segments: Any = None
    offset: Any = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """Keys and values of one layer, `(batch, kv_heads, slots, head_dim)`, or of all with a layer axis first."""

    k: Any
    v: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """What a layer keeps between calls while decoding: of its own tokens, and of the memory it reads."""

    own: KV
    memory: KV | None = None


def position_tables(config: BlockConfig, positions: Int[Array, "batch length"]) -> tuple[Rotary | None, Rotary | None]:
    """Rotary tables of full and of windowed layers; the second is None where they are the same."""
    if config.rotary_theta is None:
        return None, None
    scaling = config.rotary_scaling
    radians = frequencies(config.dim, config.rotary_theta, scaling)
    tables = Rotary.at(positions, radians, 1.0 if scaling is None else scaling.values())
    if config.rotary_theta_local is None:
        return tables, None
    return tables, Rotary.at(positions, frequencies(config.dim, config.rotary_theta_local))


def window_flags(config: BlockConfig) -> Bool[Array, "layers"] | None:
    """Which layers have the window, to be scanned with them; None where all or none have."""
    if config.window is None or config.window_layers is None or all(config.window_layers):
        return None
    return jnp.asarray(config.window_layers)


class Attention(nnx.Module):
    """Multi-head attention with grouped-query heads and rotary positions, to itself or to a memory."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs, **dtypes: Any):
        self.config = config
        inner, keys = config.heads * config.dim, config.key_heads * config.dim
        if config.fused_qkv:
            self.qkv = linear(config, config.width, inner + 2 * keys, config.qkv_bias, rngs, **dtypes)
        else:
            self.q = linear(config, config.width, inner, config.qkv_bias, rngs, **dtypes)
            self.k = linear(config, config.width, keys, config.qkv_bias, rngs, **dtypes)
            self.v = linear(config, config.width, keys, config.qkv_bias, rngs, **dtypes)
        if config.qk_norm:
            self.q_norm = Norm(config, rngs, config.dim, **dtypes)
            self.k_norm = Norm(config, rngs, config.dim, **dtypes)
        self.o = linear(config, inner, config.width, config.out_bias, rngs, **dtypes)

    def __call__(
        self,
        x_BSD: Float[Array, "batch length width"],
        context: Context,
        windowed: Bool[Array, ""] | None = None,
        kept: KV | None = None,
    ) -> tuple[Float[Array, "batch length width"], KV | None]:
        """Attention among the tokens of `x`, or to all slots of a cache that they are written into first.

        Returns:
          The output, and the cache as it is then.
        """
        config = self.config
        if config.fused_qkv:
            inner, keys = config.heads * config.dim, config.key_heads * config.dim
            q, k, v = jnp.split(self.qkv(x_BSD), [inner, inner + keys], axis=-1)
        else:
            q, k, v = together(x_BSD, self.q, self.k, self.v)
        q_BSHK, k_BSGK, v_BSGK = self._heads(q), self._heads(k), self._heads(v)
        if config.qk_norm:
            q_BSHK, k_BSGK = self.q_norm(q_BSHK), self.k_norm(k_BSGK)
        rotary = context.rotary
        if rotary is not None:
            if context.local_rotary is not None and config.window is not None:
                local = context.local_rotary
                rotary = local if windowed is None else local.where(windowed, rotary)
            q_BSHK, k_BSGK = rotary(q_BSHK), rotary(k_BSGK)
        options = {"scale": config.query_scale, "softcap": config.softcap, "bias": context.bias}
        if kept is not None:
            write = lambda slots, new: jax.lax.dynamic_update_slice_in_dim(
                slots, new.astype(slots.dtype).transpose(0, 2, 1, 3), context.offset, axis=2
            )
            kept = KV(write(kept.k, k_BSGK), write(kept.v, v_BSGK))
            segments, slots = context.segments, context.key_segments
            offset = None if isinstance(context.offset, int) and not context.offset else context.offset
            mask = Mask(segments, slots, windowed, offset, causal=config.causal, window=config.window)
            out = heads_first(q_BSHK, kept.k, kept.v, mask, **options)
        else:
            shown: dict[str, Any] = {"segments": context.segments, "window": config.window, "windowed": windowed}
            out = attention(q_BSHK, k_BSGK, v_BSGK, causal=config.causal, **shown, **options)
        return self.o(out.reshape(*x_BSD.shape[:2], -1)), kept

    def read(self, memory: Float[Array, "batch memory width"]) -> KV:
        """Keys and values of a memory."""
        k, v = together(memory, self.k, self.v)
        return KV(*(self._heads(each).transpose(0, 2, 1, 3) for each in (k, v)))

    def cross(
        self, x_BSD: Float[Array, "batch length width"], memory: KV, context: Context
    ) -> Float[Array, "batch length width"]:
        """Attention of `x` to a memory."""
        q_BSHK, segments = self._heads(self.q(x_BSD)), context.segments
        if segments is None:
            segments = jnp.ones(x_BSD.shape[:2], jnp.int32)
        mask = Mask(segments, context.memory_segments)
        out = heads_first(q_BSHK, memory.k, memory.v, mask, self.config.query_scale)
        return self.o(out.reshape(*x_BSD.shape[:2], -1))

    def _heads(self, x: Float[Array, "batch length features"]) -> Float[Array, "batch length heads head_dim"]:
        return x.reshape(*x.shape[:2], -1, self.config.dim)


class MLP(nnx.Module):
    """`down(activation(up(x)))`, or `down(activation(gate(x)) · up(x))`."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs, **dtypes: Any):
        self.config = config
        if config.gated:
            self.gate = linear(config, config.width, config.mlp_width, config.mlp_bias, rngs, **dtypes)
        self.up = linear(config, config.width, config.mlp_width, config.mlp_bias, rngs, **dtypes)
        self.down = linear(config, config.mlp_width, config.width, config.mlp_bias, rngs, **dtypes)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        if not self.config.gated:
            return self.down(PLAIN[self.config.activation](self.up(x)))
        return self.down(GATED[self.config.activation](*together(x, self.gate, self.up)))


class Block(nnx.Module):
    """A Transformer block: attention, attention to a memory if it is a decoder of one, and an MLP."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs, cross: bool = False, **dtypes: Any):
        self.place, self.crosses = config.norm_place, cross
        self.attn_norm = Norm(config, rngs, **dtypes)
        self.attn = Attention(config, rngs, **dtypes)
        if cross:
            self.cross_norm = Norm(config, rngs, **dtypes)
            self.cross_attn = Attention(config, rngs, **dtypes)
        self.mlp_norm = Norm(config, rngs, **dtypes)
        self.mlp = MLP(config, rngs, **dtypes)
        if config.norm_place == "both":
            self.attn_post_norm = Norm(config, rngs, **dtypes)
            self.mlp_post_norm = Norm(config, rngs, **dtypes)

    def __call__(
        self,
        x_BSD: Float[Array, "batch length width"],
        context: Context | None = None,
        windowed: Bool[Array, ""] | None = None,
    ) -> Float[Array, "batch length width"]:
        return self.cached(x_BSD, context or Context(), windowed, None)[0]

    def cached(
        self,
        x_BSD: Float[Array, "batch length width"],
        context: Context,
        windowed: Bool[Array, ""] | None,
        kept: Kept | None,
    ) -> tuple[Float[Array, "batch length width"], Kept | None]:
        """The block on tokens that continue those of a cache.

        Args:
          windowed: whether this layer has the window, where layers differ.
          kept: from the call before; None to keep nothing.
        """
        x_BSD = along(x_BSD)
        out, own = self.attn(self._enter("attn", x_BSD), context, windowed, None if kept is None else kept.own)
        x_BSD = self._leave("attn", x_BSD, out)
        if self.crosses:
            read = kept.memory if kept is not None else None
            memory = self.cross_attn.read(context.memory) if read is None else read
            out = self.cross_attn.cross(self._enter("cross", x_BSD), memory, context)
            x_BSD = self._leave("cross", x_BSD, out)
        x_BSD = self._leave("mlp", x_BSD, self.mlp(self._enter("mlp", x_BSD)))
        return x_BSD, None if kept is None or own is None else Kept(own, kept.memory)

    def _enter(self, branch: str, x: Array) -> Array:
        return by_row(x if self.place == "post" else getattr(self, f"{branch}_norm")(x))

    def _leave(self, branch: str, x: Array, out: Array) -> Array:
        out = between(out)
        if self.place == "post":
            return getattr(self, f"{branch}_norm")(keep(x + out))
        return keep(x + (getattr(self, f"{branch}_post_norm")(out) if self.place == "both" else out))


ConfigType = TypeVar("ConfigType", bound=BlockConfig)


def check_layers(config: ConfigType) -> ConfigType:
    """Raises ValueError if a model's options contradict each other."""
    given: Any = config
    if given.window_layers is not None and len(given.window_layers) != given.layers:
        raise ValueError(f"window_layers has {len(given.window_layers)} entries for {given.layers} layers")
    if given.window_layers is not None and given.window is None:
        raise ValueError("window_layers needs a window")
    if (given.head in ("sequence", "token")) != (getattr(given, "classes", None) is not None):
        raise ValueError(f"head {given.head!r} {'needs' if given.head in ('sequence', 'token') else 'has no'} classes")
    return config


def dtypes_of(config: Any) -> dict[str, Any]:
    """Keyword arguments of a layer from a model config's `dtype` and `param_dtype` names."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def patches_of(images: Float[Array, "batch height width channels"], size: int) -> Float[Array, "batch patches values"]:
    """Non-overlapping square patches, row by row, each flattened."""
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, math.prod(grid.shape[1:3]), -1)
