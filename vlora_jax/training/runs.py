"""A run's directory: config.yaml, metrics.jsonl, checkpoints/, curve.png, and who may write in it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vlora_jax import checkpoint
from vlora_jax.errors import CheckpointError, ConfigError, ResumeError, nearest
from vlora_jax.training.config import RunConfig, load_config

CONFIG, METRICS, CHECKPOINTS, LOCK = "config.yaml", "metrics.jsonl", "checkpoints", ".lock"


def read_config(run: Path) -> RunConfig:
    """The config a run was started with.

    Raises:
      ConfigError: the directory is missing, or is no run.
    """
    if not (run / CONFIG).is_file():
        beside = run.parent.glob(f"*/{CONFIG}") if run.parent.is_dir() else ()
        near = nearest(str(run), [str(path.parent) for path in beside], 1)
        what = "is no run directory: there is no config.yaml in it" if run.is_dir() else "does not exist"
        raise ConfigError(f"{run} {what}" + (f"; nearest run: {near[0]}" if near else ""))
    return load_config(run / CONFIG)


def open_run(config: RunConfig) -> bool:
    """Make a run's directory, or make sure that the one that is there can be continued with this config.

    Returns:
      Whether it was there already.

    Raises:
      ResumeError: it belongs to another config (the differing keys are listed), or holds something else.
      ResourceError: it cannot be written.
    """
    run = Path(config.run_dir)
    if run.exists() and not run.is_dir():
        raise ResumeError(f"run_dir {run} is a file")
    if (run / CONFIG).exists():
        was, now = read_config(run).identity(), config.identity()
        missing = object()
        keys = [key for key in sorted(was | now) if was.get(key, missing) != now.get(key, missing)]
        if keys:
            shown = [f"{key} was {was.get(key)!r}, is {now.get(key)!r}" for key in keys[:5]]
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ResumeError(f"{run} belongs to another config: {'; '.join(shown)}{more}; choose another run_dir")
        checkpoint.make_directory(run)
        return True
    if run.is_dir() and any(path.name != LOCK for path in run.iterdir()):
        raise ResumeError(f"run_dir {run} is not empty and holds no run; choose another run_dir")
    checkpoint.make_directory(run)
    partial = run / f".{CONFIG}.{os.getpid()}"
    partial.write_text(yaml.safe_dump(config.plain(), sort_keys=False), encoding="utf-8")
    partial.rename(run / CONFIG)
    return False


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Keep a second process out of a run's directory.

    Raises:
      ResumeError: there is one already.
    """
    checkpoint.make_directory(run)
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ResumeError(f"another process is training in {run}; wait for it or choose another run_dir") from None
        yield


def best_step(run: Path) -> int:
    """The best whole checkpoint of a run by its held-out metric; the newest if it never evaluated.

    Raises:
      CheckpointError: there is none.
    """
    directory = run / CHECKPOINTS
    steps = sorted((int(p.name) for p in directory.glob("*") if p.name.isdigit()), reverse=True)
    whole = (step for step in steps if checkpoint.fault_of(directory / str(step)) is None)
    newest = next(whole, None)
    if newest is None:
        raise CheckpointError(f"{run} has no whole checkpoint")
    best = (checkpoint.metadata(directory, newest).get("best") or {}).get("step")
    return best if best in steps and checkpoint.fault_of(directory / str(best)) is None else newest


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's metrics.jsonl; a last line that was cut off is left out."""
    try:
        lines = (run / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def keep_metrics(run: Path, step: int) -> None:
    """Drop what metrics.jsonl says about later steps than `step`: they will be done again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(run) if record["step"] <= step]
    partial = run / f".{METRICS}.{os.getpid()}"
    partial.write_text("".join(kept), encoding="utf-8")
    partial.rename(run / METRICS)
