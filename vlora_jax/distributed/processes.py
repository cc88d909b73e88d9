"""Several processes as one run: how they come together, and what they agree on.

One process needs none of it: nothing is started, and every function returns at once.
"""

import importlib.util
import itertools
import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vlora_jax import errors
from vlora_jax.distributed import rollcall, watch
from vlora_jax.distributed.watch import WRITER, store
from vlora_jax.errors import ConfigError, ProcessError, VloraError

T = TypeVar("T")

EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_calls: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)  # by name; every process makes the same calls


def is_writer() -> bool:
    """Whether this process writes the files, and speaks."""
    return not many() or jax.process_index() == WRITER


def many() -> bool:
    """Whether there are several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` has to be told; None for one process, {} where JAX finds everything itself.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` come before what the surroundings say.

    >>> arguments({})
    >>> arguments({"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"})
    {'coordinator_address': '10.0.0.2:8476', 'num_processes': 2, 'process_id': 1}

    Raises:
      ConfigError: the variables are incomplete or impossible.
    """
    given = {name: environment[name] for name in EXPLICIT if environment.get(name)}
    address, count, process = (given.get(name) for name in EXPLICIT)
    if count == "1":
        return None
    found = in_cluster(environment)
    missing = [name for name in EXPLICIT if name not in given]
    if given and missing and not found:
        raise ConfigError(f"{', '.join(given)} given without {', '.join(missing)}: several processes need all three")
    if address is not None:
        host, _, port = address.rpartition(":")
        if not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise ConfigError(f"JAX_COORDINATOR_ADDRESS {address!r} must look like HOST:PORT, the port below {2**16}")
    for name, value in (("JAX_NUM_PROCESSES", count), ("JAX_PROCESS_ID", process)):
        if value is not None and not value.isdecimal():
            raise ConfigError(f"{name} {value!r} must be a whole number")
    if count is not None and process is not None and int(process) >= int(count):
        raise ConfigError(f"JAX_PROCESS_ID {process} must be below JAX_NUM_PROCESSES {count}; the first one is 0")
    if not given and not found:
        return None
    values = {
        "coordinator_address": address,
        "num_processes": count and int(count),
        "process_id": process and int(process),
    }
    return {name: value for name, value in values.items() if value is not None}


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the surroundings have started several processes in a way that JAX recognises.

    Slurm and Open MPI: more than one task. Kubernetes: an indexed job, where the package `kubernetes` is installed. A
    TPU's workers: wherever there is a TPU, whose metadata say whether it has more.
    """
    tasks = max(int(environment.get(name) or 1) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    step = "SLURM_STEP_NODELIST" in environment or "OMPI_COMM_WORLD_SIZE" in environment
    indexed = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return (tasks > 1 and step) or (indexed and installed("kubernetes")) or has_tpu(environment)


def has_tpu(environment: Mapping[str, str]) -> bool:
    """Whether JAX will use a TPU of this machine."""
    platforms = environment.get("JAX_PLATFORMS") or "tpu"
    chips = itertools.chain(Path("/dev").glob("accel[0-9]*"), Path("/dev/vfio").glob("[0-9]*"))
    return "tpu" in platforms.split(",") and next(chips, None) is not None and installed("libtpu")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def start(start_seconds: int = 300, lost_seconds: int = 60, environment: Mapping[str, str] = os.environ) -> None:
    """Join the other processes that the environment speaks of; must come before any computation.

    Args:
      start_seconds: for all processes to come, from when process 0 did.
      lost_seconds: of silence after which a process is taken for lost.

    Raises:
      ConfigError: the environment is contradictory, the coordinator cannot be reached, or not all processes come.
    """
    given = arguments(environment)
    if given is None or watch.current() is not None:
        return
    jax.config.update("jax_enable_preemption_service", False)  # takes SIGTERM for itself; the loop has an agreement
    try:
        address, count, process = completed(given, start_seconds)
        if count is not None and count > 1 and address is not None and process is not None:
            if process == WRITER:
                rollcall.call(address, count, start_seconds)
            else:
                rollcall.answer(address, process, count, start_seconds)
        late = ConfigError(f"process {process} waited {start_seconds} s for JAX's service at {address}; one was lost")
        with timed(start_seconds, late):
            jax.distributed.initialize(
                **given, initialization_timeout=start_seconds + 60, heartbeat_timeout_seconds=lost_seconds + 60
            )
    except VloraError:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        if not given and (isinstance(error, OSError) or "coordinator_address should be defined" in str(error)):
            return  # a TPU that is no worker of a cloud: one machine
        raise ConfigError(f"the processes of this run did not come together: {watch.first_line(error)}") from None
    if many():
        watch.begin(lost_seconds)


def completed(given: Mapping[str, Any], seconds: int) -> tuple[str | None, int | None, int | None]:
    """The coordinator's address, the number of processes and that of this one: as given, or as JAX finds them."""
    from jax._src.clusters import ClusterEnv  # JAX offers no public way to it

    address, count, process = (given.get(name) for name in ("coordinator_address", "num_processes", "process_id"))
    return ClusterEnv.auto_detect_unset_distributed_params(address, count, process, None, None, seconds)[:3]


