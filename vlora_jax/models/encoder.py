"""Bidirectional encoder of text: BERT (arXiv 1810.04805) and RoBERTa (1907.11692) by its options."""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vlora_jax.distributed.activations import looked_up
from vlora_jax.errors import ConfigError
from vlora_jax.models.elementwise import ACTIVATIONS
from vlora_jax.models.layers import Block, Context, Norm, StackConfig, check_layers, dtypes_of, linear
from vlora_jax.models.stack import Stack


class EncoderConfig(StackConfig):
    """A text encoder with learned positions and norms after each sum. The defaults are BERT's."""

    norm_eps: float = 1e-12
    norm_place: Literal["pre", "post", "both"] = "post"

    family: Literal["encoder"] = "encoder"
    vocabulary: PositiveInt = 256
    max_positions: PositiveInt = 512
    position_offset: NonNegativeInt = Field(default=0, description="position of the first token; 2 in RoBERTa")
    token_types: PositiveInt = 2
    pooler: bool = Field(default=True, description="tanh of a dense layer on the first token")
    head: Literal["none", "masked_lm", "sequence", "token"] = "none"
    classes: PositiveInt | None = Field(default=None, description="of a sequence or token head")

    @model_validator(mode="after")
    def _check_head(self) -> "EncoderConfig":
        return check_layers(self)


class Encoder(nnx.Module):
    """Embeddings of tokens, positions and types, a norm, a stack of blocks, and a head."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        self.config = config
        dtypes = dtypes_of(config)
        table = lambda rows: nnx.Embed(
            rows, config.width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs, **dtypes
        )
        self.embed, self.positions = table(config.vocabulary), table(config.max_positions)
        self.types = table(config.token_types)
        self.embed_norm = Norm(config, rngs, **dtypes)
        make_block = lambda rngs: Block(config, rngs, **dtypes)
        self.layers = Stack(make_block, config.layers, vertical=config.vertical, remat=config.remat, rngs=rngs)
        if config.pooler:
            self.pooler = linear(config, config.width, config.width, True, rngs, **dtypes)
        if config.head == "masked_lm":
            self.transform = linear(config, config.width, config.width, True, rngs, **dtypes)
            self.transform_norm = Norm(config, rngs, **dtypes)
            self.head_bias = nnx.Param(jnp.zeros((config.vocabulary,), dtypes["param_dtype"]))
        if config.head in ("sequence", "token"):
            self.head = linear(config, config.width, config.classes or 0, True, rngs, **dtypes)

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        segments: Int[Array, "batch length"] | None = None,
        types: Int[Array, "batch length"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch length width"]:
        """The last layer's states.

        Args:
          tokens: token ids.
          segments: 0 for padding; tokens see only their own segment.
          types: of each token (first or second of a pair); 0 if not given.
          train: chooses the cheaper form of a vertical stack for training.

        Raises:
          ConfigError: more tokens than learned positions.
        """
        config, length = self.config, tokens.shape[1]
        if length + config.position_offset > config.max_positions:
            raise ConfigError(f"{length} tokens, but the model has {config.max_positions - config.position_offset}")
        types = jnp.zeros_like(tokens) if types is None else types
        x = looked_up(self.embed(tokens)) + self.types(types)
        x = self.embed_norm(x + self.positions(jnp.arange(length) + config.position_offset)[None])
        return self.layers(x, Context(segments), train=train)

    def pooled(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch width"]:
        """The first token's state, through the pooler if there is one."""
        return jnp.tanh(self.pooler(hidden[:, 0])) if self.config.pooler else hidden[:, 0]

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch scores"]:
        """Scores of the head, in float32, of states or of pooled ones."""
        if self.config.head == "masked_lm":
            h = self.transform_norm(ACTIVATIONS[self.config.activation](self.transform(hidden)))
            bias = self.head_bias.get_value().astype(jnp.float32)
            return self.embed.attend(h).astype(jnp.float32) + bias.reshape((1,) * (h.ndim - 1) + (-1,))
        return self.head(hidden).astype(jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        segments: Int[Array, "batch length"] | None = None,
        types: Int[Array, "batch length"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "..."]:
        """Scores `(batch, classes)` or `(batch, length, …)`; the states where there is no head."""
        hidden = self.hidden(tokens, segments, types, train=train)
        if self.config.head == "none":
            return hidden
        return self.logits(self.pooled(hidden) if self.config.head == "sequence" else hidden)
