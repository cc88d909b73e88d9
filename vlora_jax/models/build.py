"""The models by their configs."""

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from vlora_jax.adapters.sites import split
from vlora_jax.models.decoder import Decoder, DecoderConfig
from vlora_jax.models.encoder import Encoder, EncoderConfig
from vlora_jax.models.matrix import Matrix, MatrixConfig
from vlora_jax.models.seq2seq import Seq2Seq, Seq2SeqConfig
from vlora_jax.models.vit import ViT, ViTConfig

ModelConfig = ViTConfig | DecoderConfig | EncoderConfig | Seq2SeqConfig | MatrixConfig
MODELS: dict[type, Callable[..., nnx.Module]] = {
    ViTConfig: ViT,
    DecoderConfig: Decoder,
    EncoderConfig: Encoder,
    Seq2SeqConfig: Seq2Seq,
    MatrixConfig: Matrix,
}


def build(config: ModelConfig, key: PRNGKeyArray) -> nnx.Module:
    """A model with parameters drawn from `key`."""
    return MODELS[type(config)](config, nnx.Rngs(key))


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's graph, and its parameters as shapes; traced once for a config."""
    graphdef, shapes = _abstract(config)  # pyright: ignore[reportArgumentType] # frozen: pydantic makes it hashable
    bare = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # without the mesh that the first call saw
    return graphdef, jax.tree.map(bare, shapes)


@functools.lru_cache(maxsize=8)
def _abstract(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return split(nnx.eval_shape(lambda: build(config, jax.random.key(0))))
