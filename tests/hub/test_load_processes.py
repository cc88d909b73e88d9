"""Two processes load one checkpoint: each the right numbers, and each reads little more than its own half."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import LLAMA, write

from vlora_jax.adapters.trees import flatten


@pytest.mark.slow
def test_two_processes_read_their_halves(tmp_path):
    config = LLAMA.model_copy(update={"width": 128, "mlp_width": 512, "vocabulary": 256})
    _, base = write(tmp_path / "model", config, max_shard="500KB")
    np.savez(tmp_path / "expected.npz", **{path: np.asarray(leaf) for path, leaf in flatten(base).items()})
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    where = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    where |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    child = str(Path(__file__).with_name("load_child.py"))
    logs = [tmp_path / f"{process}.log" for process in range(2)]
    children = []
    for process, log in enumerate(logs):
        command = [sys.executable, child, str(process), str(port), tmp_path / "model", tmp_path / "expected.npz"]
        with log.open("w") as out:
            children.append(subprocess.Popen(command, env=where, stdout=out, stderr=subprocess.STDOUT))
    end = time.monotonic() + 120
    while None in (codes := [c.poll() for c in children]) and not any(codes) and time.monotonic() < end:
        time.sleep(0.1)
    for each in children:  # where one has failed the other would wait for it
        each.kill()
        each.wait()
    assert codes == [0, 0], "\n".join(log.read_text()[-2000:] for log in logs)
    for log in logs:
        read, whole = map(int, re.search(r"read (\d+) of (\d+)", log.read_text()).groups())
        assert read < 0.55 * whole
