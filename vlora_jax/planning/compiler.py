"""The TPU compiler behind a pipe: one worker process, asked as often as needed."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from vlora_jax.distributed.chips import Topology
from vlora_jax.errors import ResourceError, VloraError
from vlora_jax.planning.worker import ENVIRONMENT, Request

DROPPED = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "LIBTPU_INIT_ARGS", "JAX_NUM_CPU_DEVICES")
MISSING = "planning for a TPU needs the TPU compiler, libtpu: pip install 'vlora_jax[plan]'"


class Compiler:
    """Answers for one topology; a context manager, which ends the process.

    Raises:
      ResourceError: libtpu is not installed.
    """

    def __init__(self, topology: Topology, say: Callable[[str], None] = lambda stage: None):
        self.topology, self.say = topology, say
        self._process: subprocess.Popen[str] | None = None
        if topology.chip.kind == "tpu" and importlib.util.find_spec("libtpu") is None:
            raise ResourceError(MISSING)

    def __enter__(self) -> "Compiler":
        self._errors = tempfile.TemporaryFile("w+")
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
        self._errors.close()

    def ask(self, request: Request) -> dict[str, Any]:
        """What the compiler found.

        Raises:
          VloraError: what the config asks for is impossible, or the compiler failed.
        """
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(request.line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            raise self._failed() from None
        for line in process.stdout:
            answer = json.loads(line)
            if "doing" in answer:
                self.say(answer["doing"])
            elif "error" in answer:
                raise VloraError(answer["error"], answer["code"])
            else:
                return answer["found"]
        raise self._failed()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            environment = {name: value for name, value in os.environ.items() if name not in DROPPED} | ENVIRONMENT
            if self.topology.chip.kind == "gpu":
                environment["JAX_NUM_CPU_DEVICES"] = str(self.topology.chips)
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
            command = [sys.executable, "-m", "vlora_jax.planning.worker"]
            self._process = subprocess.Popen(command, env=environment, text=True, **pipes)
        return self._process

    def _failed(self) -> ResourceError:
        code = self._stop()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        reason = "it was killed, perhaps for memory" if code == -9 else (lines or ["it said nothing"])[-1][:600]
        return ResourceError(f"the compiler's process ended with code {code}: {reason}", exit_code=1)

    def _stop(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        with process:  # closes the pipes, and the end of its input ends it
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.returncode
