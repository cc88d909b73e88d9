"""Checkpoints of a run: what trains, its optimiser, and where the run stands. Never the frozen base.

Orbax writes each step into a temporary directory and renames it. On top of that, a manifest with the hash of
every file is written last: a step without one, or with a file that differs, is not whole and is not used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from vlora_jax.adapters.trees import Tree, flatten, unflatten
from vlora_jax.distributed import processes
from vlora_jax.errors import CheckpointError, ResourceError

MANIFEST = "manifest.json"
SCHEMA = 1
Where = Mapping[str, Mapping[str, jax.sharding.Sharding]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint as read: flat trees by name, and its metadata."""

    step: int
    trees: dict[str, dict[str, Any]]
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where steps are kept, one directory each.
      keep: newest steps that stay; the last one saved as the best stays as well.
      notify: told, in a line each, which steps are left aside because they are not whole.

    Raises:
      ResourceError: the directory cannot be written.
    """

    def __init__(self, directory: Path, keep: int = 2, notify: Callable[[str], None] = print):
        self.directory, self._notify = directory.absolute(), notify
        make_directory(self.directory)
        processes.decided("checkpoints", self._tidy)
        policies: Any = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: metrics["score"], n=1, keep_checkpoints_without_metrics=False
        )
        every: Any = ocp.training.save_decision_policies.FixedIntervalPolicy(1)
        self._orbax = ocp.training.Checkpointer(
            str(self.directory),
            save_decision_policy=every,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,
        )
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future | None = None

    def _tidy(self) -> None:
        unfinished = [step for step in self.steps() if not (self.directory / str(step) / MANIFEST).exists()]
        if len(unfinished) > 1 and unfinished == self.steps():  # no kill leaves that: something else happened to them
            raise CheckpointError(
                f"{self.directory}: checkpoints {unfinished} have lost their {MANIFEST}; put it back or move them away"
            )
        for step in unfinished:
            self._put_aside(step, "unfinished")
            self._notify(f"checkpoint {step} was not finished: moved to {step}.unfinished")

    def steps(self) -> list[int]:
        """Steps on disk, oldest first, whole or not."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.is_dir() and path.name.isdigit())

    def save(self, step: int, trees: dict[str, Tree], metadata: dict[str, Any], best: bool = False) -> None:
        """Start saving a step in the background.

        Args:
          trees: by name.
          metadata: JSON values.
          best: it is better than all before it, so that it stays until another is.

        Raises:
          ResourceError: the disk is full, or an earlier save failed.
        """
        self.wait()
        flat = {name: dict(sorted(flatten(tree).items())) for name, tree in trees.items()}
        check_space(self.directory, sum(leaf.nbytes for tree in flat.values() for leaf in tree.values()))
        empty = [name for name, tree in flat.items() if not tree]
        about: Any = {"schema": SCHEMA, "step": step, "empty": empty, **metadata}
        try:
            response = self._orbax.save_checkpointables_async(
                step,
                {name: tree for name, tree in flat.items() if tree},
                metrics={"score": step} if best else None,
                custom_metadata=about,
                force=True,
            )
        except OSError as error:
            raise ResourceError(f"checkpoint {step} could not be written: {error}", exit_code=1) from None

        if response is None:
            raise ResourceError(f"checkpoint {step} was not written: its step is there already", exit_code=1)

        def finish() -> None:
            response.result()
            if processes.is_writer():
                write_manifest(self.directory / str(step))

        self._pending = self._background.submit(finish)

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
          ResourceError: a save failed.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except Exception as error:
            raise ResourceError(f"a checkpoint could not be written: {error}", exit_code=1) from error

    def close(self) -> None:
        """Wait, and release threads."""
        self.wait()
        self._background.shutdown()
        self._orbax.close()

    def newest_whole(self) -> int | None:
        """The newest step that is whole; None if nothing was saved. Newer ones are moved aside, and reported.

        Raises:
          CheckpointError: there are checkpoints, but none is whole.
        """
        newest = processes.decided("newest checkpoint", self._newest_whole)
        if newest is not None:
            self._orbax.reload()
        return newest

    def _newest_whole(self) -> int | None:
        faults = {}
        for step in reversed(self.steps()):
            fault = fault_of(self.directory / str(step))
            if fault is None:
                for damaged, why in faults.items():
                    self._put_aside(damaged, "damaged")
                    self._notify(f"checkpoint {damaged} is damaged ({why}): moved to {damaged}.damaged, using {step}")
                return step
            faults[step] = fault
        if faults:
            raise CheckpointError(
                f"{self.directory}: none of the checkpoints {sorted(faults)} is whole ({next(iter(faults.values()))}); "
                f"move the run away to start again"
            )
        return None

    def _put_aside(self, step: int, why: str) -> None:
        for old in self.directory.glob(f"*.{why}"):  # one is enough: they are as large as checkpoints
            shutil.rmtree(old)
        (self.directory / str(step)).rename(self.directory / f"{step}.{why}")


