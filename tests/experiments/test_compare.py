"""Comparisons: what is run, what is kept, and what is said of it."""

import base64
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from commands import call
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

from vlora_jax.cli.compare import write_reports
from vlora_jax.errors import CheckpointError, ConfigError, ResourceError
from vlora_jax.experiments import compare as module
from vlora_jax.experiments import report
from vlora_jax.experiments.compare import CompareConfig, Record, cells, compare, done, load_comparison, read_record
from vlora_jax.experiments.page import write_names
from vlora_jax.training.loop import Progress

ROOT = Path(__file__).parents[2]
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
        return module.record_of(cell, 1.0, 2.0, accuracy=0.5 + cell.seed / 10, loss=1.0, trained=7)

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
    assert record.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves((alone.state.trainable, alone.state.frozen)))
    assert (record.steps, record.forgetting) == (2, None)
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
    assert (line.mark, line.failed) == (None, 1)
    assert report.cells_of(line)["runs"] == "0, 1 failed"


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
    """The numbers of SciPy's paired t-test on the same accuracies, corrected for the number of methods."""
    rng = np.random.default_rng(0)
    lora = rng.uniform(0.5, 0.9, 6)
    up_and_down = np.array([0.05, -0.04, 0.03, -0.05, 0.04, -0.02])
    marks = {"lora": lora, "better": lora + 0.02 + rng.normal(0, 0.002, 6), "like": lora + up_and_down}
    given = comparison("x", methods=dict.fromkeys(marks))
    found = {line.method: line for line in report.lines(given, records(marks))}
    chances = {method: stats.ttest_rel(marks[method], lora).pvalue for method in ("better", "like")}
    for method in chances:
        line = found[method]
        assert line.difference.mean == pytest.approx(
            stats.ttest_rel(marks[method], lora).statistic * line.difference.error
        )
        assert line.difference.chance() == pytest.approx(chances[method])
    assert found["better"].chance == pytest.approx(2 * chances["better"])  # the smaller of two
    assert found["like"].chance == pytest.approx(max(chances["like"], 2 * chances["better"]))
    assert found["better"].beyond_noise
    assert not found["like"].beyond_noise
    assert (found["lora"].difference, found["lora"].chance) == (None, None)
    assert found["lora"].mark.error == pytest.approx(stats.sem(lora))


def test_holm_s_correction_never_errs_more_often_than_asked():
    """Of five true hypotheses, in at most 5 % of the cases one is rejected; without it, in 23 %."""
    draws = np.random.default_rng(0).uniform(size=(2000, 5))
    wrong = [min(report.holm(each)) < 0.05 for each in draws.tolist()]
    assert np.mean(wrong) == pytest.approx(0.049, abs=0.015)
    assert (draws.min(1) < 0.05).mean() > 0.2
    assert report.holm([]) == []


def test_no_spread_is_no_chance_at_all():
    assert report.Mark.of([0.1, 0.1]).chance() == 0.0
    assert report.Mark.of([0.0, 0.0]).chance() == 1.0
    assert report.Mark.of([0.1]).chance() is None


def test_methods_are_ordered_by_the_task_s_metric():
    marks = {"lora": [0.5, 0.625], "diagonal": [0.75, 0.875]}
    runs = [replace(each, loss=each.accuracy, forgetting=0.25) for each in records(marks)]
    tasks = {"digits": {"set": [*SMALL, "steps=2"], "metric": "loss"}}
    found = report.lines(comparison("x", tasks=tasks), runs)
    assert [(line.method, line.mark.mean) for line in found] == [("lora", 0.5625), ("diagonal", 0.8125)]
    texts = report.cells_of(found[1])
    assert (texts["loss"], texts["difference"]) == ("0.8125 ± 0.0625", "+0.25 ± 0")
    assert texts["forgetting"] == "+0.250 ± 0.000"


def test_the_frontier_is_what_none_beats_with_as_few():
    """Against the definition, pair by pair."""
    rng = np.random.default_rng(1)
    names = [f"m{number}" for number in range(12)]
    given = comparison("x", methods=dict.fromkeys([*names, "lora"]))
    runs = [
        Record("digits", name, 0, "", accuracy, 0.0, int(numbers), 0, 1e-3, 5, 1.0, 2.0)
        for name, accuracy, numbers in zip(names, rng.uniform(size=12), rng.integers(1, 9, 12), strict=True)
    ]
    beaten = lambda one: any(
        other.trained <= one.trained and other.accuracy >= one.accuracy and other is not one for other in runs
    )
    found = report.frontier(report.lines(given, runs))
    assert {line.method for line in found} == {run.method for run in runs if not beaten(run)}
    assert [line.trained for line in found] == sorted(line.trained for line in found)


