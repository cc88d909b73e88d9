"""inspect and diff of all there is to look at: runs, checkpoints, PEFT directories, models; and mistakes."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest
from commands import call
from helpers import filled, mostly_slow
from peft_tiny import LLAMA, Q, tensors, write
from rich.console import Console

from vlora_jax.cli.shown import table, write_csv
from vlora_jax.hub.save import save
from vlora_jax.inspection.kinds import sheet
from vlora_jax.inspection.tables import ChangeRow, Spread
from vlora_jax.models.build import abstract_model
from vlora_jax.training.exchange import head_of, import_adapter
from vlora_jax.training.runs import METRICS

SITES = ["layers/block/attn/q", "layers/block/attn/v"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, another one of its shape, adapters of both in PEFT's files, and a run."""
    folder = tmp_path_factory.mktemp("looks")
    graphdef, shapes = abstract_model(LLAMA)
    for seed, name in enumerate(("model", "other")):
        save(folder / name, graphdef, filled(shapes, seed))
    for name, seed, base in (("one", 3, "model"), ("two", 4, "model"), ("far", 3, "other")):
        write(folder / name, tensors(seed=seed), base_model_name_or_path=str(folder / base))
    section = {"source": str(folder / "model"), **head_of(folder / "one")}
    import_adapter(folder / "one", folder / "run", section)
    (folder / "run" / METRICS).write_text(
        "".join(json.dumps({"step": s, "kind": "train", "loss": 1 / s}) + "\n" for s in (1, 2, 3))
    )
    return folder


def changes_of(name: str, seed: int) -> np.ndarray:
    """ΔW of q in each layer, from the file's tensors: alpha 3 over rank 2."""
    made = tensors(seed=seed)
    side = lambda which, layer: made[f"{Q.format(layer)}.lora_{which}.weight"].astype(np.float64)
    return np.stack([1.5 * side("A", layer).T @ side("B", layer).T for layer in range(3)])


def test_an_adapter_of_peft_is_looked_at_as_it_is(place, capsys):
    code, out, error = call(capsys, "inspect", place / "one", "--layers", "--where", "q", "--json")
    assert (code, error) == (0, "")
    rows = json.loads(out)["changes"]
    assert [(row["path"], row["layer"]) for row in rows] == [(SITES[0], layer) for layer in range(3)]
    for row, change in zip(rows, changes_of("q", 3), strict=True):
        assert row["norm"] == pytest.approx(np.linalg.norm(change), rel=1e-5)


@pytest.mark.slow
def test_csv_has_a_line_a_row_and_further_tables(place, capsys):
    code, out, _ = call(capsys, "inspect", place / "run", "--only", "alignment", "--sort", "amplification", "--csv")
    lines = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert len(lines) == 6
    larger = [float(line["amplification"]) for line in lines]
    assert larger == sorted(larger, reverse=True)
    assert {line["path"] for line in lines} == set(SITES)


def test_the_page_of_a_run_draws_its_figures_and_its_curve(place, capsys, tmp_path):
    code, out, _ = call(capsys, "inspect", place / "run", "--html", tmp_path / "page.html", "--layers", "--json")
    assert code == 0
    rows = json.loads(out)["changes"]
    text = (tmp_path / "page.html").read_text()
    for row in rows:
        drawn = re.search(rf'data-value="([\d.e-]+)" title="{row["path"]}, layer {row["layer"]}: ', text)
        assert float(drawn[1]) == pytest.approx(row["relative"], rel=1e-5)
    assert "<h2>Training</h2>" in text
    assert "family: pretrained" in text
    assert "decoder of 3 layers × 8</p>" in text  # an imported adapter was not trained on the run's data


@pytest.mark.slow
def test_a_model_shows_its_parameters(place, capsys):
    code, out, _ = call(capsys, "inspect", place / "model", "--sort", "numbers", "--top", 1, "--json")
    found = json.loads(out)
    assert (code, found["changes"], len(found["parameters"])) == (0, [], 1)


def test_two_adapters_beside_each_other(place, capsys, tmp_path):
    code, out, error = call(capsys, "diff", place / "one", place / "two", "--json", "--html", tmp_path / "diff.html")
    assert (code, error) == (0, "")
    row = json.loads(out)["diff"][0]
    a, b = changes_of("q", 3), changes_of("q", 4)
    assert row["path"] == SITES[0]
    assert row["distance"] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-5)
    assert row["chance_output"] == pytest.approx(2 / 8)
    assert "mean φ, output side" in (tmp_path / "diff.html").read_text()


