"""One exception class per kind of mistake, so that callers and the command line can tell them apart.

Every message is one line that names the thing, the reason and the way out; the command line prints it
without a traceback and exits with the class's `exit_code` (2: the input is wrong, 1: the run failed).
"""

import difflib
from collections.abc import Iterable


class VloraError(ValueError):
    """Base of every error that this library raises for a user's mistake or a failed run.

    Attributes:
      exit_code: what the command line returns; the class's, unless the case at hand says otherwise.
    """

    exit_code = 2

    def __init__(self, message: str, exit_code: int | None = None):
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class ConfigError(VloraError):
    """An unknown key, an impossible value or fields that contradict each other."""


class TargetError(VloraError):
    """A pattern that selects no site, or a site that no adapter can be attached to."""


class DataError(VloraError):
    """A data set that cannot be read or has nothing to train on."""


class CheckpointError(VloraError):
    """A checkpoint that is missing, torn, or holds other names, shapes, dtypes or values than expected."""


class AdapterFileError(VloraError):
    """A file of an adapter that is damaged, incomplete, or has other keys, shapes or values than it says."""


class ModelFileError(VloraError):
    """A model's files that are missing, damaged, unsafe, or hold other tensors than its config asks for."""


class BaseMismatchError(VloraError):
    """An adapter that was trained on another base model."""


class ResumeError(VloraError):
    """A run directory that cannot be continued with this config."""


class ConversionError(VloraError):
    """A merge or an export that cannot express what it is given."""


class ResourceError(VloraError):
    """Too little memory or disk, or a directory that cannot be written."""


class ProcessError(VloraError):
    """A process of a run with several that does not answer."""

    exit_code = 75  # started again, it may


class NonFiniteError(VloraError):
    """NaN or infinity in a loss or a gradient while training."""

    exit_code = 1


def nearest(word: str, choices: Iterable[str], count: int = 3) -> list[str]:
    """The `count` choices most like `word`, best first; never empty when there are choices.

    >>> nearest("v_porj", ["layers/q_proj", "layers/v_proj", "head"], 1)
    ['layers/v_proj']
    """

    def likeness(choice: str) -> float:
        parts = [choice, *choice.split("/"), *choice.split(".")]
        return max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)

    return sorted(sorted(choices), key=likeness, reverse=True)[:count]


def expect(call: str, name: str, value: object, kind: type) -> None:
    """Raises TypeError, with the call as it should be, if an argument is of another kind: most are swapped ones."""
    if not isinstance(value, kind):
        raise TypeError(f"{call}: {name} must be {article(kind.__name__)}, not {article(type(value).__name__)}")


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "AEIOUaeiou" else f"a {noun}"
