"""A run from start to end, and what it does when it is stopped, changed, damaged, or goes wrong."""

import dataclasses
import errno
import fcntl
import io
import json
import os

import jax
import numpy as np
import pytest
from rich.console import Console

from vlora_jax import checkpoint
from vlora_jax.errors import (
    BaseMismatchError,
    CheckpointError,
    ConfigError,
    ConversionError,
    NonFiniteError,
    ResourceError,
    ResumeError,
)
from vlora_jax.training.config import RunConfig, load_config
from vlora_jax.training.loop import Result, train
from vlora_jax.training.results import ordinary, read_run, write_adapter, write_ordinary
from vlora_jax.training.runs import CHECKPOINTS, lock, read_metrics, steps_of

TINY = [
    "model.layers=2", "model.width=16", "model.heads=2", "model.mlp_width=16", "model.vertical.size=2",
    "model.vertical.increment.rank=2", "data.batch=32", "steps=12", "optimizer.warmup=2", "evaluate.every=4",
    "checkpoint.every=3", "log.every=1", "log.tensorboard=false", "evaluate.batch=360",
]  # fmt: skip
LORA = ["model=null", "adapter.method=lora", "adapter.rank=2", "adapter.full=head", "optimizer.rate=1e-2"]


def config(run, *overrides: str) -> RunConfig:
    tiny = [each for each in TINY if "model=null" not in overrides or not each.startswith("model.")]
    return load_config(None, [*tiny, f"run_dir={run}", *overrides])


def quiet(run_config: RunConfig, stop_at: int | None = None, devices: int = 1) -> tuple[Result, str]:
    console = Console(file=io.StringIO(), width=200)
    asked = iter(range(1, 10_000))
    stop = None if stop_at is None else lambda: next(asked) >= stop_at
    return train(run_config, console, stop, jax.devices()[:devices]), console.file.getvalue()


def leaves_of(run, step: int) -> dict[str, np.ndarray]:
    saved = checkpoint.read(run / CHECKPOINTS, step)
    return {f"{tree}/{name}": np.asarray(leaf) for tree, flat in saved.trees.items() for name, leaf in flat.items()}


def assert_same_run(run, other, step: int):
    """Bit for bit: parameters, optimiser, random key, and the data order and loss of every step."""
    one, two = leaves_of(run, step), leaves_of(other, step)
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    steps = lambda run: [(r["step"], r["batch"], r["loss"]) for r in read_metrics(run) if r["kind"] == "train"]
    assert [step for step, *_ in steps(run)] == list(range(1, step + 1))
    assert steps(run) == steps(other)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    return run, *quiet(config(run))


def test_a_run_learns_and_leaves_what_the_readme_says(finished):
    run, result, shown = finished
    assert (result.step, result.stopped, result.progress.early) == (12, False, False)
    records = read_metrics(run)
    assert [record["step"] for record in records if record["kind"] == "held_out"] == [4, 8, 12]
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert read_run(run).config == config(run)
    assert result.progress.best["accuracy"] == max(r["accuracy"] for r in records if r["kind"] == "held_out")
    for part in ("of the dense twin's", "increments", "held-out accuracy", "seconds", "loss curve", str(run)):
        assert part in shown or part == "held-out accuracy"


def test_a_stopped_run_continues_bit_for_bit_and_says_so(finished, tmp_path):
    run, *_ = finished
    other = tmp_path / "run"
    result, shown = quiet(config(other), stop_at=5)
    assert (result.step, result.stopped) == (5, True)
    assert "stopped and saved at step 5 of 12; the same command continues" in shown
    result, shown = quiet(config(other))
    assert f"continuing {other} after step 5 of 12" in shown
    assert_same_run(run, other, 12)


def test_a_truncated_newest_checkpoint_falls_back_and_ends_the_same(finished, tmp_path):
    run, *_ = finished
    other = tmp_path / "run"
    quiet(config(other), stop_at=8)
    data = next(path for path in (other / CHECKPOINTS / "8").rglob("*") if path.parent.name == "d")
    data.write_bytes(data.read_bytes()[:-7])
    _, shown = quiet(config(other))
    assert "checkpoint 8 is damaged" in shown
    assert "using 6" in shown
    assert f"continuing {other} after step 6 of 12" in shown
    assert_same_run(run, other, 12)


