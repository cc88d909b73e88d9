"""Who of a run's processes is there, before JAX brings them together: JAX would abort where one is missing.

Process 0 listens at the coordinator's address, which JAX's own service takes over when all are there. The others say
who they are, and are told that they may go on, or why not.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping

from vlora_jax.distributed.watch import WRITER, endpoint
from vlora_jax.errors import ConfigError

PATIENCE = 2.0  # seconds for one exchange of a line
PAUSE = 0.2  # seconds between two attempts
SHOWN = 8  # processes that are named one by one


def named(processes: Iterable[int]) -> str:
    """Processes in words.

    >>> named([3]), named([0, 2])
    ('process 3', 'processes 0, 2')
    """
    every = sorted(processes)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return f"process{'es' if len(every) > 1 else ''} {', '.join(map(str, every[:SHOWN]))}{more}"


def call(address: str, count: int, seconds: float) -> None:
    """Return when all of `count` processes are there; for process 0.

    Raises:
      ConfigError: some did not come in time, or two say that they are the same: in every process that is there.
    """
    end, wrong = time.monotonic() + seconds, ""
    here: dict[int, socket.socket] = {}
    refused: list[socket.socket] = []
    with listening(address) as server:
        while not wrong and time.monotonic() < end:
            here = {process: caller for process, caller in here.items() if waits(caller)}  # who left may come again
            if len(here) == count - 1:
                break
            try:
                caller, _ = server.accept()
            except TimeoutError:
                continue
            said = heard(caller)
            if said is None:
                caller.close()  # looked whether someone is here, or is none of us
            elif wrong := contradiction(*said, count, here):
                refused.append(caller)
            else:
                here[said[0]] = caller
    missing = set(range(1, count)) - here.keys()
    if missing and not wrong:
        wrong = f"{named(missing)} of {count} did not come to {address} within {seconds:g} s"
    for caller in (*here.values(), *refused):
        tell(caller, {"error": wrong})
    if wrong:
        raise ConfigError(wrong)


def contradiction(process: int, of: int, count: int, here: Mapping[int, socket.socket]) -> str:
    """What is wrong with a process that says it is one of so many; empty if nothing is."""
    if of != count:
        return f"process {process} was told of {of} processes, process {WRITER} of {count}"
    if process == WRITER or (process in here and waits(here[process])):
        return f"two processes were told that they are process {process}"
    return ""


def answer(address: str, process: int, count: int, seconds: float) -> None:
    """Return when process 0 says that all are there; for the other processes.

    Raises:
      ConfigError: nobody calls the roll there, or process 0 says what is wrong.
    """
    end, line = time.monotonic() + seconds, json.dumps([process, count]).encode() + b"\n"
    while True:
        try:
            with socket.create_connection(endpoint(address), timeout=PATIENCE) as caller:
                caller.sendall(line)
                caller.settimeout(seconds + PATIENCE)  # process 0 began before, and waits as long
                told = json.loads(caller.makefile().readline())
            break
        except (OSError, ValueError):  # nobody there yet, or not process 0
            if time.monotonic() > end:
                raise ConfigError(
                    f"nobody answers at JAX_COORDINATOR_ADDRESS {address} for {seconds:g} s; is process {WRITER} there?"
                ) from None
            time.sleep(PAUSE)
    if told["error"]:
        raise ConfigError(told["error"])


def listening(address: str) -> socket.socket:
    """A socket at the port of an address, on all of this machine's interfaces, as JAX's service.

    Raises:
      ConfigError: the port is taken.
    """
    _, port = endpoint(address)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ConfigError(f"process {WRITER} cannot listen at JAX_COORDINATOR_ADDRESS {address}: {why}") from None
    server.settimeout(PAUSE)
    return server


def heard(caller: socket.socket) -> tuple[int, int] | None:
    """Which process is calling, and of how many; None if it is none of ours."""
    caller.settimeout(PATIENCE)
    try:
        process, count = map(int, json.loads(caller.recv(64)))
        return (process, count) if 0 <= process < count else None
    except (OSError, ValueError, TypeError):
        return None


def waits(caller: socket.socket) -> bool:
    """Whether a process still waits for its answer; if not, this side hangs up as well."""
    caller.settimeout(0)
    try:
        if caller.recv(1, socket.MSG_PEEK):
            return True
    except BlockingIOError:
        return True
    except OSError:
        pass
    caller.close()
    return False


def tell(caller: socket.socket, message: dict[str, str]) -> None:
    """Answer a process, and wait until it has hung up: the port is free sooner than if this side did first."""
    caller.settimeout(PATIENCE)
    try:
        caller.sendall(json.dumps(message).encode() + b"\n")
        caller.recv(1)
    except OSError:
        pass  # it is gone, which JAX or the watch will notice
    finally:
        caller.close()
