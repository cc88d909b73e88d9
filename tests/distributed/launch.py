"""Processes of one run on this machine, as a launcher would start them: each with a log, none without an end."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from compiling import QUICK

import vlora_jax


@dataclass
class Child:
    process: subprocess.Popen
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(folder: Path, *command: str, count: int = 2, devices: int = 4, absent: int = 0) -> list[Child]:
    """Start `python COMMAND` once for each process, with the variables by which they find each other.

    Args:
      absent: so many of the last ones are not started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    common = os.environ | {
        "PYTHONPATH": str(Path(vlora_jax.__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(count),
        "GLIBC_TUNABLES": "",
    }
    children = []
    for number in range(count - absent):
        log = folder / f"{number}.log"
        with log.open("w") as out:
            where = common | {"JAX_PROCESS_ID": str(number)}
            process = subprocess.Popen([sys.executable, *command], env=where, stdout=out, stderr=subprocess.STDOUT)
        children.append(Child(process, log))
    return children


def codes(children: list[Child], timeout: float = 240) -> list[int]:
    """Exit codes of all; those that do not end in time are killed."""
    end = time.monotonic() + timeout
    try:
        for child in children:
            child.process.wait(max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
    return [child.process.returncode for child in children]


def logs(children: list[Child]) -> str:
    return "\n".join(f"{child.log.name}:\n{child.said[-3000:]}" for child in children)
