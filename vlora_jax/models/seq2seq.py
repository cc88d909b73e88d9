"""Encoder–decoder with relative position biases: T5 (arXiv 1910.10683) and its version 1.1 by its options."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vlora_jax.distributed.activations import looked_up
from vlora_jax.models.layers import Block, Context, Kept, Norm, StackConfig, check_layers, dtypes_of, linear
from vlora_jax.models.stack import Stack


class Seq2SeqConfig(StackConfig):
    """An encoder and a decoder that reads it. The defaults are T5's."""

    norm: Literal["layer", "rms"] = "rms"
    activation: Literal["gelu", "gelu_tanh", "silu", "relu"] = "relu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_scale: PositiveFloat | None = 1.0

    family: Literal["seq2seq"] = "seq2seq"
    vocabulary: PositiveInt = 256
    layers: PositiveInt = Field(default=6, description="of the encoder")
    decoder_layers: PositiveInt = 6
    buckets: PositiveInt = Field(default=32, description="of relative distances")
    max_distance: PositiveInt = Field(default=128, description="distances from here on share a bucket")
    tied_head: bool = Field(default=True, description="the head is the embedding, transposed")
    head_scale: bool = Field(default=True, description="divide states by √width before the head (T5 1.0)")
    start_token: NonNegativeInt = Field(default=0, description="what the decoder reads first")
    head: Literal["lm"] = "lm"

    @model_validator(mode="after")
    def _check_vertical(self) -> "Seq2SeqConfig":
        if self.vertical is not None:
            self.vertical.compounds(self.decoder_layers)
        return check_layers(self)


class Seq2Seq(nnx.Module):
    """A shared embedding, an encoder, a decoder with cross-attention, and a head over the vocabulary."""

    def __init__(self, config: Seq2SeqConfig, rngs: nnx.Rngs):
        self.config = config
        dtypes = dtypes_of(config)
        init = nnx.initializers.normal(0.02)
        table = lambda rows, width: nnx.Embed(rows, width, embedding_init=init, rngs=rngs, **dtypes)
        self.embed = table(config.vocabulary, config.width)
        causal = config.model_copy(update={"causal": True})
        make_encoder = lambda rngs: Block(config, rngs, **dtypes)
        make_decoder = lambda rngs: Block(causal, rngs, cross=True, **dtypes)
        options: dict[str, Any] = {"vertical": config.vertical, "remat": config.remat, "rngs": rngs}
        self.encoder = Stack(make_encoder, config.layers, **options)
        self.decoder = Stack(make_decoder, config.decoder_layers, **options)
        self.encoder_bias, self.decoder_bias = table(config.buckets, config.heads), table(config.buckets, config.heads)
        self.encoder_norm, self.decoder_norm = Norm(config, rngs, **dtypes), Norm(config, rngs, **dtypes)
        if not config.tied_head:
            self.head = linear(config, config.width, config.vocabulary, False, rngs, **dtypes)

    def memory(
        self,
        tokens: Int[Array, "batch length"],
        segments: Int[Array, "batch length"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch length width"]:
        """What the decoder reads of the input tokens."""
        places = jnp.arange(tokens.shape[1])
        context = Context(segments, bias=self._bias(self.encoder_bias, places, places, both_ways=True))
        return self.encoder_norm(self.encoder(looked_up(self.embed(tokens)), context, train=train))

    def hidden(
        self,
        tokens: Int[Array, "batch length"],
        targets_in: Int[Array, "batch targets"],
        segments: Int[Array, "batch length"] | None = None,
        target_segments: Int[Array, "batch targets"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch targets width"]:
        """States of the decoder before the head.

        Args:
          tokens: what the encoder reads.
          targets_in: what the decoder reads: the targets one place to the right, `start_token` first.
          segments, target_segments: 0 for padding; tokens see only their own segment, also across.
          train: chooses the cheaper form of a vertical stack for training.
        """
        places = jnp.arange(targets_in.shape[1])
        context = Context(
            target_segments,
            bias=self._bias(self.decoder_bias, places, places, both_ways=False),
            memory=self.memory(tokens, segments, train=train),
            memory_segments=segments,
        )
        return self.decoder_norm(self.decoder(looked_up(self.embed(targets_in)), context, train=train))

    def extend(
        self,
        tokens: Int[Array, "batch length"],
        slots: Int[Array, "batch slots"],
        kept: Any,
        offset: Int[Array, ""] | int,
        memory_segments: Int[Array, "batch memory"] | None,
        blocks: list | None = None,
    ) -> tuple[Float[Array, "batch length width"], Any]:
        """States of decoder tokens that continue those of a cache, and the cache; see `Decoder.extend`.

        Args:
          kept: with what cross-attention reads of the memory in it, from `read`.
        """
        places = offset + jnp.arange(tokens.shape[1])
        bias = self._bias(self.decoder_bias, places, jnp.arange(slots.shape[1]), both_ways=False)
        segments = jnp.ones_like(tokens)
        context = Context(segments, slots, bias=bias, memory_segments=memory_segments, offset=offset)
        x = self.embed(tokens)
        if blocks is None:
            step = lambda block, h, own: block.cached(h, context, None, own)
            x, kept = self.decoder.thread(x, kept, step)
            return self.decoder_norm(x), kept
        after: list[Kept] = []
        for block, own in zip(blocks, kept, strict=True):
            x, own = block.cached(x, context, None, own)
            after.append(own)
        return self.decoder_norm(x), after

    def read(self, memory: Float[Array, "batch length width"]) -> Any:
        """Keys and values of the memory for every decoder layer, with a layer axis first."""
        return self.decoder.thread(None, None, lambda block, h, _: (h, block.cross_attn.read(memory)))[1]

    def logits(self, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocabulary"]:
        """Scores over the vocabulary, in float32."""
        if self.config.head_scale:
            hidden = hidden * self.config.width**-0.5
        scores = self.embed.attend(hidden) if self.config.tied_head else self.head(hidden)
        return scores.astype(jnp.float32)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        targets_in: Int[Array, "batch targets"],
        segments: Int[Array, "batch length"] | None = None,
        target_segments: Int[Array, "batch targets"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch targets vocabulary"]:
        return self.logits(self.hidden(tokens, targets_in, segments, target_segments, train=train))

    def _bias(self, table: nnx.Embed, queries: Array, keys: Array, both_ways: bool) -> Float[Array, "heads q k"]:
        config = self.config
        places = bucket(keys[None, :] - queries[:, None], config.buckets, config.max_distance, both_ways)
        return table(places).transpose(2, 0, 1).astype(jnp.float32)


def bucket(distance: Int[Array, "q k"], buckets: int, max_distance: int, both_ways: bool) -> Int[Array, "q k"]:
    """T5's bucket of a key's distance from a query: exact for near keys, logarithmic up to `max_distance`.

    Args:
      distance: key place - query place.
      both_ways: half of the buckets are for keys after the query; else those all share bucket 0.
    """
    first = 0
    if both_ways:
        buckets //= 2
        first, distance = jnp.where(distance > 0, buckets, 0), jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    ratio = jnp.log(jnp.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    far = jnp.minimum(exact + (ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return jax.numpy.asarray(first + jnp.where(distance < exact, distance, far))
