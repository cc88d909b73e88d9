"""Two processes are one run: the same rows in the same order, one writer, one end."""

import os
import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from launch import codes, free_port, launch, logs
from test_loop import assert_same_run, config, leaves_of, quiet

from vlora_jax.data import digits
from vlora_jax.data.pipeline import TrainBatches, batch_id, held_out_batches
from vlora_jax.distributed import processes
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.distributed.rows import global_batch, local_rows
from vlora_jax.errors import ConfigError
from vlora_jax.training.runs import METRICS, read_metrics

HERE = Path(__file__).parent
FOUND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {"SLURM_JOB_ID": "9", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({}, None),
        (FOUND, {"coordinator_address": "10.0.0.2:8476", "num_processes": 4, "process_id": 3}),
        (FOUND | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM, {}),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        ({"SLURM_NTASKS": "8"}, None),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "n1:1"}, {"coordinator_address": "n1:1"}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
    ids=[
        "alone", "explicit", "explicitly alone", "slurm", "slurm, one task", "slurm, no step",
        "slurm, told to be alone", "slurm, own address", "open mpi", "a pod",
    ],
)  # fmt: skip
def test_the_environment_says_how_many_processes_there_are(environment, told):
    assert processes.arguments(environment) == told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"JAX_PROCESS_ID": ""}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES given without JAX_PROCESS_ID"),
        ({"JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID 4 must be below JAX_NUM_PROCESSES 4"),
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID 'one' must be a whole number"),
        *(
            ({"JAX_COORDINATOR_ADDRESS": address}, f"JAX_COORDINATOR_ADDRESS '{address}' must look like HOST:PORT, the")
            for address in ("host", "8476", ":8476", "host:0", "host:65536", "host:²")
        ),
        ({"JAX_NUM_PROCESSES": "²"}, "JAX_NUM_PROCESSES '²' must be a whole number"),
    ],
)
def test_an_environment_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        processes.arguments(FOUND | change)


def test_a_coordinator_that_does_not_answer_is_named():
    address = f"localhost:{free_port()}"
    with pytest.raises(ConfigError, match=f"nobody answers at JAX_COORDINATOR_ADDRESS {address} for 1 s"):
        processes.start(1, 1, FOUND | {"JAX_COORDINATOR_ADDRESS": address})


def test_one_process_needs_none_of_it():
    ask = lambda: True
    assert processes.agreed(ask, make_mesh()) is ask
    assert processes.decided("x", lambda: 3) == 3
    assert processes.gathered("x", 4) == [4]
    assert processes.is_writer()
    assert local_rows(16, make_mesh()) == list(range(16))
    batch = {"id": np.zeros((1, 16), np.int32)}
    assert global_batch(batch, make_mesh())["id"].sharding.spec == jax.sharding.PartitionSpec(None, ("data", "fsdp"))


def test_rows_of_several_processes_make_the_batches_of_one():
    data = digits.load(augment=True)
    whole = TrainBatches(data, 8, 2, 5)
    parts = [TrainBatches(data, 8, 2, 5, rows) for rows in ([0, 1, 2], [3, 4], [5, 6, 7])]
    for _ in range(400):  # more than two epochs
        expected, found = next(whole), [next(part) for part in parts]
        for name in expected:
            joined = found[0][name] if name == "id" else np.concatenate([part[name] for part in found], 1)
            np.testing.assert_array_equal(joined, expected[name], err_msg=name)
        assert {batch_id(part) for part in found} == {batch_id(expected)}
    assert [part.state() for part in parts] == [whole.state()] * 3, "a position is one of all processes"
    parts[0].restore(whole.state())
    np.testing.assert_array_equal(next(parts[0])["image"], next(whole)["image"][:, :3])


def test_held_out_rows_of_several_processes_make_the_batches_of_one():
    data = digits.load()
    for expected, *found in zip(*(held_out_batches(data, 128, rows) for rows in (None, range(70), range(70, 128)))):
        for name in expected:
            joined = found[0][name] if name == "id" else np.concatenate([part[name] for part in found], 1)
            np.testing.assert_array_equal(joined, expected[name], err_msg=name)


def test_two_processes_agree_and_one_that_fails_ends_both(tmp_path):
    children = launch(tmp_path, str(HERE / "agree_child.py"))
    assert codes(children, 100) == [2, 2], logs(children)
    for child in children:
        assert child.said.count("error: one has enough\n") == 1, logs(children)


STEPS = 24
OVERRIDES = [
    "model.layers=4", f"steps={STEPS}", "evaluate.every=12", "optimizer.warmup=0", "optimizer.name=sgd",
    "optimizer.rate=0.02",
    "adapter.method=lora", "adapter.rank=2", "adapter.full=head", "data.augment=true", "data.batch=16", "accumulate=2",
    "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "distributed.lost_seconds=10",
]  # fmt: skip


