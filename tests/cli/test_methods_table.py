"""`vlora-jax methods`: what it says of the registry, and that the README says the same."""

import json
import re
from pathlib import Path

import pytest
from commands import call

from vlora_jax.adapters.registry import METHODS, from_config
from vlora_jax.cli.methods import COLUMNS, linked

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def listed():
    from vlora_jax.cli.methods import records

    return {record["name"]: record for record in records()}


def test_the_readme_and_the_registry_agree(capsys):
    """If they do not: put what `vlora-jax methods --markdown` prints between the README's two comments."""
    code, table, _ = call(capsys, "methods", "--markdown")
    parts = README.read_text().split("<!-- methods -->\n")
    assert code == 0
    assert len(parts) == 3
    assert parts[1].strip() == table.strip()


def test_the_markdown_is_a_table_with_a_row_a_method(capsys):
    rows = call(capsys, "methods", "--markdown")[1].strip().splitlines()
    assert len(rows) == 2 + len(METHODS)
    cells = [re.split(r"(?<!\\)\|", row)[1:-1] for row in rows]
    assert {len(row) for row in cells} == {len(COLUMNS)}
    assert [row[0].strip(" `") for row in cells[2:]] == list(METHODS)
    assert "[2106.09685](https://arxiv.org/abs/2106.09685)" in rows[2]


def test_a_narrow_screen_has_the_short_columns_and_a_file_has_all(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    narrow = call(capsys, "methods")[1]
    monkeypatch.delenv("COLUMNS")
    wide = call(capsys, "methods")[1]
    assert max(map(len, narrow.splitlines())) <= 80
    assert "2106.09685" not in narrow
    assert "in 180 columns, or with --json or --markdown" in narrow
    for name in METHODS:
        assert re.search(rf"(?m)^ *{name} ", narrow)
        assert re.search(rf"(?m)^ *{name} ", wide)
    assert "2106.09685" in wide


def test_records_say_what_methods_do(listed, capsys):
    printed = json.loads(call(capsys, "methods", "--json")[1])
    assert printed == json.loads(json.dumps(list(listed.values())))
    lora, dora, hira = (listed[name] for name in ("lora", "dora", "hira"))
    assert (lora["mergeable"], lora["vertical"], lora["peft"], lora["default_rate"]) == (True, True, "LORA", 1e-3)
    assert (dora["mergeable"], dora["vertical"], dora["trains"]) == (True, False, "r·(in + out) + out")
    assert hira["options"]["rank"] == 32


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_where_it_is_from_and_what_verified_it(listed, name):
    record = listed[name]
    assert re.fullmatch(r"\d{4}\.\d{4,5}|OpenReview \w+|none", record["paper"])
    assert all(record[key] for key in ("formula", "trains", "verified", "about"))
    assert record["about"].endswith((".", ":", ","))
    assert 0 < record["default_rate"] <= 1
    assert record["peft"] == record["peft"].upper()
    given = {key: value for key, value in record["options"].items() if value not in (None, (), [])}
    assert from_config({"method": name, **given, **({"full": "head"} if name == "selective" else {})}).name == name


def test_the_terminal_s_table_has_every_name_and_heading(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = call(capsys, "methods")
    assert code == 0
    assert all(heading in out for heading in COLUMNS)
    assert all(re.search(rf"(?m)^{name} ", out) for name in METHODS)
    assert all(method.formula in out for method in METHODS.values())


def test_two_forms_at_once_are_refused(capsys):
    code, out, error = call(capsys, "methods", "--json", "--markdown")
    assert (code, out) == (2, "")
    assert "ask for one of them" in error


def test_papers_elsewhere_than_on_arxiv_are_linked_where_they_are():
    assert linked("OpenReview abc") == "[OpenReview](https://openreview.net/forum?id=abc)"
    assert linked("") == ""