def make_directory(path: Path) -> None:
    """Create a directory and make sure that it can be written.

    Raises:
      ResourceError: it cannot.
    """
    if path.exists() and not path.is_dir():
        raise ResourceError(f"{path} is a file, not a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from None


def refuse_used(path: Path) -> None:
    """Raises ResourceError if a directory that is to be written holds something."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ResourceError(f"{path} is there already and not empty; choose another directory")


def check_space(directory: Path, needed: int) -> None:
    """Raises ResourceError if the disk has less room than `needed` bytes and a tenth."""
    free = shutil.disk_usage(directory).free
    if free < 1.1 * needed:
        raise ResourceError(
            f"a checkpoint needs {needed / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free", exit_code=1
        )


def read(directory: Path, step: int, names: tuple[str, ...] = (), where: Where | None = None) -> Saved:
    """A checkpoint's trees as flat dictionaries of arrays.

    Args:
      directory: of all checkpoints of a run.
      names: of the trees to read; all of them if empty.
      where: shardings by tree and path; of what is not there, and without it, all is read to one device. Several
        processes need it, and then read what their devices hold.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    path = directory.absolute() / str(step)
    about, values = _about(path, processes.decided("whole checkpoint", lambda: fault_of(path)))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = where or {}
    wanted = {
        name: {
            key: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=fitting(where.get(name, {}).get(key), leaf.shape, device)
            )
            for key, leaf in tree.items()
        }
        for name, tree in about.metadata.items()
        if name in names or not names
    }
    trees = ocp.load_checkpointables(str(path), wanted)
    return Saved(step, trees | {name: {} for name in values["empty"]}, values)


def fitting(sharding: Any, shape: tuple[int, ...], otherwise: Any) -> Any:
    """A sharding if it can be that of a shape: what was saved may be something else than what belongs there."""
    try:
        sharding.shard_shape(shape)
    except (AttributeError, ValueError):
        return otherwise
    return sharding


def metadata(directory: Path, step: int) -> dict[str, Any]:
    """What was saved beside a checkpoint's tensors; unlike `read`, for one process of several to ask by itself.

    Raises:
      CheckpointError: it is missing or damaged.
    """
    path = directory.absolute() / str(step)
    return _about(path, fault_of(path))[1]


def _about(path: Path, fault: str | None) -> tuple[Any, dict[str, Any]]:
    if fault is not None:
        raise CheckpointError(f"checkpoint {path} is not usable: {fault}")
    about = ocp.checkpointables_metadata(str(path))
    values: Any = about.custom_metadata or {}
    if values.get("schema") != SCHEMA:
        raise CheckpointError(f"{path} has checkpoint schema {values.get('schema')}, this version reads {SCHEMA}")
    return about, values


def restore(template: Tree, flat: dict[str, Any], what: str) -> Tree:
    """A tree like `template` with values from a checkpoint, placed like the template's leaves.

    Raises:
      CheckpointError: names, shapes or dtypes differ, or a value is not finite.
    """
    tree = unflatten(template, flat, what)
    wanted = flatten(template)
    for path, leaf in flatten(tree).items():
        like = wanted[path]
        if leaf.shape != like.shape or leaf.dtype != like.dtype:
            raise CheckpointError(
                f"{what}: {path} is {leaf.dtype}{list(leaf.shape)}, expected {like.dtype}{list(like.shape)}"
            )
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not all_finite(leaf):
            raise CheckpointError(f"{what}: {path} has values that are not finite")
    place = lambda leaf, like: jax.device_put(leaf, like.sharding) if like.sharding is not None else leaf
    return jax.tree.map(place, tree, template)


def all_finite(leaf: Any) -> bool:
    """Whether an array holds neither NaN nor infinity."""
    if getattr(leaf, "is_fully_addressable", True):
        return bool(np.isfinite(np.asarray(leaf)).all())
    return bool(jax.jit(lambda leaf: jnp.isfinite(leaf).all())(leaf))


def write_manifest(step_directory: Path) -> None:
    """Hash every file of a finished step, last of all; renamed into place, so that it is whole or absent."""
    hashes = {
        str(path.relative_to(step_directory)): digest(path)
        for path in sorted(step_directory.rglob("*"))
        if path.is_file() and path.name != MANIFEST and not path.name.startswith(".")
    }
    partial = step_directory / f".{MANIFEST}.{os.getpid()}"
    with partial.open("w", encoding="utf-8") as file:
        json.dump({"sha256": hashes}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(step_directory / MANIFEST)


def fault_of(step_directory: Path) -> str | None:
    """What is wrong with a checkpoint on disk; None if it is whole."""
    try:
        hashes = json.loads((step_directory / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        return "it does not exist" if not step_directory.exists() else "its save was cut off"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    for name, expected in hashes.items():
        path = step_directory / name
        if not path.exists():
            return f"{name} is missing"
        if digest(path) != expected:
            return f"{name} has changed, {path.stat().st_size} bytes"
    return None


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(tree: Tree) -> str:
    """A short hash of names, shapes, dtypes and values of a parameter tree, the same on any mesh."""
    sums = _checksums(tree)
    text = [f"{path} {leaf.shape} {leaf.dtype}" for path, leaf in flatten(tree).items()]
    values = [int(value) for value in jax.device_get(jax.tree.leaves(sums))]
    return hashlib.sha256(json.dumps([text, values]).encode()).hexdigest()[:16]


@jax.jit
def _checksums(tree: Tree) -> Tree:
    return jax.tree.map(checksum, tree)


def checksum(leaf: Array) -> UInt32[Array, ""]:
    """Position-weighted sum of an array's bits modulo 2³²: integer, so that the order of addition cannot matter."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[leaf.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf, words)
    bits = bits.astype(jnp.uint32).reshape(-1)
    places = jnp.arange(bits.size, dtype=jnp.uint32)
    return ((bits ^ (bits >> 15)) * (places * jnp.uint32(2654435761) + jnp.uint32(0x9E3779B1) | jnp.uint32(1))).sum(
        dtype=jnp.uint32
    )