def test_the_page_holds_everything_and_the_report_its_plots(tmp_path):
    given = comparison(tmp_path)
    path, page = tmp_path / "out/README.md", tmp_path / "page.html"
    found = report.lines(given, records({"lora": [0.5, 0.6], "<b>": [0.7, 0.8]}))
    write_reports(given, found, path, page)
    assert "![digits: accuracy against numbers trained](pareto_digits.png)" in path.read_text()
    plot = (tmp_path / "out/pareto_digits.png").read_bytes()
    assert plot.startswith(b"\x89PNG")
    text = page.read_text()
    assert base64.b64encode(plot).decode() in text
    assert "<td>&lt;b&gt;</td>" in text
    assert "prefers-color-scheme: dark" in text
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text)  # nothing is fetched


def test_names_in_a_plot_cover_neither_each_other_nor_points():
    figure = Figure(figsize=(10, 6.5), dpi=120)
    axes, rng = figure.add_subplot(), np.random.default_rng(0)
    places = rng.normal(size=(25, 2)) * (0.02, 0.1)  # most of them behind each other
    axes.set(xlim=(-1, 1), ylim=(-1, 1))
    write_names(figure, axes, [(f"a method {i}", *place, i < 3, "k") for i, place in enumerate(places)])
    boxes = [text.get_window_extent().padded(-1) for text in axes.texts]
    assert len(boxes) == 25
    points = axes.transData.transform(places)
    for one, box in enumerate(boxes):
        assert not box.count_contains(points)
        assert not box.count_overlaps(boxes[:one])


def test_any_name_can_be_written_and_shown(tmp_path):
    """Slashes of a task in the file of its plot, bars of a method in Markdown, brackets in the terminal."""
    given = comparison(tmp_path, tasks={"digits/[all]": {"set": SMALL}})
    runs = [replace(run, task="digits/[all]") for run in records({"lora": [0.5, 0.6], "lora@[qv]|up": [0.7, 0.8]})]
    found = report.lines(given, runs)
    write_reports(given, found, tmp_path / "README.md", None)
    text = (tmp_path / "README.md").read_text()
    assert r"| lora@[qv]\|up | 75.0% ± 5.0% |" in text
    assert "](pareto_digits__all_.png)" in text
    assert (tmp_path / "pareto_digits__all_.png").exists()
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table("digits/[all]", found))
    assert "digits/[all]" in console.file.getvalue()
    assert "lora@[qv]|up" in console.file.getvalue()
    with pytest.raises(ResourceError, match="cannot be written: Is a directory"):
        write_reports(given, found, tmp_path, None)


def test_json_of_single_runs_is_json(tmp_path, counted, capsys):
    """Which has no NaN, as the standard error of one run is."""
    path = tmp_path / "compare.yaml"
    path.write_text(comparison(tmp_path / "results", seeds=1).model_dump_json())
    assert call(capsys, "compare", path)[0] == 0
    code, out, _ = call(capsys, "compare", path, "--report", "--json")
    lines = json.loads(out, parse_constant=pytest.fail)
    assert (code, [line["method"] for line in lines]) == (0, ["lora", "diagonal"])
    assert [line["mark"] for line in lines] == [{"mean": 0.5, "error": "nan", "count": 1}] * 2


def test_a_method_that_is_not_there_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    path = tmp_path / "compare.yaml"
    task = {"set": SMALL, "prepare": [str(ROOT / "configs/default.yaml")]}
    path.write_text(comparison(tmp_path, tasks={"digits": task}).model_dump_json())
    monkeypatch.setattr(module, "train", lambda *_: pytest.fail("trained"))
    code, _, error = call(capsys, "compare", path, "--report", "--dry-run")
    assert (code, error.count("\n"), "ask for one of them" in error) == (2, 1, True)
    code, _, error = call(capsys, "compare", path, "--method", "lara")
    assert (code, "no method 'lara'; nearest: 'lora'" in error) == (2, True)