@pytest.mark.slow
def test_an_adapter_and_the_run_that_it_became_are_the_same(place, capsys):
    code, out, _ = call(capsys, "diff", place / "one", place / "run" / "checkpoints" / "0", "--json")
    rows = json.loads(out)["diff"]
    assert code == 0
    assert [(row["distance"], row["cosine"]) for row in rows] == [pytest.approx((0.0, 1.0), abs=1e-6)] * 2


def test_a_table_without_rows_is_said_to_be_empty(place, capsys):
    code, out, _ = call(capsys, "inspect", place / "run", "--only", "vectors")
    assert (code, out.splitlines()[-1]) == (0, "nothing in vectors")


def test_brackets_are_no_markup():
    console = Console(file=io.StringIO(), width=200)
    console.print(table(sheet("changes", [ChangeRow("w", 0, "delora", {"scale": (), "a": (8, 2)}, 17)]), False))
    assert "scale[scalar] a[8×2]" in console.file.getvalue()


def test_csv_has_no_column_for_a_spread_that_some_rows_lack(capsys):
    known = ChangeRow("w", None, "lora", {"a": (8, 2)}, 16, 2.0, 1.0, Spread(1.5, 1.0, 2.0), 0.9, 2, 0)
    write_csv([sheet("changes", [known, ChangeRow("head", None, "full", {"kernel": (8,)}, 8)])])
    head, *lines = csv.reader(io.StringIO(capsys.readouterr().out))
    assert [name for name in head if name.startswith("rank")] == ["rank.mean", "rank.low", "rank.high"]
    assert [line[head.index("rank.mean")] for line in lines] == ["1.5", ""]


@pytest.fixture
def damaged(place, tmp_path):
    """Runs that are not whole."""
    shutil.copytree(place / "run", tmp_path / "torn")
    with (tmp_path / "torn" / METRICS).open("a") as file:
        file.write('{"step": 4, "kind": "tr')
    (tmp_path / "empty").mkdir()
    shutil.copytree(place / "run", tmp_path / "unsaved", ignore=shutil.ignore_patterns("checkpoints"))
    return tmp_path


def refused(capsys, wrong: dict[str, tuple]) -> None:
    """Each of the calls is refused in one line with its message."""
    for message, arguments in wrong.items():
        code, out, error = call(capsys, *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1), (message, error)
        assert message in error


def test_mistakes_are_one_line_and_exit_code_2(place, damaged, capsys):
    run = place / "run"
    wrong = {
        "changes of different bases cannot be compared": ("diff", place / "one", place / "far"),
        "unsaved has no whole checkpoint": ("inspect", damaged / "unsaved"),
        "empty is empty: there is no run, adapter or model in it": ("inspect", damaged / "empty"),
        "there is no table 'intruder'; nearest: intruders": ("inspect", run, "--also", "intruder"),
        "--json and --csv both print; choose one": ("inspect", run, "--json", "--csv"),
        "is no adapter of PEFT, so it takes no --base": ("inspect", run, "--base", place / "model"),
        "is checkpoint 0; leave --step out": ("inspect", run / "checkpoints" / "0", "--step", 1),
        "does not exist; nearest run: ": ("inspect", place / "rum"),
        "--csv is for other tables, not for --specs": ("inspect", run, "--specs", "--csv"),
        "--mesh is for --specs": ("inspect", run, "--mesh", "1,1,1"),
        "--mesh '²,1,1' must be three sizes": ("inspect", run, "--specs", "--mesh", "²,1,1"),
        "is an adapter of PEFT, so there is no use for --base": ("diff", run, run, "--base", place / "model"),
    }
    refused(capsys, wrong)


@pytest.mark.parametrize("case", mostly_slow(["torn", "where", "sort", "kinds", "page", "here", "about"], ["torn"]))
def test_mistakes_that_are_found_later(case, place, damaged, capsys):
    run, page = place / "run", damaged / "page.html"
    message, *arguments = {
        "torn": ("line 4 of 4 is cut off; the run's own", "inspect", damaged / "torn", "--html", page),
        "where": ("--where 'atn' matches nothing; nearest: layers/block/attn/", "inspect", run, "--where", "atn"),
        "sort": ("--sort 'relativ' is no column here; nearest: relative", "inspect", run, "--sort", "relativ"),
        "kinds": ("is an adapter and", "diff", run, place / "model"),
        "page": ("page.html cannot be written", "inspect", run, "--html", damaged / "nowhere" / "page.html"),
        "here": (". cannot be written", "inspect", run, "--html", "."),
        "about": ("drift is about adapters, and", "inspect", place / "model", "--also", "drift"),
    }[case]
    refused(capsys, {message: tuple(arguments)})
    assert not page.exists()
