"""Where a run stands beside its tensors: what it has seen, what came out, and what of it goes into a checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from vlora_jax.training.job import Job

LIBRARIES = ("vlora_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
HELD_OUT_FAULT = "the held-out loss is not finite"


@dataclass
class Progress:
    """Where a run stands beside its tensors; goes into every checkpoint as it is.

    Attributes:
      seconds: of training, all sessions together, compilation included.
      units: examples, or supervised tokens, learnt from.
      evaluations: after the best one.
      best: `{"step", "loss", "accuracy"}` of the best evaluation.
      last: the same of the newest one.
      first: the same before the first step, where the run starts from trained parameters.
      early: patience ended the run.
    """

    seconds: float = 0.0
    units: float = 0.0
    evaluations: int = 0
    best: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    first: dict[str, Any] | None = None
    early: bool = False

    def judge(self, found: dict[str, Any], metric: str, patience: int | None) -> bool:
        """Take an evaluation into the books; returns whether it is the best so far."""
        is_best = better(found, self.best, metric)
        self.last = found
        self.best = found if is_best else self.best
        self.evaluations = 0 if is_best else self.evaluations + 1
        self.early = patience is not None and self.evaluations >= patience
        return is_best


def better(found: dict[str, Any], best: dict[str, Any] | None, metric: str) -> bool:
    """Whether an evaluation beats the best one so far; where two are equally accurate, the lower loss does."""
    of_all = lambda mark: (-mark["accuracy"] if metric == "accuracy" else 0, mark["loss"])
    return best is None or of_all(found) < of_all(best)


def not_finite(finite: np.ndarray, names: Sequence[str]) -> str | None:
    """What of a step was not finite, in a few words; None if all was."""
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return f"{bad[0]}{more} is not finite" if bad else None


def about(
    job: Job, progress: Progress, data: dict[str, Any], base_fingerprint: str | None, source_step: int | None
) -> dict[str, Any]:
    """What a run's checkpoint says beside its tensors.

    Args:
      data: position in the data.
      base_fingerprint: of the frozen base; None without an adapter.
      source_step: of `init_from` that the run started with.
    """
    return {
        "config": job.config.plain(),
        "model": job.model.model_dump(mode="json"),
        "base_fingerprint": base_fingerprint,
        "source_step": source_step,
        "data_fingerprint": job.data.fingerprint,
        "data": data,
        "class_names": job.data.facts.get("labels"),
        "versions": {name: version(name) for name in LIBRARIES},
        "best": progress.best,
        "progress": asdict(progress),
    }