@contextmanager
def timed(seconds: float, late: VloraError) -> Iterator[None]:
    """End this process with an error if what is inside takes longer; JAX would abort with a dump, and later."""
    timer = threading.Timer(seconds, watch.give_up, (late,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def gathered(name: str, value: Any = None, seconds: float = 600) -> list[Any]:
    """The value of every process, by process; returns when all have given theirs. All have to call it.

    Args:
      name: what it is about, for errors.
      value: as JSON.

    Raises:
      ProcessError: some processes did not come in time.
    """
    if not many():
        return [value]
    call = f"vlora/{name}/{next(_calls[name])}"
    store().key_value_set(f"{call}/{jax.process_index()}", json.dumps(value))
    end, values, missing = time.monotonic() + seconds, [], []
    for process in range(jax.process_count()):
        try:
            left = max(1, int(1000 * (end - time.monotonic())))
            values.append(json.loads(store().blocking_key_value_get(f"{call}/{process}", left)))
        except jax.errors.JaxRuntimeError:
            missing.append(process)
    if missing:
        raise ProcessError(f"{rollcall.named(missing)} did not come to {name!r} in {seconds:g} seconds")
    return values


def barrier(name: str, seconds: float = 600) -> None:
    """Return when all processes have come here.

    Raises:
      ProcessError: some did not come in time; they are named.
    """
    gathered(name, None, seconds)


def decided(name: str, decide: Callable[[], T], seconds: float = 600) -> T:
    """What the writer decides, in every process; only the writer calls `decide`, whose result must be JSON.

    Raises:
      VloraError: the same in every process, if the writer's call raises one.
    """
    if not many():
        return decide()
    call = f"vlora/{name}/{next(_calls[name])}"
    if is_writer():
        try:
            result = decide()
        except VloraError as error:
            refusal = {"error": type(error).__name__, "message": str(error), "exit_code": error.exit_code}
            store().key_value_set(call, json.dumps(refusal))
            raise
        store().key_value_set(call, json.dumps({"result": result}))
        return result
    try:
        told = json.loads(store().blocking_key_value_get(call, int(1000 * seconds)))
    except jax.errors.JaxRuntimeError:
        raise ProcessError(f"process {WRITER} did not decide {name!r} in {seconds:g} seconds") from None
    if "error" in told:
        raise getattr(errors, told["error"], VloraError)(told["message"], told["exit_code"])
    return told["result"]


def same(name: str, value: Any) -> None:
    """Make sure that all processes have the same.

    Raises:
      ConfigError: they have not; in every process, with the first that differs and where.
    """
    values = gathered(name, value)
    for process, other in enumerate(values):
        if other != values[WRITER]:
            told = difference(other, values[WRITER])
            raise ConfigError(f"process {process} has another {name} than process {WRITER}: {told}")


def difference(value: Any, expected: Any) -> str:
    """How a value is not as expected; of dictionaries, the first keys in which they differ.

    >>> difference({"adapter": None, "seed": 1}, {"adapter.rank": 8, "seed": 1})
    'adapter is None, not absent; adapter.rank is absent, not 8'
    """
    if not (isinstance(value, dict) and isinstance(expected, dict)):
        return f"{value!r}, not {expected!r}"
    told = lambda values, key: repr(values[key]) if key in values else "absent"
    keys = [key for key in value | expected if told(value, key) != told(expected, key)]
    return "; ".join(f"{key} is {told(value, key)}, not {told(expected, key)}" for key in keys[:3])


def agreed(wants: Callable[[], bool], mesh: Mesh) -> Callable[[], bool]:
    """Asks like `wants`, but whether any process does: true in all of them at the same call, one call late.

    The answer is a reduction of one flag a device; it is looked at when the next one is under way, so that no device
    waits for it. With one process it is `wants` itself.
    """
    if not many():
        return wants
    flags = NamedSharding(mesh, P(mesh.axis_names))
    full = lambda flag: np.full(mesh.size, flag, np.int32)
    both = [
        jax.make_array_from_callback((mesh.size,), flags, lambda index, flag=flag: full(flag)[index]) for flag in (0, 1)
    ]
    largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
    before: list[Any] = []

    def ask() -> bool:
        before.append(largest(both[bool(wants())]))
        return len(before) > 1 and bool(before.pop(0))

    return ask
