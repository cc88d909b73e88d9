"""Comparisons: what is run, what is kept, and what is said of it."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy import stats

from vlora_jax.errors import CheckpointError, ConfigError
from vlora_jax.experiments import compare as module
from vlora_jax.experiments import report
from vlora_jax.experiments.compare import CompareConfig, Record, cells, compare, done, load_comparison, read_record
from vlora_jax.training.loop import Progress

SMALL = ["model.layers=1", "model.width=8", "model.heads=2", "model.vertical=null", "data.batch=8"]


def comparison(folder, **changes):
    values = {
        "results": str(folder),
        "seeds": 2,
        "tasks": {"digits": {"set": [*SMALL, "steps=2"]}},
        "methods": {"lora": ["adapter.method=lora", "adapter.rank=1"], "diagonal": None},
    }
    return CompareConfig.model_validate(values | changes)


@pytest.fixture
def counted(monkeypatch):
    """Runs that are not trained: their accuracy is drawn from the seed."""
    ran = []

    def run_cell(cell, stop=None):
        ran.append((cell.task, cell.method, cell.seed))
        return module.record_of(cell, 0.5 + cell.seed / 10, 1.0, 7, 0, 1.0, 2.0)

    monkeypatch.setattr(module, "run_cell", run_cell)
    return ran


def test_a_run_is_the_run_that_train_makes(tmp_path):
    """Its numbers are those of the same config, trained by itself."""
    cell = cells(comparison(tmp_path, seeds=1), methods=["diagonal"])[0]
    (record,) = compare([cell])
    alone = module.train(
        cell.config.model_copy(update={"run_dir": str(tmp_path / "alone")}), module.Console(quiet=True)
    )
    assert alone.progress.last is not None
    assert (record.accuracy, record.loss) == (alone.progress.last["accuracy"], alone.progress.last["loss"])
    assert record.trained == sum(leaf.size for leaf in jax.tree.leaves(alone.state.trainable))
    assert record.steps == 2
    assert record.cpu_seconds > 0
    assert read_record(cell.path) == record
    assert list(tmp_path.rglob("checkpoints")) == [tmp_path / "alone/checkpoints"]  # the run itself is not kept


def test_only_what_is_missing_is_run(tmp_path, counted):
    wanted = cells(comparison(tmp_path))
    assert [cell.seed for cell in wanted] == [0, 0, 1, 1]  # seed by seed: half of a comparison is one of fewer seeds
    list(compare(wanted[:1]))
    assert len(list(compare(wanted))) == 4
    assert len(counted) == len(set(counted)) == 4
    list(compare(cells(comparison(tmp_path, seeds=3))))
    assert counted[4:] == [("digits", "lora", 2), ("digits", "diagonal", 2)]


def test_a_result_of_another_config_is_out_of_date(tmp_path, counted):
    list(compare(cells(comparison(tmp_path))))
    longer = cells(comparison(tmp_path, tasks={"digits": {"set": [*SMALL, "steps=3"]}}))
    assert all(done(cell) is None for cell in longer)
    elsewhere = [replace(cell, config=cell.config.model_copy(update={"run_dir": "runs/x"})) for cell in longer]
    assert [cell.key for cell in elsewhere] == [cell.key for cell in longer]


def test_a_stopped_run_leaves_no_result_and_ends_the_comparison(tmp_path, monkeypatch):
    def stopped(config, console, stop):
        assert stop()
        return SimpleNamespace(stopped=True, progress=Progress())

    monkeypatch.setattr(module, "train", stopped)
    wanted = cells(comparison(tmp_path))
    assert list(compare(wanted, stop=lambda: True)) == []
    assert not list(tmp_path.rglob("*.json"))


def test_a_run_that_diverges_is_a_result(tmp_path, monkeypatch):
    def diverging(*_):
        raise module.NonFiniteError("step 3: the loss is not finite")

    monkeypatch.setattr(module, "train", diverging)
    (record, _) = compare(cells(comparison(tmp_path, seeds=1)))
    assert record.accuracy is None
    assert record.failure == "step 3: the loss is not finite"
    line = report.lines(comparison(tmp_path), [record])[0]
    assert (line.accuracy, line.failed) == (None, 1)
    assert report.cells_of(line)[3] == "0, 1 failed"


def test_a_grid_gives_every_method_every_value(tmp_path):
    given = comparison(tmp_path, grid={"optimizer.rate": [0.1, 0.01]}, seeds=1, baseline="lora@0.01")
    assert [(cell.method, cell.config.optimizer.rate) for cell in cells(given)] == [
        ("lora@0.1", 0.1), ("lora@0.01", 0.01), ("diagonal@0.1", 0.1), ("diagonal@0.01", 0.01),
    ]  # fmt: skip


def test_the_seed_stands_in_changes(tmp_path):
    tasks = {"digits": {"set": [*SMALL, "steps=1{seed}"]}}
    assert [cell.config.steps for cell in cells(comparison(tmp_path, tasks=tasks), methods=["lora"])] == [10, 11]


def records(marks):
    """Results from accuracies, `{method: [of seed 0, …]}`."""
    return [
        Record("digits", method, seed, "", accuracy, 0.0, 10, 2, 1e-3, 5, 1.0, 2.0)
        for method, accuracies in marks.items()
        for seed, accuracy in enumerate(accuracies)
    ]


def test_differences_are_taken_seed_by_seed():
    """The numbers of SciPy's paired t-test on the same accuracies."""
    rng = np.random.default_rng(0)
    lora = rng.uniform(0.5, 0.9, 6)
    up_and_down = np.array([0.05, -0.04, 0.03, -0.05, 0.04, -0.02])
    marks = {"lora": lora, "better": lora + 0.02 + rng.normal(0, 0.002, 6), "like": lora + up_and_down}
    given = comparison("x", methods=dict.fromkeys(marks))
    found = {line.method: line for line in report.lines(given, records(marks))}
    for method in ("better", "like"):
        test = stats.ttest_rel(marks[method], lora)
        line = found[method]
        assert line.difference.mean == pytest.approx(test.statistic * line.difference.error)
        assert line.beyond_noise == (test.pvalue < 0.05)
        low, high = test.confidence_interval(report.CONFIDENCE)
        assert line.difference.interval() == pytest.approx((high - low) / 2)
    assert found["better"].beyond_noise
    assert not found["like"].beyond_noise
    assert found["lora"].difference is None
    assert found["lora"].accuracy.error == pytest.approx(stats.sem(lora))