@pytest.mark.slow
def test_what_could_be_done_before_is_measured(tmp_path):
    """The rise of the loss on other data is that of two evaluations."""
    start = [*SMALL, "steps=2", "evaluate.every=1", f"run_dir={tmp_path / 'start'}"]
    assert not module.train(module.load_config(None, start), module.Console(quiet=True)).stopped
    task = {
        "set": ["model=null", f"init_from={tmp_path / 'start'}", "data.batch=8", "data.turns=1", "steps=3"],
        "forget": ["data.turns=0"],
    }
    given = comparison(
        tmp_path / "results", tasks={"turned": task}, seeds=1, baseline="diagonal", methods={"diagonal": None}
    )
    (cell,) = cells(given)
    (record,) = compare([cell])
    config = cell.config.model_copy(update={"run_dir": str(tmp_path / "again")})
    module.train(config, module.Console(quiet=True))
    plain = module.load_data(cell.before)
    loss = lambda opened: module.held_out_marks(opened, opened.adapters, plain, 360).loss
    after, before = loss(module.open_model(config.run_dir)), loss(module.open_model(str(tmp_path / "start")))
    assert record.forgetting == pytest.approx(after - before, abs=1e-6)
    assert after != before
    assert replace(cell, before=None).key != cell.key


def test_runs_that_a_task_starts_from_are_trained_once(tmp_path, monkeypatch):
    path, ran = tmp_path / "start.yaml", []
    path.write_text(f"run_dir: {tmp_path / 'start'}")
    monkeypatch.setattr(
        module, "train", lambda config, *_: ran.append(config.run_dir) or SimpleNamespace(stopped=False)
    )
    task = {"set": SMALL, "prepare": [str(path)]}
    given = comparison(tmp_path, tasks={"one": task, "two": task, "other": {"set": SMALL}})
    assert module.prepare(given)
    assert ran == [str(tmp_path / "start")]
    assert module.prepare(given, ["other"])
    assert len(ran) == 1
    monkeypatch.setattr(module, "train", lambda *_: SimpleNamespace(stopped=True))
    assert not module.prepare(given)


def test_what_one_method_alone_trains_whole_counts():
    """The head, 2 numbers here, is everyone's; BitFit's biases are its own."""
    runs = records({"lora": [0.5], "bitfit": [0.6]})
    runs[1] = replace(runs[1], trained=0, whole=9)
    found = {line.method: (line.trained, line.whole) for line in report.lines(comparison("x"), runs)}
    assert found == {"lora": (10, 2), "bitfit": (7, 2)}


def test_only_common_seeds_are_compared():
    found = report.lines(comparison("x"), records({"lora": [0.5, 0.6], "diagonal": [0.7, 0.8, 0.1]}))
    line = next(line for line in found if line.method == "diagonal")
    assert (line.difference.count, line.mark.count) == (2, 3)
    assert line.difference.mean == pytest.approx(0.2)


def test_one_run_is_not_called_beyond_noise():
    found = report.lines(comparison("x"), records({"lora": [0.5], "diagonal": [0.9]}))
    assert [line.method for line in found] == ["diagonal", "lora"]
    assert found[0].beyond_noise is None
    assert math.isnan(found[0].mark.error)
    page = report.markdown(comparison("x"), found)
    assert "| diagonal | 90.0% | +40.0% | 1 | 10 | 0.001 | 2 |" in page
    assert "2 are trained whole" in page


WRONG = {
    "baseline: lira": "baseline 'lira' is none of the methods; nearest: 'lora'",
    "tusks: {}": "unknown key 'tusks'; nearest: 'tasks'",
    "tasks: {a: {sed: []}}": "unknown key 'tasks.a.sed'; nearest: 'tasks.a.se",
    "tasks: {}": "tasks: Dictionary should have at least 1 item",
    "methods: {lora: [adapter.method=lora], lira: null}": "lira on digits: ",
    "grid: {optimizer.rate: []}": "grid.optimizer.rate: List should have at least 1 item",
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


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_comparisons_that_come_with_the_project_are_possible(path, monkeypatch):
    """But for a size for a budget, which takes a model's shapes: those of a run, or of files on a hub."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(module, "fitted", lambda config, numbers: config)
    given = load_comparison(path)
    assert len(cells(given)) >= 2
    for cell in cells(given):
        starts = [module.load_config(Path(each)).run_dir for each in given.tasks[cell.task].prepare]
        assert not starts or cell.config.init_from in starts


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
