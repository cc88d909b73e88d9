"""The Transformer block that all models here share, and its parts."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from vlora_jax.models.attention import attention, rotate

ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


class BlockConfig(BaseModel):
    """One pre-norm Transformer block. The defaults are a Vision Transformer's; see `LLAMA_STYLE`."""

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
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "gelu"
    gated: bool = Field(default=False, description="SwiGLU-style MLP: activation(gate) · up")
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    fused_qkv: bool = Field(default=False, description="one kernel for query, key and value")
    causal: bool = False
    rotary_theta: PositiveFloat | None = Field(
        default=None, description="rotary position embedding with this base; None: none"
    )
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


class Linear(nnx.Linear):
    """`nnx.Linear` on activations flattened to `(tokens, features)`.

    XLA's CPU backend writes a transposed copy of the cotangent for products over three-dimensional activations.
    """

    def __call__(self, inputs: Float[Array, "*batch in"], out_sharding: Any = None) -> Float[Array, "*batch out"]:
        flat = super().__call__(inputs.reshape(-1, inputs.shape[-1]), out_sharding)
        return flat.reshape(*inputs.shape[:-1], self.out_features)


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


def norm(config: BlockConfig, rngs: nnx.Rngs, **dtypes: Any) -> nnx.Module:
    kind = nnx.LayerNorm if config.norm == "layer" else nnx.RMSNorm
    return kind(config.width, epsilon=config.norm_eps, rngs=rngs, **dtypes)


class Attention(nnx.Module):
    """Multi-head attention with grouped-query heads and rotary positions."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs, **dtypes: Any):
        self.config = config
        inner, keys = config.heads * config.dim, config.key_heads * config.dim
        if config.fused_qkv:
            self.qkv = linear(config, config.width, inner + 2 * keys, config.qkv_bias, rngs, **dtypes)
        else:
            self.q = linear(config, config.width, inner, config.qkv_bias, rngs, **dtypes)
            self.k = linear(config, config.width, keys, config.qkv_bias, rngs, **dtypes)
            self.v = linear(config, config.width, keys, config.qkv_bias, rngs, **dtypes)
        self.o = linear(config, inner, config.width, config.out_bias, rngs, **dtypes)

    def __call__(
        self,
        x_BSD: Float[Array, "batch length width"],
        positions_BS: Int[Array, "batch length"] | None = None,
        segments_BS: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        config, (batch, length, _) = self.config, x_BSD.shape
        if config.fused_qkv:
            inner, keys = config.heads * config.dim, config.key_heads * config.dim
            q, k, v = jnp.split(self.qkv(x_BSD), [inner, inner + keys], axis=-1)
        else:
            q, k, v = together(x_BSD, self.q, self.k, self.v)
        q_BSHK = q.reshape(batch, length, config.heads, config.dim)
        k_BSGK, v_BSGK = (a.reshape(batch, length, config.key_heads, config.dim) for a in (k, v))
        if config.rotary_theta is not None:
            if positions_BS is None:
                positions_BS = jnp.broadcast_to(jnp.arange(length), (batch, length))
            q_BSHK, k_BSGK = (rotate(a, positions_BS, config.rotary_theta) for a in (q_BSHK, k_BSGK))
        out = attention(q_BSHK, k_BSGK, v_BSGK, causal=config.causal, segments=segments_BS)
        return self.o(out.reshape(batch, length, -1))


class MLP(nnx.Module):
    """`down(activation(up(x)))`, or `down(activation(gate(x)) · up(x))`."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs, **dtypes: Any):
        self.config = config
        if config.gated:
            self.gate = linear(config, config.width, config.mlp_width, config.mlp_bias, rngs, **dtypes)
        self.up = linear(config, config.width, config.mlp_width, config.mlp_bias, rngs, **dtypes)
        self.down = linear(config, config.mlp_width, config.width, config.mlp_bias, rngs, **dtypes)

    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        activation = ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            return self.down(activation(self.up(x)))
        gate, up = together(x, self.gate, self.up)
        return self.down(activation(gate) * up)


class Block(nnx.Module):
    """A pre-norm Transformer block: attention and an MLP, each on a residual branch."""

    def __init__(self, config: BlockConfig, rngs: nnx.Rngs, **dtypes: Any):
        self.attn_norm = norm(config, rngs, **dtypes)
        self.attn = Attention(config, rngs, **dtypes)
        self.mlp_norm = norm(config, rngs, **dtypes)
        self.mlp = MLP(config, rngs, **dtypes)

    def __call__(
        self,
        x_BSD: Float[Array, "batch length width"],
        positions_BS: Int[Array, "batch length"] | None = None,
        segments_BS: Int[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), positions_BS, segments_BS)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


def dtypes_of(config: Any) -> dict[str, Any]:
    """Keyword arguments of a layer from a model config's `dtype` and `param_dtype` names."""
    return {"dtype": jnp.dtype(config.dtype), "param_dtype": jnp.dtype(config.param_dtype)}


def patches_of(images: Float[Array, "batch height width channels"], size: int) -> Float[Array, "batch patches values"]:
    """Non-overlapping square patches, row by row, each flattened."""
    batch, height, width, channels = images.shape
    grid = images.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(batch, math.prod(grid.shape[1:3]), -1)