def test_only_common_seeds_are_compared():
    found = report.lines(comparison("x"), records({"lora": [0.5, 0.6], "diagonal": [0.7, 0.8, 0.1]}))
    line = next(line for line in found if line.method == "diagonal")
    assert (line.difference.count, line.accuracy.count) == (2, 3)
    assert line.difference.mean == pytest.approx(0.2)


def test_one_run_is_not_called_beyond_noise():
    found = report.lines(comparison("x"), records({"lora": [0.5], "diagonal": [0.9]}))
    assert [line.method for line in found] == ["diagonal", "lora"]
    assert found[0].beyond_noise is None
    assert math.isnan(found[0].accuracy.error)
    page = report.markdown(comparison("x"), found)
    assert "| diagonal | 10 | 0.001 | 1 | 90.0% | +40.0% |  | 2 |" in page
    assert "2 are trained whole" in page


WRONG = {
    "baseline: lira": "baseline 'lira' is none of the methods; nearest: 'lora'",
    "tusks: {}": "unknown key 'tusks'; nearest: 'tasks'",
    "tasks: {a: {sed: []}}": "unknown key 'tasks.a.sed'; nearest: 'tasks.a.se",
    "tasks: {}": "tasks: Dictionary should have at least 1 item",
    "methods: {lora: [adapter.method=lora], lira: null}": "lira on digits: ",
    "tasks: {digits: {set: [stepz=3]}}": "lora on digits: config: unknown key 'stepz'; nearest: 'steps'",
}


@pytest.mark.parametrize("change", WRONG)
def test_a_wrong_comparison_is_one_line(change, tmp_path):
    path = tmp_path / "compare.yaml"
    lines = ["results: r", "tasks: {digits: {set: []}}", "methods: {lora: null}"]
    key = change.split(":")[0]
    path.write_text("\n".join([*(line for line in lines if not line.startswith(f"{key}:")), change]))
    with pytest.raises(ConfigError) as error:
        cells(load_comparison(path))
    assert WRONG[change] in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names_are_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="no method 'lara'; nearest: 'lora'"):
        cells(comparison(tmp_path), methods=["lara"])
    with pytest.raises(ConfigError, match="no task 'digit'; nearest: 'digits'"):
        cells(comparison(tmp_path), tasks=["digit"])


def test_a_torn_result_is_named(tmp_path, counted):
    wanted = cells(comparison(tmp_path))
    list(compare(wanted))
    wanted[0].path.write_text(json.dumps({"task": "digits"}))
    with pytest.raises(CheckpointError, match="is no result of a comparison; remove it"):
        list(compare(wanted))