def test_a_finished_run_says_so_and_changes_nothing(finished):
    run, before, _ = finished
    kept = (run / "metrics.jsonl").read_text()
    result, shown = quiet(config(run))
    assert "is finished at step 12: nothing to do" in shown
    assert (result.step, result.stopped) == (12, False)
    assert (run / "metrics.jsonl").read_text() == kept
    assert result.progress == before.progress


def test_another_config_is_refused_with_the_keys_that_differ(finished):
    run, *_ = finished
    with pytest.raises(ResumeError, match=r"optimizer\.rate was 0.003, is 0.5; seed was 0, is 1"):
        quiet(config(run, "optimizer.rate=0.5", "seed=1"))


@pytest.mark.slow
def test_what_does_not_change_the_result_may_change(finished, tmp_path):
    run, *_ = finished
    other = tmp_path / "run"
    quiet(config(other), stop_at=4)
    quiet(config(other, "checkpoint.every=5", "log.progress=false", "mesh.fsdp=2"), devices=2)
    steps = lambda run: [(r["step"], r["batch"]) for r in read_metrics(run) if r["kind"] == "train"]
    assert steps(run) == steps(other)


def test_a_directory_with_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ResumeError, match="is not empty and holds no run"):
        quiet(config(tmp_path))


@pytest.mark.slow
def test_what_a_kill_leaves_before_the_config_is_no_obstacle(tmp_path):
    (tmp_path / ".config.yaml.4242").touch()
    assert quiet(config(tmp_path, "steps=1"))[0].step == 1


@pytest.mark.slow
def test_the_best_step_stays_on_disk_also_after_ties(tmp_path):
    run = tmp_path / "run"
    tied = ["optimizer.rate=1e-30", "evaluate.every=1", "checkpoint.every=1", "steps=6"]
    result, _ = quiet(config(run, *tied))
    assert result.progress.best["step"] == 1
    assert read_run(run).step == 1


@pytest.mark.slow
def test_of_equally_accurate_steps_the_lower_loss_is_the_best(tmp_path):
    run = tmp_path / "run"
    result, _ = quiet(config(run, "optimizer.rate=1e-7", "evaluate.every=1", "checkpoint.every=1", "steps=6"))
    marks = {record["step"]: record for record in read_metrics(run) if record["kind"] == "held_out"}
    assert len({mark["accuracy"] for mark in marks.values()}) == 1
    best = min(marks, key=lambda step: marks[step]["loss"])
    assert best > 1
    assert (result.progress.best["step"], read_run(run).step) == (best, best)


@pytest.mark.slow
def test_an_adapter_keeps_the_step_it_was_trained_on(tmp_path):
    base, run = tmp_path / "base", tmp_path / "lora"
    constant = ["optimizer.schedule=constant", "optimizer.warmup=0", "evaluate.metric=loss"]
    quiet(config(base, *constant, "steps=1"))
    quiet(config(run, *LORA, f"init_from={base}", "steps=4"), stop_at=2)
    quiet(config(base, *constant, "steps=9"))  # now another step is the best
    assert read_run(base).step > 1
    with pytest.raises(CheckpointError, match="checkpoints/1 is not usable"):  # gone: said, and by name
        quiet(config(run, *LORA, f"init_from={base}", "steps=4"))


def test_two_processes_do_not_write_one_run(tmp_path):
    with lock(tmp_path), pytest.raises(ResumeError, match="another process is training in"):
        quiet(config(tmp_path))


def test_storage_without_locks_is_not_taken_for_a_second_process(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ResourceError, match=r"cannot be locked .*No locks available.*; choose a run_dir on storage"):
        quiet(config(tmp_path))


def test_a_file_is_no_run_and_is_there(finished):
    run, *_ = finished
    with pytest.raises(ConfigError, match=r"config.yaml is no run directory: there is no config.yaml in it"):
        read_run(run / "config.yaml")


@pytest.mark.slow
def test_data_that_changed_is_refused(finished, tmp_path, monkeypatch):
    from vlora_jax.training import job

    other = tmp_path / "run"
    quiet(config(other), stop_at=2)
    load = job.load_data
    monkeypatch.setattr(job, "load_data", lambda c: dataclasses.replace(load(c), fingerprint="another"))
    with pytest.raises(ResumeError, match="digits is not the data that this run was started on"):
        quiet(config(other))


