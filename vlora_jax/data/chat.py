"""Conversations by the tokenizer's own template, with a mask of the assistant's turns."""

import re
from pathlib import Path
from typing import Any

from vlora_jax.data.columns import columns_of
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.documents import Documents, Gathered
from vlora_jax.data.table import Table
from vlora_jax.data.tokens import eos_id, in_chunks
from vlora_jax.errors import DataError

Span = tuple[int, int]  # characters
SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
WAY_OUT = "give a template with {% generation %} by data.chat_template, or set data.loss=all"


def chat_documents(config: DatasetConfig, table: Table, tokenizer: Any) -> Documents:
    """Each conversation as the template writes it, the assistant's turns supervised.

    A template with `{% generation %}` says itself which those are; for another one, what it adds to the turns before
    and its call for an answer is the answer.

    Raises:
      DataError: there is no template, it refuses a conversation, or it does not show where an answer begins and ends.
    """
    template = template_of(config, tokenizer)
    end = eos_id(tokenizer, config.eos)
    ending = {end, *tokenizer.all_special_ids}
    if not tokenizer.is_fast:
        raise DataError("data.format chat needs a fast tokenizer, which says where in the text each token stands")
    gathered = Gathered()
    row = 0
    for chunk in in_chunks(table.values(columns_of(config, table)["messages"]), "tokenising"):
        conversations = [messages_of(value, table.where(row + place)) for place, value in enumerate(chunk)]
        rendered = []
        for place, turns in enumerate(conversations):
            where = table.where(row + place)
            if config.loss == "all":
                text = render(tokenizer, template, turns, where)
                rendered.append((text, [(0, len(text))]))
            else:
                rendered.append(conversation(tokenizer, template, turns, where))
        written = [text for text, _ in rendered]
        encoded = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for place, (text, spans) in enumerate(rendered):
            ids, starts = encoded["input_ids"][place], [start for start, _ in encoded["offset_mapping"][place]]
            learnt = [any(first <= start < stop for first, stop in spans) for start in starts]
            if conversations[place][-1]["role"] == "assistant":
                answered = end_of(text, conversations[place][-1])
                closed = any(token in ending for token, start in zip(ids, starts, strict=True) if start >= answered)
                ids, learnt = (ids, learnt) if closed else ([*ids, end], [*learnt, True])
            gathered.add(row, ids, learnt)
            row += 1
    return gathered.documents()


def end_of(text: str, turn: dict[str, Any]) -> int:
    """Where in a conversation's text the last turn's content ends; what follows is the template's."""
    content = (turn.get("content") or "").strip()
    found = text.rfind(content) if content else -1
    return len(text) if found < 0 else found + len(content)


def template_of(config: DatasetConfig, tokenizer: Any) -> str:
    """The Jinja template: a file's, or the tokenizer's."""
    if config.chat_template is not None:
        try:
            return Path(config.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data.chat_template {config.chat_template} cannot be read: {error}") from None
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template; give a Jinja file by data.chat_template")
    return tokenizer.get_chat_template()


def messages_of(value: Any, where: str) -> list[dict[str, Any]]:
    """A conversation as `{"role", "content"}` turns; those of ShareGPT (`from`, `value`) are renamed.

    Raises:
      DataError: it is something else.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: a conversation is a list of turns, not {str(value)[:40]!r}")
    turns = []
    for number, turn in enumerate(value, 1):
        if isinstance(turn, dict) and {"from", "value"} <= set(turn):
            turn = {"role": SHAREGPT.get(turn["from"], turn["from"]), "content": turn["value"]}
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise DataError(f"{where}: turn {number} has no role; turns are {{role, content}}")
        if not isinstance(turn.get("content"), str) and not turn.get("tool_calls"):
            raise DataError(f"{where}: the content of turn {number} is no text")
        turns.append({key: given for key, given in turn.items() if given is not None})
    return turns


def render(tokenizer: Any, template: str, turns: list[dict[str, Any]], where: str, ask: bool = False) -> str:
    """A conversation's text; `ask` adds the call for an answer."""
    try:
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the chat template refuses it: {' '.join(str(error).split())[:200]}") from None


def conversation(tokenizer: Any, template: str, turns: list[dict[str, Any]], where: str) -> tuple[str, list[Span]]:
    """A conversation's text and where in it the assistant's turns stand.

    Raises:
      DataError: the template does not show that.
    """
    if GENERATION.search(template):
        return generations(tokenizer, template, turns, where)
    whole = render(tokenizer, template, turns, where)
    spans = []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        if number == 0:
            raise DataError(f"{where}: begins with the assistant's turn, before which nothing is asked; {WAY_OUT}")
        before = render(tokenizer, template, turns[:number], where, ask=True)
        until = render(tokenizer, template, turns[: number + 1], where)
        if not until.startswith(before):
            before = render(tokenizer, template, turns[:number], where)
        if not (until.startswith(before) and whole.startswith(until)):
            raise DataError(
                f"{where}: the chat template writes the turns up to {number + 1} in another way when more follow, so "
                f"that the assistant's tokens cannot be told; {WAY_OUT}"
            )
        spans.append((len(before), len(until)))
    return whole, spans


def generations(tokenizer: Any, template: str, turns: list[dict[str, Any]], where: str) -> tuple[str, list[Span]]:
    """What the template itself marks by `{% generation %}`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, marked = render_jinja_template(
            conversations=[turns],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise what they like
        raise DataError(f"{where}: the chat template refuses it: {' '.join(str(error).split())[:200]}") from None
    return texts[0], [(int(start), int(stop)) for start, stop in marked[0]]