def pair(run: Path, folder: Path, *overrides: str):
    from test_loop import TINY

    given = [*TINY, *OVERRIDES, f"run_dir={run}", *overrides]
    return launch(folder, "-m", "vlora_jax.cli.main", "train", *given)


def wait_for(run: Path, lines: int) -> None:
    """Return when a run has so many lines of metrics."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        if (run / METRICS).exists() and (run / METRICS).read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.001)
    raise AssertionError("the run does not get on")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two processes that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    children = pair(folder / "run", folder)
    assert codes(children) == [0, 0], logs(children)
    return folder / "run"


def assert_close_run(run: Path, other: Path, step: int) -> None:
    """The same rows in the same order; losses and tensors to 1e-5."""
    steps = lambda run: [record for record in read_metrics(run) if record["kind"] == "train"]
    assert [r["batch"] for r in steps(run)] == [r["batch"] for r in steps(other)]
    np.testing.assert_allclose([r["loss"] for r in steps(run)], [r["loss"] for r in steps(other)], atol=1e-5)
    one, two = leaves_of(run, step), leaves_of(other, step)
    assert one.keys() == two.keys()
    for name, leaf in one.items():
        np.testing.assert_allclose(two[name], leaf, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_of_eight(whole, tmp_path):
    result, _ = quiet(config(tmp_path / "run", *OVERRIDES), devices=8)
    assert result.step == STEPS
    assert_close_run(tmp_path / "run", whole, STEPS)
    assert (whole / "curve.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0], ids=["a process", "the coordinator"])
def test_a_killed_process_is_named_and_a_restart_continues_bitwise(whole, victim, tmp_path):
    run = tmp_path / "run"
    children = pair(run, tmp_path / "first")
    try:
        wait_for(run, 8)
    finally:
        children[victim].process.kill()
    began = time.monotonic()
    assert codes(children, 60)[1 - victim] == 75, logs(children)
    assert time.monotonic() - began < 25
    error = [line for line in children[1 - victim].said.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, logs(children)
    assert error[0].startswith(f"error: lost process {victim} on "), error
    assert "The same command continues from the last checkpoint" in error[0]
    children = pair(run, tmp_path / "second")
    assert codes(children) == [0, 0], logs(children)
    assert f"continuing {run} after step " in children[0].said
    assert_same_run(whole, run, STEPS)


@pytest.mark.slow
def test_one_that_is_told_to_stop_stops_both_and_one_process_continues(whole, tmp_path):
    run = tmp_path / "run"
    children = pair(run, tmp_path / "first")
    try:
        wait_for(run, 8)
    finally:
        children[1].process.send_signal(signal.SIGTERM)
    assert codes(children) == [75, 75], logs(children)
    stopped = re.search(rf"stopped and saved at step (\d+) of {STEPS}", children[0].said)
    assert stopped is not None, logs(children)
    assert 8 <= int(stopped[1]) < STEPS
    assert "stopped and saved" not in children[1].said, "one speaks"
    result, shown = quiet(config(run, *OVERRIDES, "mesh.data=8", "mesh.fsdp=1", "mesh.tensor=1"), devices=8)
    assert f"continuing {run} after step {stopped[1]} of {STEPS}" in shown
    assert result.step == STEPS
    assert_close_run(whole, run, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mesh.data=3", "error: mesh data 3 × fsdp 2 × tensor 2 does not multiply to the 8 devices there are"),
        ("data.batch=15", "error: data.batch 15 cannot be split over 4 devices"),
        ("seed=1", "belongs to another config: seed was 0, is 1"),
    ],
)
def test_bad_input_ends_all_processes_with_one_line_and_2(whole, change, message, tmp_path):
    children = pair(whole if change == "seed=1" else tmp_path / "run", tmp_path, change)
    assert codes(children) == [2, 2], logs(children)
    for child in children:
        errors = [line for line in child.said.splitlines() if "error: " in line]
        assert len(errors) == 1, logs(children)
        assert message in errors[0]


@pytest.mark.slow
def test_a_process_that_does_not_come_is_named_by_all_that_do(tmp_path):
    train = ("-m", "vlora_jax.cli.main", "train", "distributed.start_seconds=8")
    here = launch(tmp_path, *train, count=3, absent=1)
    assert codes(here, 100) == [2, 2], logs(here)
    for child in here:
        assert re.fullmatch(r"error: process 2 of 3 did not come to localhost:\d+ within 8 s\n", child.said), logs(here)


def test_who_is_missing_is_named_where_jax_finds_the_address(monkeypatch):
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    for name, value in (job | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).items():
        monkeypatch.setenv(name, value)
    for name in processes.EXPLICIT:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"process 1 of 2 did not come to localhost:\d+ within 1 s"):
        processes.start(1, 1)