@pytest.mark.slow
def test_a_finished_run_goes_on_if_nothing_done_depended_on_its_length(tmp_path):
    constant = ["optimizer.schedule=constant", "optimizer.warmup=0", "evaluate.every=100"]
    quiet(config(tmp_path / "run", *constant, "steps=3"))
    result, shown = quiet(config(tmp_path / "run", *constant, "steps=4"))
    assert (result.step, "continuing" in shown) == (4, True)


@pytest.mark.slow
def test_early_stopping_ends_the_run_at_the_patience(tmp_path):
    overrides = ["optimizer.rate=1e-30", "evaluate.patience=1", "evaluate.every=2", "steps=50"]
    result, shown = quiet(config(tmp_path / "run", *overrides))
    assert (result.step, result.stopped, result.progress.early) == (4, False, True)
    assert "no better accuracy for 1 evaluations: stopping early" in shown
    _, shown = quiet(config(tmp_path / "run", *overrides))
    assert "is finished at step 4: nothing to do" in shown


def test_a_loss_that_is_not_finite_stops_names_and_keeps(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError) as error:
        quiet(config(run, "optimizer.name=sgd", "optimizer.rate=1e30", "optimizer.clip=null", "checkpoint.every=1"))
    named = str(error.value)
    step = int(named.split(":")[0].removeprefix("step "))
    assert step > 1
    assert "the loss" in named or "the gradient of" in named
    assert f"the last good checkpoint is step {step - 1}" in named
    assert checkpoint.fault_of(run / CHECKPOINTS / str(step - 1)) is None


def test_a_held_out_loss_that_is_not_finite_is_no_best_step(tmp_path):
    """The step's own loss was taken before its update."""
    run = tmp_path / "run"
    blown = ["optimizer.rate=1e30", "optimizer.warmup=0"]
    with pytest.raises(NonFiniteError, match="step 1: the held-out loss is not finite; there was no checkpoint yet"):
        quiet(config(run, *blown, "evaluate.every=1"))
    assert [record["kind"] for record in read_metrics(run)] == ["train"]


@pytest.fixture(scope="module")
def adapted(finished, tmp_path_factory):
    """A LoRA on the model that the finished run trained."""
    base, *_ = finished
    run = tmp_path_factory.mktemp("runs") / "lora"
    return base, run, *quiet(config(run, *LORA, f"init_from={base}"))


def test_nothing_of_the_base_is_in_an_adapter_checkpoint(adapted):
    base, run, *_ = adapted
    names = leaves_of(run, 12)
    assert {name.split("/")[0] for name in names} == {"trainable", "optimizer", "rng"}
    stored = [array for array in leaves_of(base, read_run(base).step).values() if array.size > 16]
    for name, array in names.items():
        assert not any(array.shape == other.shape and (array == other).all() for other in stored), name
    adapter = read_run(run).adapter
    expected = {f"trainable/{part}/{path}" for part, path in _paths(adapter.trainable)}
    assert {name for name in names if name.startswith("trainable")} == expected


def _paths(trainable):
    from vlora_jax.adapters.trees import flatten

    return [(part, path) for part in ("sites", "full") for path in flatten(trainable[part])]


def test_the_base_is_bit_identical_after_training_and_the_start_is_reported(adapted):
    base, run, result, shown = adapted
    trained = read_run(run)
    for path, leaf in leaves_of(base, read_run(base).step).items():
        if path.startswith("trainable/"):
            from vlora_jax.adapters.trees import flatten

            np.testing.assert_array_equal(np.asarray(flatten(trained.base)[path.removeprefix("trainable/")]), leaf)
    assert result.progress.first["step"] == 0
    assert result.progress.first["loss"] == pytest.approx(_held_out_loss(base), abs=1e-6)
    assert "held-out before" in shown


def _held_out_loss(run) -> float:
    best = read_run(run).step
    return next(r["loss"] for r in read_metrics(run) if r["kind"] == "held_out" and r["step"] == best)


