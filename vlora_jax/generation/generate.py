"""Generation: one compiled prefill, one compiled loop that decodes with a cache of keys and values.

Prompts of different length are padded on the left, so that every row writes the same slot of the cache; padding is
a segment of its own, which no token sees. Each row of a batch may use its own adapter.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int, Key, PRNGKeyArray

from vlora_jax.adapters.adapter import Adapter, stack_adapters
from vlora_jax.adapters.bind import bind
from vlora_jax.adapters.trees import Tree
from vlora_jax.errors import ConfigError, DataError
from vlora_jax.generation.sampling import Sampling, next_tokens
from vlora_jax.models.decoder import Decoder
from vlora_jax.models.layers import KV, Kept
from vlora_jax.models.seq2seq import Seq2Seq
from vlora_jax.vertical.expand import expand

BUCKET = 32  # prompts are padded to a multiple of this, so that few lengths are compiled


@dataclass(frozen=True)
class Generated:
    """What came out.

    Attributes:
      tokens: of each prompt, the new ones up to and with the end-of-sequence token, if it came.
      finished: whether it came.
    """

    tokens: list[list[int]]
    finished: list[bool]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Where decoding stands.

    Attributes:
      step: new tokens so far.
      scores: of each row's next token, `(batch, vocabulary)`.
      out: new tokens, `(batch, most new tokens)`.
      finished: rows that have ended.
      kept: the cache.
      slots: segments of its slots, `(batch, slots)`.
    """

    step: Any
    scores: Any
    out: Any
    finished: Any
    kept: Any
    slots: Any


def generate(
    graphdef: nnx.GraphDef,
    base: Tree,
    prompts: Any,
    adapters: Adapter | Sequence[Adapter] | None = None,
    *,
    rows: Sequence[int] | None = None,
    most: int = 128,
    eos: Sequence[int] = (),
    sampling: Sampling | None = None,
    key: PRNGKeyArray | None = None,
) -> Generated:
    """Continue prompts.

    Args:
      graphdef, base: a decoder with a language-model head, or an encoder–decoder, which answers the prompts.
      prompts: token ids, a sequence or array for each prompt.
      adapters: one or several, whose changes add up.
      rows: instead of adding up, `adapters[rows[i]]` serves prompt i, and -1 the base alone.
      most: new tokens a prompt at most.
      eos: tokens that end an answer.
      sampling: greedy if not given.
      key: of sampling. A row's draws depend on its place in the batch and the key alone.

    Raises:
      DataError: there is no prompt, or an empty one for a decoder, or a token outside the vocabulary.
      ConfigError: the model can't generate, `rows` don't fit, or prompts and new tokens exceed learned positions.

    >>> from vlora_jax import split
    >>> from vlora_jax.models.decoder import DecoderConfig
    >>> small = DecoderConfig(vocabulary=16, width=8, heads=2, mlp_width=16, layers=2)
    >>> graphdef, base = split(Decoder(small, nnx.Rngs(0)))
    >>> [len(new) for new in generate(graphdef, base, [[1, 2, 3], [4]], most=5).tokens]
    [5, 5]
    """
    graphdef, base = expand(graphdef, base)
    config, prompts = model_config(graphdef, base), as_tokens(prompts)
    check_prompts(config, prompts, most)
    several = () if adapters is None else (adapters,) if isinstance(adapters, Adapter) else tuple(adapters)
    index = None
    if rows is not None:
        if len(rows) != len(prompts):
            raise ConfigError(f"rows {list(rows)} are {len(rows)} for {len(prompts)} prompts; give one a prompt")
        beyond = next((row for row in rows if not -1 <= row < len(several)), None)
        if beyond is not None or not several:
            raise ConfigError(f"rows name adapter {beyond}, and there are {len(several)}; count from 0, -1 is none")
        several, index = (stack_adapters(several),), jnp.asarray(rows, jnp.int32)
    tokens, lengths = padded(prompts)
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(prompts))
    state = prefill(graphdef, base, several, index, tokens, lengths, most)
    state = decode(
        graphdef, base, several, index, state, lengths, keys, tokens.shape[1], tuple(eos), sampling or Sampling()
    )
    return collect(state, eos)


def collect(state: State, eos: Sequence[int]) -> Generated:
    """New tokens as lists, each cut after its end."""
    out, finished = np.asarray(state.out), np.asarray(state.finished)
    lists, steps = [], int(state.step)
    for row, ended in zip(out[:, :steps].tolist(), finished, strict=True):
        end = next(place for place, token in enumerate(row) if token in eos) + 1 if ended else len(row)
        lists.append(row[:end])
    return Generated(lists, finished.tolist())


def model_config(graphdef: nnx.GraphDef, base: Tree) -> Any:
    """The config of a model that generates.

    Raises:
      ConfigError: it doesn't.
    """
    model = nnx.merge(graphdef, base)
    config = getattr(model, "config", None)
    if not isinstance(model, Decoder | Seq2Seq) or getattr(config, "head", None) != "lm":
        what = f"{type(model).__name__} with head {getattr(config, 'head', None)!r}"
        raise ConfigError(f"only a model with a language-model head generates text, not {what}")
    return config


def as_tokens(prompts: Any) -> list[list[int]]:
    """Prompts as lists of token ids, also from arrays.

    Raises:
      DataError: they are something else.
    """
    try:
        arrays = [np.asarray(prompt) for prompt in prompts]
    except (TypeError, ValueError):
        arrays = [np.asarray("")]
    for array in arrays:
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise DataError("prompts must be lists of token ids, one list a prompt, such as a tokenizer's input_ids")
    return [array.tolist() for array in arrays]


