"""A data set from the user's own rows: read, split, tokenised, fitted and summed up."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vlora_jax.data import columns, pairs
from vlora_jax.data.chat import chat_documents
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.dataset import DataSet, fingerprint
from vlora_jax.data.documents import Documents, fit, row_length, usable
from vlora_jax.data.formats import completion_documents, text_documents
from vlora_jax.data.images import Pictures, Scaling, contents
from vlora_jax.data.packing import Packed, Padded, best_fit
from vlora_jax.data.summary import Part, Piece, Summary
from vlora_jax.data.table import SUFFIXES, Table, read, spread
from vlora_jax.data.tokens import eos_id, load_tokenizer, pad_id, pieces
from vlora_jax.errors import ConfigError, DataError

CAP = 2048  # tokens a row at most, where neither config nor model says
EXAMPLES = 3
READERS: dict[str, Callable[[DatasetConfig, Table, Any], Documents]] = {
    "text": text_documents,
    "completion": completion_documents,
    "chat": chat_documents,
}
HINTS = {
    "text": "are the texts empty?",
    "completion": "are the completions empty?",
    "chat": "has any conversation a turn with role assistant, and does the template mark it?",
}


def load(config: DatasetConfig, tokenizer_source: str | None, model: Any | None = None) -> DataSet:
    """The configured set.

    Args:
      tokenizer_source: directory or hub name of the model, whose tokenizer and image scaling apply where the config
        names no other.
      model: the config of the model that will read it: its family decides between one stack and two, and its fields
        the longest row, the size of images and whether texts of a pair are told by types.

    Raises:
      DataError: the rows cannot be read, are of another kind, or hold nothing to learn from.
      ConfigError: the model is missing where it is needed.
    """
    tables = split(config)
    if config.format == "images":
        return images(config, tables, tokenizer_source, model)
    source = config.tokenizer or tokenizer_source
    if source is None:
        raise ConfigError("data.tokenizer is null and the model brings none: name a directory or a hub name")
    tokenizer = load_tokenizer(source)
    if config.format == "classification":
        return text_classes(config, tables, tokenizer, model)
    if getattr(model, "family", None) == "seq2seq":
        return prompts_with_answers(config, tables, tokenizer, model)
    return sequences(config, tables, tokenizer, model)


def title(config: DatasetConfig) -> str:
    """A set's name, for people."""
    path = config.path if isinstance(config.path, str) else config.path[0]
    return path if config.subset is None else f"{path}/{config.subset}"


def split(config: DatasetConfig) -> tuple[Table, Table]:
    """The rows to train on and those that are held out, limited as configured."""
    table = read(config.path, config.subset, config.split, config.header)
    if isinstance(config.held_out, float | int):
        train, held_out = by_share(table, config.held_out, config)
    elif isinstance(config.held_out, list) or config.held_out.endswith(SUFFIXES):
        train, held_out = table, read(config.held_out, config.subset, config.split, config.header)
    elif isinstance(config.path, list) or config.path.endswith(SUFFIXES):
        raise DataError(f"data.held_out {config.held_out!r}: a file has no splits; give a file or a share, such as 0.1")
    else:
        train, held_out = table, read(config.path, config.subset, config.held_out, config.header)
    few = {"train": spread(train, config.limit), "held_out": spread(held_out, config.held_out_limit)}
    if config.shots is not None:
        label = columns.columns_of(config, train)["label"]
        names = columns.class_names(train, label)
        numbers = columns.classes(few["train"], label, names)
        few["train"] = few["train"].select(columns.few_shot(numbers, names, config.shots, config.shots_seed))
    return few["train"], few["held_out"]


def by_share(table: Table, share: float, config: DatasetConfig) -> tuple[Table, Table]:
    """The rows in two, by a hash of what is in them: equal rows are on the same side, in every run."""
    names = sorted(columns.columns_of(config, table).values())
    digests = [hashlib.sha256() for _ in range(len(table))]
    for name in names:
        for place, (digest, value) in enumerate(zip(digests, table.values(name), strict=True)):
            is_image = config.format == "images" and not isinstance(value, str | int)
            digest.update(contents(value, table.where(place)) if is_image else repr(value).encode())
    shares = np.array([int.from_bytes(digest.digest()[:8], "big") / 2**64 for digest in digests])
    held_out = shares < share
    if held_out.all() or not held_out.any():
        raise DataError(
            f"{table.name}: a share of {share} of {len(table)} rows leaves one side empty; give more rows, another "
            "share, or a file of its own as data.held_out"
        )
    return table.select(np.flatnonzero(~held_out)), table.select(np.flatnonzero(held_out))


