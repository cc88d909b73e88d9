"""The notebooks run: their code cells, one after another."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKS = {
    "look_inside": lambda found: found["after"] > 0.9 and all(0 < row.relative < 10 for row in found["rows"]),
    "two_seeds": lambda found: min(found["marks"].values()) > 0.5 and all(row.output > 0 for row in found["rows"]),
}


def test_every_notebook_is_checked():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(CHECKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_its_cells_run(name, monkeypatch, tmp_path, unchecked):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    found: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # figures would grow old
            exec(compile("".join(cell["source"]), f"{name}.ipynb, {cell['id']}", "exec"), found)
    assert CHECKS[name](found)
