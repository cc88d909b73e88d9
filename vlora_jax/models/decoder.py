"""Decoder language model: Llama-style by default, GPT-2-, Qwen- or Gemma-style by its options."""

from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from vlora_jax.distributed.activations import looked_up, whole
from vlora_jax.errors import ConfigError
from vlora_jax.models.layers import (
    LLAMA_STYLE,
    Block,
    Context,
    Kept,
    Norm,
    StackConfig,
    check_layers,
    dtypes_of,
    linear,
    position_tables,
    window_flags,
)
from vlora_jax.models.stack import Stack


class DecoderConfig(StackConfig):
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
    max_positions: PositiveInt | None = Field(
        default=None, description="learned positions up to this length; None: none"
    )
    tied_head: bool = Field(default=True, description="the head is the embedding, transposed")
    embed_scale: bool = Field(default=False, description="multiply embeddings by √width (Gemma)")
    logit_softcap: PositiveFloat | None = Field(default=None, description="bound of an LM head's logits (Gemma 2)")
    head: Literal["lm", "sequence", "token", "none"] = Field(
        default="lm", description="scores of the next token, of a sequence by its last token, or of every token"
    )
    classes: PositiveInt | None = Field(default=None, description="of a sequence or token head")

    @model_validator(mode="after")
    def _check_head(self) -> "DecoderConfig":
        return check_layers(self)


class Decoder(nnx.Module):
    """Token embedding, a stack of causal blocks, a final norm and a head."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        dtypes = dtypes_of(config)
        init = nnx.initializers.normal(0.02)
        self.embed = nnx.Embed(config.vocabulary, config.width, embedding_init=init, rngs=rngs, **dtypes)
        if config.max_positions:
            self.positions = nnx.Embed(config.max_positions, config.width, embedding_init=init, rngs=rngs, **dtypes)
        make_block = lambda rngs: Block(config, rngs, **dtypes)
        self.layers = Stack(make_block, config.layers, vertical=config.vertical, remat=config.remat, rngs=rngs)
        self.norm = Norm(config, rngs, **dtypes)
        if config.head == "lm" and not config.tied_head:
            self.head = linear(config, config.width, config.vocabulary, False, rngs, **dtypes)
        if config.head in ("sequence", "token"):
            self.head = linear(config, config.width, config.classes or 0, config.head == "token", rngs, **dtypes)

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
        x, context = self._enter(tokens, positions, segments)
        return whole(self.norm(self.layers(x, context, each=window_flags(self.config), train=train)))

    def extend(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"],
        segments: Int[Array, "batch length"],
        slots: Int[Array, "batch slots"],
        kept: Any,
        offset: Int[Array, ""] | int,
        blocks: list | None = None,
    ) -> tuple[Float[Array, "batch length width"], Any]:
        """States before the head of tokens that continue those of a cache, and the cache with them in it.

        Args:
          segments: of these tokens, 0 for padding.
          slots: segments of all slots of the cache, these tokens' included; 0 where nothing was written.
          kept: a `Kept` with a layer axis first, or one for each block.
          offset: the slot of the first token.
          blocks: the layers from `Stack.apart`, to be run without a loop.
        """
        x, context = self._enter(tokens, positions, segments, slots, offset)
        flags = window_flags(self.config)
        if blocks is None:
            step = lambda block, h, own: block.cached(h, context, *own)
            x, kept = self.layers.thread(x, (flags, kept), step)
            return self.norm(x), kept
        after: list[Kept] = []
        for index, block in enumerate(blocks):
            x, own = block.cached(x, context, None if flags is None else flags[index], kept[index])
            after.append(own)
        return self.norm(x), after

    def _enter(self, tokens: Array, positions: Any, segments: Any, slots: Any = None, offset: Any = 0) -> tuple:
        config = self.config
        x = looked_up(self.embed(tokens))
        if config.embed_scale:
            x = x * jnp.asarray(config.width**0.5, x.dtype)
        at = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        if config.max_positions:
            if positions is None and tokens.shape[1] > config.max_positions:
                raise ConfigError(f"{tokens.shape[1]} tokens, but max_positions is {config.max_positions}")
            x = x + self.positions(at)
        rotary, local = position_tables(config, at)
        return x, Context(segments, slots, rotary, local, offset=offset)

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Scores of the head, in float32."""
        config = self.config
        scores = self.embed.attend(hidden) if config.head == "lm" and config.tied_head else self.head(hidden)
        scores = scores.astype(jnp.float32)
        if config.logit_softcap is None or config.head != "lm":
            return scores
        return config.logit_softcap * jnp.tanh(scores / config.logit_softcap)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        segments: Int[Array, "batch length"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "..."]:
        """Scores `(batch, length, vocabulary)`, of a sequence head `(batch, classes)`; states without a head."""
        hidden = self.hidden(tokens, positions, segments, train=train)
        if self.config.head == "none":
            return hidden
        return self.logits(last_real(hidden, segments) if self.config.head == "sequence" else hidden)


def last_real(
    hidden: Float[Array, "batch length width"], segments: Int[Array, "batch length"] | None
) -> Float[Array, "batch width"]:
    """The state of each row's last token that is no padding (segment 0)."""
    if segments is None:
        return hidden[:, -1]
    last = jnp.where(segments > 0, jnp.arange(segments.shape[1])[None], 0).max(axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
