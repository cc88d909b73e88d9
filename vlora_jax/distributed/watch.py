"""What becomes of the processes of a run when one of them is lost or fails: all end, with one line that says why.

A thread in each process says every few seconds in the key-value store of JAX's coordination service, which process 0
holds, that it is alive, and looks whether the others are. JAX itself would abort with a dump and name nobody.
"""

import ctypes
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax

from vlora_jax.errors import VloraError

WRITER = 0  # the process that writes what there is one of; the coordinator, without which no other can go on
STOPPED = 75  # EX_TEMPFAIL: launchers start the same command again
LINGER = 5.0  # seconds in which an ending process stays for the others to learn why
ALIVE, ENDED = "vlora/alive", "vlora/ended"

_watch: "Watch | None" = None
_ending = threading.Lock()  # held by whoever ends this process


def store() -> Any:
    """The key-value store that all processes share."""
    from jax._src import distributed  # JAX offers no public way to it; Orbax takes this one as well

    return distributed.global_state.client


def coordinator() -> str:
    """The address of the process that holds the store."""
    from jax._src import distributed

    return distributed.global_state.coordinator_address or ""


def endpoint(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, of which the host may be an IPv6 address in brackets."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def answers(address: str) -> bool:
    """Whether someone can be reached at `HOST:PORT`."""
    try:
        socket.create_connection(endpoint(address), timeout=2).close()
    except OSError:
        return False
    return True


def by_process(folder: str) -> dict[int, str]:
    """What each process has said in a folder of the store."""
    return {int(key.rpartition("/")[2]): value for key, value in store().key_value_dir_get(f"{folder}/")}


def begin(lost_seconds: float) -> None:
    """Look after the other processes from now on, and be looked after."""
    global _watch
    _watch = Watch(lost_seconds)


def current() -> "Watch | None":
    """The watch of this process; None with one process."""
    return _watch


class Watch:
    """Two threads: one talks to the store, which may take long when the coordinator is gone; one looks at the clock.

    Args:
      lost_seconds: of silence after which a process is taken for lost.
    """

    def __init__(self, lost_seconds: float):
        self.lost_seconds, self.interval = lost_seconds, lost_seconds / 10
        self.me, self.beats = jax.process_index(), {}
        self.heard = {process: time.monotonic() for process in range(jax.process_count())}
        for target in (self._talk, self._look):
            threading.Thread(target=target, name="processes", daemon=True).start()
        if self.me != WRITER:
            self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
            ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def _aborted(self, number: int) -> None:
        """JAX aborts as soon as the connection to the coordinator breaks; Python's own handlers would come too late."""
        if _ending.locked():
            threading.Event().wait(1)  # the thread that ends this process is about to
        if answers(coordinator()):
            return  # something else is wrong: it aborts
        say(self.line([WRITER], "its connection broke"))
        os._exit(STOPPED)

    def _talk(self) -> None:
        for count in itertools.count():
            try:
                beat = f"{count} {socket.gethostname()}"
                store().key_value_set(f"{ALIVE}/{self.me}", beat, allow_overwrite=True)
                beats, ends = by_process(ALIVE), by_process(ENDED)
            except (jax.errors.JaxRuntimeError, AttributeError):  # no coordinator, or all is over here
                time.sleep(self.interval)
                continue
            now = time.monotonic()
            self.heard |= {process: now for process, beat in beats.items() if self.beats.get(process) != beat}
            self.beats = beats
            for process, end in ((process, json.loads(value)) for process, value in ends.items()):
                if end["code"] in (0, STOPPED) and not end["message"]:
                    self.heard[process] = float("inf")
                elif process != self.me:
                    finish(end["code"], end["message"])
            time.sleep(self.interval)

    def _look(self) -> None:
        while True:
            time.sleep(self.interval / 2)
            silent = [process for process, when in self.heard.items() if time.monotonic() - when > self.lost_seconds]
            lost = [process for process in silent if process != self.me]
            if WRITER in lost:  # then nothing has been heard of anyone
                lost = [WRITER]
            if lost:
                finish(STOPPED, self.line(lost, f"not heard of for {self.lost_seconds:g} seconds"))

    def line(self, lost: list[int], why: str) -> str:
        """What is said of lost processes."""
        hosts = {process: beat.partition(" ")[2] for process, beat in self.beats.items()}
        named = ", ".join(f"{process} on {hosts.get(process, 'an unknown host')}" for process in lost)
        return f"lost process {named}: {why}; stopping. The same command continues from the last checkpoint"


def finish(code: int, message: str, details: str = "") -> NoReturn:
    """End this process for good, with a line on standard error, and tell the others.

    It waits a moment for them to learn it: they cannot once the coordinator is gone.
    """
    if not _ending.acquire(blocking=False):
        threading.Event().wait()  # another thread ends the process
    say(message, details)
    end = time.monotonic() + LINGER
    try:
        say_ended(code, message)
        while time.monotonic() < end and len(by_process(ENDED)) < jax.process_count():
            time.sleep(0.1)
        time.sleep(0.5 if jax.process_index() == WRITER else 0)  # the others abort when the coordinator goes
    except jax.errors.JaxRuntimeError:
        pass  # there is no coordinator any more to tell it to
    os._exit(code)


def say(message: str, details: str = "") -> None:
    """An error, whatever becomes of this process next."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(2, f"{details}error: {message}\n".encode())


def say_ended(code: int, message: str) -> None:
    """Tell the other processes that this one ends."""
    end = json.dumps({"code": code, "message": message})
    store().key_value_set(f"{ENDED}/{jax.process_index()}", end, allow_overwrite=True)


def give_up(error: VloraError) -> None:
    """End this process with an error, from a thread, while the main one waits for others that do not come."""
    say(str(error))
    os._exit(error.exit_code)


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return str(error).strip().split("\n")[0][:300]


@contextmanager
def leaving() -> Iterator[None]:
    """Around all that a process does: an error of one process ends the others too, with its message and its code.

    Without it they would wait for each other: one in what JAX does when Python exits, the others in a reduction.
    """
    try:
        yield
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if _watch is not None:
            if code not in (0, STOPPED):
                finish(code, f"process {_watch.me} ended with code {code}")
            say_ended(code, "")
        raise
    except VloraError as error:
        if _watch is not None:
            finish(error.exit_code, str(error))
        raise
    except BaseException as error:
        if _watch is None:
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(1.3 * _watch.lost_seconds)  # a reduction fails first where a process is lost: the watch names it
        told = f"process {_watch.me} failed: {type(error).__name__}: {first_line(error)}"
        finish(1, told, traceback.format_exc())
    else:
        if _watch is not None:
            say_ended(0, "")