def check_prompts(config: Any, prompts: Sequence[Sequence[int]], most: int) -> None:
    """Raises DataError or ConfigError if prompts can't be continued."""
    if not prompts:
        raise DataError("there is no prompt")
    if most < 1:
        raise ConfigError(f"{most} new tokens are asked for; at least 1")
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {place} has no token; begin it with the tokenizer's bos token")
        beyond = next((token for token in prompt if not 0 <= token < config.vocabulary), None)
        if beyond is not None:
            raise DataError(f"prompt {place} has token {beyond}, the model's vocabulary {config.vocabulary}")
    longest, positions = max(map(len, prompts)), getattr(config, "max_positions", None)
    if positions and longest + most > positions:
        raise ConfigError(f"{longest} prompt and {most} new tokens exceed the model's {positions} positions")


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Int[Array, "batch length"], Int[Array, "batch"]]:
    """Prompts with zeros on their left, and their lengths."""
    length = -(-max(map(len, prompts)) // BUCKET) * BUCKET
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


@functools.partial(jax.jit, static_argnames=("graphdef", "most"))
def prefill(
    graphdef: nnx.GraphDef,
    base: Tree,
    adapters: tuple[Adapter, ...],
    rows: Int[Array, "batch"] | None,
    tokens: Int[Array, "batch length"],
    lengths: Int[Array, "batch"],
    most: int,
) -> State:
    """Read the prompts; the state before the first new token."""
    model: Any = bind(graphdef, base, *adapters, rows=rows)
    batch, length = tokens.shape
    real = (jnp.arange(length)[None] >= length - lengths[:, None]).astype(jnp.int32)
    if isinstance(model, Seq2Seq):
        memory = model.read(model.memory(tokens, real))
        slots = jnp.zeros((batch, 1 + most), jnp.int32).at[:, 0].set(1)
        kept = Kept(empty_cache(model.config, model.config.decoder_layers, batch, 1 + most), memory)
        first = jnp.full((batch, 1), model.config.start_token, jnp.int32)
        hidden, kept = model.extend(first, slots, kept, 0, real)
    else:
        slots = jnp.pad(real, ((0, 0), (0, most)))
        kept = Kept(empty_cache(model.config, model.config.layers, batch, length + most))
        positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
        hidden, kept = model.extend(tokens, positions, real, slots, kept, 0)
    scores = model.logits(hidden[:, -1])
    return State(
        jnp.int32(0), scores, jnp.zeros((batch, most), jnp.int32), jnp.zeros(batch, bool), unstacked(kept), slots
    )


@functools.partial(jax.jit, static_argnames=("graphdef", "prompt", "eos", "sampling"), donate_argnames=("state",))
def decode(
    graphdef: nnx.GraphDef,
    base: Tree,
    adapters: tuple[Adapter, ...],
    rows: Int[Array, "batch"] | None,
    state: State,
    lengths: Int[Array, "batch"],
    keys: Key[Array, "batch"],
    prompt: int,
    eos: tuple[int, ...],
    sampling: Sampling,
) -> State:
    """Decode until every row has ended, or the room for new tokens is full.

    Args:
      lengths: of the prompts.
      keys: of sampling, one a row.
      prompt: length of the padded prompts.
    """
    model: Any = bind(graphdef, base, *adapters, rows=rows)
    encodes = isinstance(model, Seq2Seq)
    # On CPU a product with a slice of stacked kernels copies the slice first, for every token anew.
    blocks = (model.decoder if encodes else model.layers).apart() if apart() else None
    most, before = state.out.shape[1], 1 if encodes else prompt
    memory_segments = (jnp.arange(prompt)[None] >= prompt - lengths[:, None]).astype(jnp.int32)

    def step(state: State) -> State:
        draw = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
        token = jnp.where(state.finished, 0, next_tokens(state.scores, sampling, draw))
        out = jax.lax.dynamic_update_slice(state.out, token[:, None], (0, state.step))
        ended = functools.reduce(jnp.logical_or, (token == each for each in eos), jnp.zeros_like(state.finished))
        finished, offset = state.finished | ended, before + state.step
        slots = jax.lax.dynamic_update_slice(state.slots, jnp.ones_like(token)[:, None], (0, offset))
        if encodes:
            hidden, kept = model.extend(token[:, None], slots, state.kept, offset, memory_segments, blocks)
        else:
            positions, real = (lengths + state.step)[:, None], jnp.ones_like(token)[:, None]
            hidden, kept = model.extend(token[:, None], positions, real, slots, state.kept, offset, blocks)
        return State(state.step + 1, model.logits(hidden[:, -1]), out, finished, kept, slots)

    return jax.lax.while_loop(lambda state: (state.step < most) & ~state.finished.all(), step, state)


def apart() -> bool:
    """Whether decoding runs its layers one after the other in the program instead of in a loop."""
    return jax.default_backend() == "cpu"


def empty_cache(config: Any, layers: int, batch: int, slots: int) -> KV:
    """Keys and values of all layers, nothing written."""
    shape = (layers, batch, config.key_heads, slots, config.dim)
    return KV(jnp.zeros(shape, jnp.dtype(config.dtype)), jnp.zeros(shape, jnp.dtype(config.dtype)))


def unstacked(kept: Kept) -> Any:
    """A cache as the decode loop takes it: a list of the layers' own, or stacked."""
    if not apart():
        return kept
    return [jax.tree.map(lambda leaf: leaf[i], kept) for i in range(kept.own.k.shape[0])]  # noqa: B023