def cap_of(model: Any | None) -> int:
    """Tokens that a model can read."""
    positions = getattr(model, "max_positions", None)
    return positions - getattr(model, "position_offset", 0) if positions else CAP


def sequences(config: DatasetConfig, tables: tuple[Table, Table], tokenizer: Any, model: Any | None) -> DataSet:
    """Text, completions or conversations for a decoder."""
    if getattr(model, "family", "decoder") != "decoder" or getattr(model, "head", "lm") != "lm":
        raise ConfigError(f"data.format {config.format} is for a decoder with a head over its vocabulary")
    found = []
    for table in tables:
        documents = READERS[config.format](config, table, tokenizer)
        found.append(usable(documents, table, HINTS[config.format]))
    length = row_length(max(int(each.sizes.max()) for each in found), config.length, cap_of(model))
    found = [fit(each, length, config.overlong, table) for each, table in zip(found, tables, strict=True)]
    found = [usable(each, table, "raise data.length") for each, table in zip(found, tables, strict=True)]
    pad = pad_id(tokenizer)
    if config.packing:
        sources: list[Any] = [Packed(each, best_fit(each.sizes, length), length, pad) for each in found]
    else:
        sources = [Padded(each, length, pad) for each in found]
    parts = [
        part_of(each, len(source), eos_id(tokenizer, config.eos)) for each, source in zip(found, sources, strict=True)
    ]
    shown = [pieces(tokenizer, *found[0][index]) for index in range(min(EXAMPLES, len(found[0])))]
    notes = [note for each in found for note in each.notes]
    if config.packing:
        used = parts[0].tokens / (parts[0].rows * length)
        notes.append(f"packed {parts[0].documents:,} documents into {parts[0].rows:,} rows, {used:.1%} full")
    marks = [each.fingerprint() for each in found]
    return DataSet(
        name=title(config),
        task="next_token",
        train=sources[0],
        held_out=sources[1],
        fingerprint=combined(*marks, length, config.packing),
        facts={"vocabulary": len(tokenizer)},
        summary=summary(config, tables[0], parts, length, notes, shown),
    )


def text_classes(config: DatasetConfig, tables: tuple[Table, Table], tokenizer: Any, model: Any | None) -> DataSet:
    """Texts, or pairs of them, with classes."""
    typed = getattr(model, "token_types", 0) > 1
    sources, names, notes = pairs.labelled(config, tables, tokenizer, cap_of(model), typed)
    shown: list[list[Piece]] = []
    for index in range(min(EXAMPLES, len(sources[0]))):
        ids, label = sources[0].encoded.tokens[index], names[sources[0].labels[index]]
        shown.append([*pieces(tokenizer, ids, [False] * len(ids)), (label, True)])
    parts = [part(each.encoded.sizes, None, 0, len(each)) for each in sources]
    arrays = [np.concatenate(each.encoded.tokens) for each in sources]
    sizes = [each.encoded.sizes for each in sources]
    marks = [fingerprint(*arrays, *sizes, *(each.labels for each in sources))]
    return DataSet(
        name=title(config),
        task="text_classification",
        train=sources[0],
        held_out=sources[1],
        fingerprint=combined(*marks, sources[0].length, *names),
        facts={"vocabulary": len(tokenizer), "classes": len(names), "labels": tuple(names)},
        summary=summary(config, tables[0], parts, sources[0].length, [*notes, balance(sources, names)], shown),
    )


