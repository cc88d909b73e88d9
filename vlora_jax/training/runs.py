"""A run's directory: config.yaml, metrics.jsonl, checkpoints/, curve.png, and who may write in it."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from vlora_jax import checkpoint
from vlora_jax.errors import CheckpointError, ConfigError, ResourceError, ResumeError, nearest
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
        what = f"is no run directory: there is no {CONFIG} in it" if run.exists() else "does not exist"
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
    if (run / CONFIG).exists():
        differences = differing(read_config(run).identity(), config.identity())
        if differences:
            raise ResumeError(f"{run} belongs to another config: {differences}; choose another run_dir")
        checkpoint.make_directory(run)
        return True
    checkpoint.make_directory(run)
    write_whole(run / CONFIG, yaml.safe_dump(config.plain(), sort_keys=False))
    return False


def differing(was: dict[str, Any], now: dict[str, Any]) -> str:
    """How two flat configs differ, in a line; empty if they don't."""
    told = lambda values, key: repr(values[key]) if key in values else "absent"
    keys = [key for key in was | now if told(was, key) != told(now, key)]
    keys.sort(key=lambda key: (not (key in was and key in now), key))
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return "; ".join(f"{key} was {told(was, key)}, is {told(now, key)}" for key in keys[:5]) + more


def refuse_foreign(run: Path) -> None:
    """Raises ResumeError if a directory holds something else than a run; what a kill left there is no obstacle."""
    if run.is_dir() and not (run / CONFIG).exists() and any(not path.name.startswith(".") for path in run.iterdir()):
        raise ResumeError(f"run_dir {run} is not empty and holds no run; choose another run_dir")


@contextmanager
def lock(run: Path, key: str = "run_dir") -> Iterator[None]:
    """Keep a second process out of a directory; `key` of the config names it.

    Raises:
      ResumeError: there is one already.
      ResourceError: its storage has no locks.
    """
    checkpoint.make_directory(run)
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResumeError(f"another process is training in {run}; wait for it or choose another {key}") from None
        except OSError as error:
            raise ResourceError(
                f"{run} cannot be locked against a second process ({error.strerror}); choose a {key} on storage that "
                f"has locks"
            ) from None
        yield


def best_step(run: Path) -> int:
    """The best whole checkpoint of a run by its held-out metric; the newest if it never evaluated.

    Raises:
      CheckpointError: there is none.
    """
    directory, newest = run / CHECKPOINTS, newest_step(run)
    if newest is None:
        raise CheckpointError(f"{run} has no whole checkpoint" if run.is_dir() else f"{run} does not exist")
    best = (checkpoint.metadata(directory, newest)["best"] or {"step": newest})["step"]
    fault = checkpoint.fault_of(directory / str(best))
    if fault is not None:
        raise CheckpointError(
            f"{run}: its best checkpoint, step {best}, is not usable: {fault}; there are {steps_of(run)}"
        )
    return best


def newest_step(run: Path) -> int | None:
    """The newest whole checkpoint of a run, or of a program of a sweep; None if there is none."""
    whole = (step for step in reversed(steps_of(run)) if checkpoint.fault_of(run / CHECKPOINTS / str(step)) is None)
    return next(whole, None)


def steps_of(run: Path) -> list[int]:
    """Steps of a run's checkpoints, oldest first, whole or not."""
    return sorted(int(path.name) for path in (run / CHECKPOINTS).glob("*") if path.name.isdigit())


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Records of a run's metrics.jsonl; lines that a crash cut off or mixed up are left out."""
    try:
        lines = (run / METRICS).read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    records = (parsed(line) for line in lines if line.endswith(b"\n"))
    return [record for record in records if record is not None]


def whole_metrics(run: Path) -> list[dict[str, Any]]:
    """`read_metrics` for looking at: a damaged file is an error, not a curve with holes.

    Raises:
      CheckpointError: a line is cut off or holds something else; it is named.
    """
    file = run / METRICS
    lines = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n") or parsed(line) is None:
            why = "is cut off" if number == len(lines) else "is no record of a step"
            raise CheckpointError(
                f"{file}: line {number} of {len(lines)} {why}; the run's own command drops such lines when it "
                f"continues, or delete the line"
            )
    return read_metrics(run)


def parsed(line: bytes) -> dict[str, Any] | None:
    """One record; None if the line holds something else."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record and "kind" in record else None


def keep_metrics(run: Path, step: int) -> None:
    """Drop what metrics.jsonl says about later steps than `step`: they will be done again."""
    kept = [json.dumps(record) + "\n" for record in read_metrics(run) if record["step"] <= step]
    write_whole(run / METRICS, "".join(kept))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in one piece: whole, or as it was before.

    Raises:
      ResourceError: it cannot be written.
    """
    partial = path.parent / f".{path.name}.{os.getpid()}"
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.rename(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from None