@pytest.mark.slow
def test_merged_parameters_compute_what_the_bound_adapter_computes(adapted, tmp_path):
    _, run, *_ = adapted
    written = write_ordinary(read_run(run), tmp_path / "merged")
    assert written.gap < 1e-5
    assert written.largest > 0.1
    result, _ = quiet(config(tmp_path / "more", "model=null", f"init_from={tmp_path / 'merged'}", "steps=1"))
    best = next(r["loss"] for r in read_metrics(run) if r["kind"] == "held_out" and r["step"] == read_run(run).step)
    assert result.progress.first["loss"] == pytest.approx(best, abs=1e-5)
    with pytest.raises(ResourceError, match="is there already"):
        write_ordinary(read_run(run), tmp_path / "merged")
    with pytest.raises(CheckpointError, match="holds parameters only"):
        quiet(read_run(tmp_path / "merged").config)
    trained = read_run(run)
    broken = trained.adapter.with_trainable(jax.tree.map(lambda leaf: leaf * np.nan, trained.adapter.trainable))
    with pytest.raises(ConversionError, match="the merged model's logits are not finite"):
        write_ordinary(dataclasses.replace(trained, adapter=broken), tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_an_adapter_that_was_made_elsewhere_cannot_be_trained_on(adapted, tmp_path):
    """As `vlora-jax import` leaves it: no data, no optimiser."""
    _, run, *_ = adapted
    trained = read_run(run)
    made = dataclasses.replace(trained, about={"source_step": trained.about["source_step"]})
    written = write_adapter(made, tmp_path / "made", {"peft": "elsewhere"})
    with pytest.raises(CheckpointError, match=r"made holds an adapter only: .*\. Merge it and start from that with"):
        quiet(written.config)


@pytest.mark.slow
def test_an_adapter_stands_on_the_base_it_was_trained_on_only(adapted, tmp_path):
    base, *_ = adapted
    other, run = tmp_path / "other", tmp_path / "lora"
    quiet(config(run, *LORA, f"init_from={base}"), stop_at=2)
    quiet(config(other, "seed=3", "evaluate.every=100", "checkpoint.every=1", "checkpoint.keep=20"))
    path = run / "config.yaml"
    path.write_text(path.read_text().replace(str(base), str(other)))
    with pytest.raises(BaseMismatchError, match="was trained on a base with fingerprint"):
        quiet(config(run, *LORA, f"init_from={other}"))
    with pytest.raises(BaseMismatchError, match="gives another base"):
        ordinary(read_run(run))


def test_a_run_starts_from_the_step_that_it_records_while_the_other_goes_on(finished, tmp_path, monkeypatch):
    from vlora_jax.training import job

    base, *_ = finished
    steps = iter(steps_of(base))
    with monkeypatch.context() as patched:
        patched.setattr(job, "best_step", lambda run: next(steps))  # another one with each question
        quiet(config(tmp_path / "run", *LORA, f"init_from={base}", "steps=1"))
    assert next(steps, None) is not None, "asked once"
    assert read_run(tmp_path / "run").missing == ""


def test_an_adapter_run_cannot_be_the_start_of_another(adapted, tmp_path):
    _, run, *_ = adapted
    with pytest.raises(ConfigError, match="holds an adapter, not a model; merge it first: vlora-jax merge"):
        quiet(config(tmp_path / "x", "model=null", f"init_from={run}"))


def test_a_start_that_is_not_there_is_told_with_who_wants_it(tmp_path):
    lost = config(tmp_path / "lora", *LORA, f"init_from={tmp_path / 'moved'}")
    with pytest.raises(ConfigError, match=r"init_from of \S*/lora: \S*/moved does not exist"):
        quiet(lost)


def test_metrics_survive_a_torn_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = json.dumps({"step": 1, "kind": "train"})
    path.write_bytes(first.encode() + b'\n\x00\x00\n[]\n\xff\xfe\n{"ste{"step": 3}\n{"step": 2, "ki')
    assert read_metrics(tmp_path) == [{"step": 1, "kind": "train"}]


def test_a_fresh_process_draws_the_same_start(finished):
    """The seed alone decides the parameters, on any mesh."""
    run, *_ = finished
    from vlora_jax.training.job import Job

    job = Job.of(config(run))
    with jax.set_mesh(job.mesh):
        first = job.start()[1]
    alone = Job.of(config(run), jax.devices()[:1])
    with jax.set_mesh(alone.mesh):
        again = alone.start()[1]
    assert checkpoint.fingerprint(first.trainable) == checkpoint.fingerprint(again.trainable)
