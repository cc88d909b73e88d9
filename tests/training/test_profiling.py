"""Steps under the profiler: those that were asked for, in one trace."""

import gzip
import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from test_loop import config, quiet

from vlora_jax.training.profiling import profiled


def recorded(folder: Path) -> dict[str, list]:
    """What happens in the only trace of a folder, by name: what is said of each time."""
    (trace,) = folder.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert len(list(trace.parent.glob("*.xplane.pb"))) == 1, "what XProf reads"
    found: dict[str, list] = {}
    for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]:
        found.setdefault(event.get("name"), []).append(event.get("args"))
    return found


def steps(folder: Path) -> list[int]:
    """Those that are marked in a trace."""
    return sorted(int(said["step_num"]) for said in recorded(folder)["train"])


def test_a_run_keeps_a_trace_of_the_steps_that_were_asked_for(tmp_path):
    run = tmp_path / "run"
    result, shown = quiet(config(run, "steps=5", "evaluate.every=5", "log.profile_steps=2:4"))
    assert (result.step, steps(run / "profile")) == (5, [2, 3, 4])
    assert len(recorded(run / "profile")["next batch"]) == 2, "between them"
    assert f"profiler: steps 2 to 4 recorded in {run / 'profile'}; look at it with pip install xprof and " in shown


def counting(state, base, batch):
    if batch is None:
        raise KeyboardInterrupt
    return state + 1, {"loss": state}


def test_a_recording_that_is_cut_short_is_written(tmp_path):
    said = []

    def run(*batches) -> None:
        state = jnp.zeros(())
        with profiled(counting, range(12, 19), 10, tmp_path, said.append) as step:
            for batch in batches:
                state, _ = step(state, {}, batch)

    with pytest.raises(KeyboardInterrupt):
        run(1, 2, 3, None)
    assert steps(tmp_path) == [12, 13, 14]
    assert said[0].startswith(f"profiler: steps 12 to 14 recorded in {tmp_path}; look at it with ")


def test_a_run_that_continues_after_those_steps_says_so(tmp_path):
    said = []
    with profiled(counting, range(10, 13), 12, tmp_path, said.append) as step:
        step(jnp.zeros(()), {}, 1)
    assert said == ["profiler: step 12 is done already, nothing is recorded"]
    assert list(tmp_path.iterdir()) == []
    with profiled(counting, range(0), 12, tmp_path, said.append) as step:
        assert step is counting
    assert len(said) == 1
