"""Sweeps: who is a member, who shares a program, what is refused, and the command from start to end."""

import datetime
import io
import json
from contextlib import nullcontext
from pathlib import Path

import jax
import pytest
import yaml
from commands import call
from rich.console import Console
from tiny_sweep import LORA, MODEL, RUN, members, write_base

from vlora_jax.errors import ConfigError, ResumeError
from vlora_jax.experiments import outcomes, sweep_report
from vlora_jax.experiments.session import Standing
from vlora_jax.experiments.sweep import SWEEP, Member, SweepConfig, frozen_at_random, load_sweep, open_sweep, programs
from vlora_jax.experiments.sweep import members as members_of
from vlora_jax.training.config import load_config
from vlora_jax.training.progress import Progress
from vlora_jax.training.results import read_run

ONE = jax.devices()[:1]
TINY = [*RUN, *LORA]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "run")


def sweep_file(folder, **values):
    path = folder / "sweep.yaml"
    given = {"results": str(folder / "results"), "set": MODEL, "grid": {"seed": [0, 1]}}
    path.write_text(yaml.safe_dump(given | values, sort_keys=False))
    return path


def test_the_grid_gives_every_combination_with_its_values_in_the_config(tmp_path):
    grid = {"optimizer.rate": [1e-3, 1e-2], "adapter.targets": ["q|v", ["up", "down"]], "seed": [3, 4]}
    given = load_sweep(sweep_file(tmp_path, grid=grid, set=[*MODEL, "adapter.method=lora", "steps=1{seed}"]))
    found = members_of(given)
    assert [member.number for member in found] == list(range(8))
    assert found[0].name == "rate 0.001, targets q|v, seed 3"
    assert found[0].setting == found[1].setting == "rate 0.001, targets q|v"
    last = found[-1].config
    assert (last.optimizer.rate, last.adapter.targets, last.seed, last.steps) == (0.01, ("up", "down"), 4, 14)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gird": {}}, "unknown key 'gird'; nearest: 'grid'"),
        ({"grid": {}}, "grid is empty; give it keys with values"),
        ({"grid": {"seed": []}}, "grid: seed has no values"),
        ({"grid": {"seed": [1, 2, 1]}}, "grid: seed lists 1 twice"),
        ({"grid": {"optimizer.rat": [0.1]}}, "unknown key 'optimizer.rat'; nearest: 'optimizer.rate'"),
        ({"grid": {"steps": [datetime.date(2026, 1, 1)]}}, "steps: Input should be a valid integer"),
        ({"grid": {"optimizer.rate": [-1.0]}}, "optimizer.rate: Input should be greater than 0"),
        ({"grid": {"run_dir": ["a", "b"]}}, "grid: run_dir is the same for all members of a sweep; give it in set"),
        ({"grid": {"evaluate.metric": ["loss"]}}, "evaluate.metric is the same for all members"),
        ({"grid": {"steps": [1, 2]}, "set": ["data.batch=1{seed}"]}, "{seed} in it, but the grid has no seed"),
        ({"grid": {"optimizer.rate": [None, 3e-3]}}, "are the same run; drop one of them"),
        ({"set": [*MODEL, "adapter.method=lora", "adapter.rank=500"]}, "seed 0: lora: rank 500 is above"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(values, message, tmp_path, capsys):
    code, out, error = call(capsys, "sweep", sweep_file(tmp_path, **values))
    assert (code, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_results_from_before_an_option_was_there_stay_its_own(tmp_path):
    given = load_sweep(sweep_file(tmp_path))
    open_sweep(given, members_of(given)[0])
    assert "quantize" not in (Path(given.results) / SWEEP).read_text(), "as it was written then"
    quantised = load_sweep(sweep_file(tmp_path), ["quantize=nf4"])
    with pytest.raises(ResumeError, match=r"quantize was absent, is 'nf4'"):
        open_sweep(quantised, members_of(quantised)[0])


def test_the_results_of_another_sweep_are_refused(tmp_path):
    given = load_sweep(sweep_file(tmp_path))
    open_sweep(given, members_of(given)[0])
    open_sweep(given, members_of(given)[0])
    longer = load_sweep(sweep_file(tmp_path), ["steps=3"])
    with pytest.raises(
        ResumeError, match=r"belongs to another sweep: set was .* is .*steps was 500, is 3; choose another"
    ):
        open_sweep(longer, members_of(longer)[0])
    wider = load_sweep(sweep_file(tmp_path, grid={"seed": [0, 1, 2]}))
    with pytest.raises(ResumeError, match=r"grid.seed was \[0, 1\], is \[0, 1, 2\]"):
        open_sweep(wider, members_of(wider)[0])
    kept = load_sweep(sweep_file(tmp_path, keep="all"))
    open_sweep(kept, members_of(kept)[0])
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "main.tex").touch()
    with pytest.raises(ResumeError, match="is not empty and holds no sweep"):
        open_sweep(given.model_copy(update={"results": str(tmp_path / "thesis")}), members_of(given)[0])


def test_members_share_a_program_where_only_numbers_differ(base):
    changes = [
        ["seed=1"], ["seed=2", "optimizer.rate=0.1", "steps=9"], ["adapter.rank=4"], ["adapter.alpha=1"],
        ["data.batch=8"], ["adapter.dropout=0.1"], ["adapter.method=loha", "adapter.rank=2"],
        ["adapter.method=loha", "adapter.rank=3"], ["optimizer.name=adafactor"],
        ["optimizer.name=adafactor", "adapter.rank=4"], ["optimizer.name=adafactor", "seed=1"],
    ]  # fmt: skip
    plan = programs(members(base, *changes), ONE)
    assert [[member.number for member in program.members] for program in plan] == [
        [0, 1, 2, 3], [4], [5], [6], [7], [8, 10], [9],
    ]  # fmt: skip
    assert len({id(job.data) for program in plan[:1] for job in program.jobs}) == 1  # read once
    assert sweep_report.plan_lines(plan, 8)[0] == "11 members in 7 programs, one after the other"
    assert "program 0: 4 members over 4 devices: " in sweep_report.plan_lines(plan, 8)[1]
    few = programs(members(base, *changes[:4], ["adapter.alpha=2"]), ONE, together=2)
    assert [len(program.members) for program in few] == [2, 2, 1]


def test_a_base_that_is_drawn_from_the_seed_is_shared_by_one_seed_only():
    drawn = [*MODEL, *RUN, "adapter.method=lora", "adapter.targets=attn|mlp", "adapter.rank=2"]
    own = [["seed=0"], ["seed=1"], ["seed=0", "adapter.rank=1"]]
    many = [Member(n, {}, load_config(None, [*drawn, *changes])) for n, changes in enumerate(own)]
    plan = programs(many, ONE)
    assert [[member.number for member in program.members] for program in plan] == [[0, 2], [1]]
    assert frozen_at_random(plan[0].jobs[0])


def outcome(number, accuracy, loss=1.0, fault="", **values):
    progress = Progress(best={"step": 5, "loss": loss, "accuracy": accuracy} if accuracy is not None else None)
    standing = Standing(progress, 5, {}, None, fault)
    return outcomes.Outcome(
        Member(number, values, load_config(None, [f"seed={values['seed']}"])), standing, 0, number, 7
    )


def test_settings_are_ranked_by_their_mean_over_seeds():
    """Not by their best seed; those of which a member failed come last."""
    found = [
        outcome(0, 0.9, rate=1, seed=0), outcome(1, 0.5, rate=1, seed=1),
        outcome(2, 0.8, rate=2, seed=0), outcome(3, 0.7, loss=0.5, rate=2, seed=1),
        outcome(4, 0.95, rate=3, seed=0), outcome(5, None, fault="step 2: the loss is not finite", rate=3, seed=1),
    ]  # fmt: skip
    by_accuracy = outcomes.ranked(found, "accuracy")
    assert [setting.name for setting in by_accuracy] == ["rate 2", "rate 1", "rate 3"]
    assert by_accuracy[0].best == found[2]
    assert (by_accuracy[0].accuracy.mean, by_accuracy[0].accuracy.error) == pytest.approx((0.75, 0.05))
    assert outcomes.ranked(found, "loss")[0].best == found[3]
    assert sweep_report.cells_of(by_accuracy[2])[-1] == "1 done, 1 failed"
    (odd,) = outcomes.ranked([outcome(6, 0.5, targets="[qk]|up", seed=0)], "accuracy")
    assert r"| targets [qk]\|up | 1 |" in sweep_report.page(SweepConfig(results="x", grid={}), [odd], "accuracy")
    console = Console(file=io.StringIO(), width=200)
    console.print(sweep_report.table("", [odd]))
    assert "targets [qk]|up" in console.file.getvalue()
    page = sweep_report.page(SweepConfig(results="x", grid={"seed": [0]}), by_accuracy, "accuracy")
    assert "| rate 2 | 2 | 75.00% ± 5.00% |" in page
    assert "- rate 3, seed 1: step 2: the loss is not finite" in page


def test_a_dry_run_shows_the_programs_and_writes_nothing(base, tmp_path, capsys):
    grid = {"adapter.rank": [1, 2], "data.batch": [8, 16]}
    path = sweep_file(tmp_path, set=[*TINY, f"init_from={base}"], grid=grid)
    code, out, _ = call(capsys, "sweep", path, "--dry-run", "steps=3")
    assert (code, (tmp_path / "results").exists()) == (0, False)
    assert out.startswith("4 members in 2 programs, one after the other\n  program 0: 2 members over 2 devices: ")
    assert "rank 1, batch 8; rank 2, batch 8\n  program 1" in out


@pytest.mark.slow
def test_the_command_stops_continues_reports_and_leaves_a_winner(base, tmp_path, capsys, monkeypatch):
    path = sweep_file(tmp_path, set=[*TINY, f"init_from={base}", "steps=2"], grid={"adapter.rank": [1, 2]})
    with monkeypatch.context() as patched:
        patched.setattr("vlora_jax.cli.sweep.signals", lambda: nullcontext(lambda: True))
        code, out, _ = call(capsys, "sweep", path)
    assert (code, "stopped and saved; the same command continues" in out) == (75, True)
    code, out, _ = call(capsys, "sweep", path)
    assert (code, "after step 1" in out) == (0, True)
    results = tmp_path / "results"
    winner = read_run(results / "winner")
    assert winner.config.init_from == str(base)
    assert winner.missing == ""
    records = json.loads((results / "results.json").read_text())
    assert [record["values"]["adapter.rank"] for record in records] == [1, 2]
    best = max(records, key=lambda r: (r["progress"]["best"]["accuracy"], -r["progress"]["best"]["loss"]))
    assert winner.config.adapter.rank == best["values"]["adapter.rank"]
    assert (results / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "| setting | runs |" in (results / "README.md").read_text()
    written = (results / "winner" / "metrics.jsonl").stat().st_mtime_ns
    code, out, _ = call(capsys, "sweep", path, "--report")
    assert code == 0
    assert "rank 2" in out
    call(capsys, "sweep", path)
    assert (results / "winner" / "metrics.jsonl").stat().st_mtime_ns == written  # what is done is left alone
    code, out, _ = call(capsys, "inspect", results / "winner")
    assert (code, "attn" in out) == (0, True)


def test_a_report_without_results_says_so(tmp_path, capsys):
    code, out, _ = call(capsys, "sweep", sweep_file(tmp_path), "--report")
    assert (code, "no results in" in out) == (0, True)


def test_an_unknown_file_of_results_is_refused(tmp_path):
    given = load_sweep(sweep_file(tmp_path))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "sweep.yaml").write_text("sweep: 3\n")
    with pytest.raises(ResumeError, match="is damaged"):
        open_sweep(given, members_of(given)[0])
    (tmp_path / "results" / "sweep.yaml").unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        load_sweep(tmp_path / "swep.yaml")