def prompts_with_answers(config: DatasetConfig, tables: tuple[Table, Table], tokenizer: Any, model: Any) -> DataSet:
    """Prompts and completions for an encoder–decoder."""
    if config.format != "completion" or config.packing:
        raise ConfigError("an encoder–decoder learns from data.format completion, with data.packing false")
    sources, notes = pairs.answers(config, tables, tokenizer, cap_of(model), model.start_token)
    shown: list[list[Piece]] = []
    for index in range(min(EXAMPLES, len(sources[0]))):
        ids = [each.tokens[index] for each in (sources[0].prompts, sources[0].answers)]
        shown.append(
            [
                piece
                for side, flag in zip(ids, (False, True), strict=True)
                for piece in pieces(tokenizer, side, [flag] * len(side))
            ]
        )
    end = eos_id(tokenizer, config.eos)
    parts = [
        part(
            each.prompts.sizes + each.answers.sizes,
            each.answers.sizes,
            sum(int(ids[-1] == end) for ids in each.answers.tokens),
            len(each),
        )
        for each in sources
    ]
    arrays = [np.concatenate(side.tokens) for each in sources for side in (each.prompts, each.answers)]
    both = f"prompts of {sources[0].length} tokens, answers of {sources[0].target_length}; counts are of both together"
    sizes = [side.sizes for each in sources for side in (each.prompts, each.answers)]
    return DataSet(
        name=title(config),
        task="seq2seq",
        train=sources[0],
        held_out=sources[1],
        fingerprint=combined(fingerprint(*arrays, *sizes), sources[0].length, sources[0].target_length),
        facts={"vocabulary": len(tokenizer)},
        summary=summary(config, tables[0], parts, sources[0].length, [*notes, both], shown),
    )


def images(config: DatasetConfig, tables: tuple[Table, Table], source: str | None, model: Any | None) -> DataSet:
    """Pictures with classes, of the model's size."""
    if getattr(model, "family", None) != "vit":
        raise ConfigError("data.format images is for model.family vit, whose image size the pictures get")
    assert model is not None
    named = columns.columns_of(config, tables[0])
    names = columns.class_names(tables[0], named["label"])
    scaling = Scaling.of(source)
    sources, marks = [], []
    for table in tables:
        labels = columns.classes(table, named["label"], names)
        values = table.column(named["image"])
        digest = hashlib.sha256(labels.tobytes())
        for place, row in enumerate(table.rows):
            digest.update(contents(values[int(row)], table.where(place)))
        sources.append(Pictures(table, values, labels, model.image, model.channels, scaling))
        marks.append(digest.hexdigest())
    return DataSet(
        name=title(config),
        task="classification",
        train=sources[0],
        held_out=sources[1],
        fingerprint=combined(*marks, model.image, model.channels, scaling),
        facts={"classes": len(names), "image": model.image, "channels": model.channels, "labels": tuple(names)},
    )


def combined(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def balance(sources: Sequence[Any], names: Sequence[str]) -> str:
    """How many rows each class has."""
    counts = np.bincount(sources[0].labels, minlength=len(names))
    shown = ", ".join(f"{name} {count:,}" for name, count in list(zip(names, counts, strict=True))[:10])
    return f"{len(names)} classes: {shown}{', …' if len(names) > 10 else ''}"


def part_of(documents: Documents, rows: int, end: int) -> Part:
    last = documents.starts[1:] - 1
    ends = int((documents.supervised[last] & (documents.tokens[last] == end)).sum())
    return part(documents.sizes, documents.learnt, ends, rows)


def part(sizes: np.ndarray, learnt: np.ndarray | None, ends: int, rows: int) -> Part:
    return Part(
        documents=len(sizes),
        tokens=int(sizes.sum()),
        supervised=None if learnt is None else int(learnt.sum()),
        longest=int(sizes.max()),
        median=int(np.median(sizes)),
        ends=ends,
        rows=rows,
    )


def summary(
    config: DatasetConfig, table: Table, parts: Sequence[Part], length: int, notes: Sequence[str], shown: Sequence[Any]
) -> Summary:
    used = columns.columns_of(config, table)
    read = ", ".join(name if role == name else f"{role} ← {name}" for role, name in used.items())
    unused = [name for name in table.columns if name not in used.values()]
    notes = [f"columns {read}" + (f"; not read: {', '.join(unused)}" if unused else ""), *notes]
    warnings = []
    if parts[0].supervised is not None:
        if parts[0].share < 0.01:
            warnings.append(f"only {parts[0].share:.2%} of the training tokens are supervised: is that meant?")
        if parts[0].ends == 0:
            warnings.append("no training row ends with a supervised eos: the model will not learn to stop")
    return Summary(parts[0], parts[1], length, tuple(notes), tuple(warnings), tuple(map(tuple, shown)))
