"""What a set of texts holds, for people to look at before a run begins."""

from dataclasses import dataclass

Piece = tuple[str, bool]  # text, and whether the loss counts it


@dataclass(frozen=True)
class Part:
    """The training or the held-out rows.

    Attributes:
      documents: rows of the source that are used.
      tokens: predictions, padding not counted.
      supervised: those that the loss counts; None where the loss is of rows, not of tokens.
      longest, median: tokens a document.
      ends: documents that end with a supervised eos.
      rows: rows of a batch that the documents make.
    """

    documents: int
    tokens: int
    supervised: int | None
    longest: int
    median: int
    ends: int
    rows: int

    @property
    def share(self) -> float:
        return (self.supervised or 0) / max(self.tokens, 1)


@dataclass(frozen=True)
class Summary:
    """A set of texts.

    Attributes:
      length: tokens a row of a batch.
      notes: which columns are read, what was left out or cut.
      warnings: what is likely a mistake.
      examples: a few training rows, decoded.
    """

    train: Part
    held_out: Part
    length: int
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    examples: tuple[tuple[Piece, ...], ...]
