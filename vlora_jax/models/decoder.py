"""Decoder language model: Llama-style by default, GPT-2-style by its options."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt

from vlora_jax.errors import ConfigError
from vlora_jax.models.layers import LLAMA_STYLE, Block, BlockConfig, dtypes_of, linear, norm
from vlora_jax.models.stack import Remat, Stack
from vlora_jax.vertical.config import Vertical


class DecoderConfig(BlockConfig):
    """A causal language model: RMSNorm, rotary positions, SwiGLU, no biases, unless told otherwise."""

    norm: Literal["layer", "rms"] = LLAMA_STYLE["norm"]
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = LLAMA_STYLE["activation"]
    gated: bool = LLAMA_STYLE["gated"]
    qkv_bias: bool = LLAMA_STYLE["qkv_bias"]
    out_bias: bool = LLAMA_STYLE["out_bias"]
    mlp_bias: bool = LLAMA_STYLE["mlp_bias"]
    causal: bool = LLAMA_STYLE["causal"]
    rotary_theta: PositiveFloat | None = LLAMA_STYLE["rotary_theta"]

    family: Literal["decoder"] = "decoder"
    vocabulary: PositiveInt = 256
    layers: PositiveInt = 8
    max_positions: PositiveInt | None = Field(
        default=None, description="learned positions up to this length; None: none"
    )
    tied_head: bool = Field(default=True, description="the head is the embedding, transposed")
    vertical: Vertical | None = None
    remat: Remat = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"


class Decoder(nnx.Module):
    """Token embedding, a stack of causal blocks, a final norm and a head over the vocabulary."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        dtypes = dtypes_of(config)
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocabulary, config.width, embedding_init=init, rngs=rngs, **dtypes)
        if config.max_positions:
            self.positions = nnx.Embed(config.max_positions, config.width, embedding_init=init, rngs=rngs, **dtypes)
        make_block = lambda rngs: Block(config, rngs, **dtypes)
        self.layers = Stack(make_block, config.layers, vertical=config.vertical, remat=config.remat, rngs=rngs)
        self.norm = norm(config, rngs, **dtypes)
        if not config.tied_head:
            self.head = linear(config, config.width, config.vocabulary, False, rngs, **dtypes)

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch length width"]:
        """States before the head.

        Args:
          tokens: token ids.
          positions: of each token; counted from 0 in each row if not given.
          segments: tokens see only their own segment; one segment if not given.
          train: chooses the cheaper form of a vertical stack for training.

        Raises:
          ConfigError: more tokens than learned positions.
        """
        x = self.embed(tokens)
        if self.config.max_positions:
            if positions is None and tokens.shape[1] > self.config.max_positions:
                raise ConfigError(f"{tokens.shape[1]} tokens, but max_positions is {self.config.max_positions}")
            at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
            x = x + self.positions(at)
        return self.norm(self.layers(x, positions, segments, train=train))

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Scores over the vocabulary, in float32."""
        scores = self.embed.attend(hidden) if self.config.tied_head else self.head(hidden)
        return scores.astype(jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch length vocabulary"]:
        return self.logits(self.hidden(tokens, positions, segments, train=train))
