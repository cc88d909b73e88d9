"""A model's marks on held-out data: loss and accuracy, and answers compared with what they should be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vlora_jax.adapters.adapter import Adapter
from vlora_jax.adapters.bind import bind
from vlora_jax.data.dataset import DataSet
from vlora_jax.data.pipeline import held_out_batches
from vlora_jax.errors import DataError
from vlora_jax.generation.generate import generate
from vlora_jax.generation.text import Codec
from vlora_jax.training.loss import LOSSES, means
from vlora_jax.training.opened import Opened


@dataclass(frozen=True)
class Marks:
    """Means over held-out data.

    Attributes:
      loss: in nats, a token or an example.
      accuracy: share of tokens or examples that are right.
      weight: how many there are.
    """

    loss: float
    accuracy: float
    weight: float


def held_out_marks(opened: Opened, adapters: Sequence[Adapter], data: DataSet, batch: int) -> Marks:
    """Loss and accuracy over all held-out data, the adapters' changes added up."""
    loss = LOSSES[data.task]

    @jax.jit
    def sums(base: Any, adapters: Any, batch: Any) -> Any:
        micro = jax.tree.map(lambda leaf: leaf[0], batch)
        return loss(bind(opened.graphdef, base, *adapters), micro, False)

    return Marks(**means([sums(opened.base, tuple(adapters), each) for each in held_out_batches(data, batch)]))


@dataclass(frozen=True)
class Answer:
    """One question, what was answered and what should be; `right` by what is compared."""

    prompt: str
    said: str
    expected: str
    right: bool


def answers(
    opened: Opened,
    adapters: Sequence[Adapter],
    data: DataSet,
    codec: Codec,
    *,
    count: int,
    new: int,
    after: str | None = None,
    batch: int = 8,
    notify: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answers to held-out prompts, greedy, compared with their completions.

    Args:
      count: of the prompts, evenly spread; all there are if fewer.
      new: new tokens an answer at most.
      after: compare only what stands after this, as after GSM8K's `"####"`; all if not given.
      batch: prompts at a time.
      notify: told how many are done.

    Raises:
      DataError: the data are no prompts with completions.
    """
    pairs = prompts_of(data)
    places = np.linspace(0, len(pairs) - 1, min(count, len(pairs))).astype(int)
    chosen = [pairs[place] for place in places]
    done: list[Answer] = []
    for start in range(0, len(chosen), batch):
        some = chosen[start : start + batch]
        out = generate(opened.graphdef, opened.base, [p for p, _ in some], list(adapters), most=new, eos=codec.eos)
        for (prompt, expected), said in zip(some, out.tokens, strict=True):
            texts = codec.decode(said), codec.decode(expected)
            right = compared(texts[0], after) == compared(texts[1], after) is not None
            done.append(Answer(codec.decode(prompt), *texts, right))
        notify(len(done))
    return done


def compared(text: str, after: str | None) -> str | None:
    """What of an answer counts, in one spelling of its blanks; None where the marker is missing."""
    if after is None:
        return " ".join(text.split())
    _, found, rest = text.rpartition(after)
    return " ".join(rest.split()).rstrip(".") if found else None


def prompts_of(data: DataSet) -> list[tuple[list[int], list[int]]]:
    """Held-out prompts and completions as tokens.

    Raises:
      DataError: the data have other examples, or learn from whole texts.
    """
    source: Any = data.held_out
    if data.task == "seq2seq":
        return [(p.tolist(), a.tolist()) for p, a in zip(source.prompts.tokens, source.answers.tokens, strict=True)]
    documents = getattr(source, "documents", None)
    if data.task != "next_token" or documents is None:
        raise DataError(f"{data.name} has no prompts with completions to compare answers with")
    pairs = []
    for index in range(len(documents)):
        tokens, supervised = documents[index]
        first = int(np.argmax(supervised))
        if first == 0 or not supervised[first:].all():
            raise DataError(f"{data.name}: its texts are not a prompt and a completion each (data.loss=all, or chats)")
        pairs.append((tokens[:first].tolist(), tokens[first:].tolist()))
    return pairs
