"""The page, read back: every figure that is drawn is one that was computed, and nothing is fetched."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from vlora_jax.inspection.kinds import sheet
from vlora_jax.inspection.report.charts import Series, line_chart, log_ticks, thinned
from vlora_jax.inspection.report.page import Report, render
from vlora_jax.inspection.report.views import curves, grid_heat, heat_of, spectrum_charts
from vlora_jax.inspection.spectra import Spectrum
from vlora_jax.inspection.tables import ChangeRow, Spread

SIZES = {"layers/block/attn/q": [0.02, 0.05, 0.01], "layers/block/mlp/<up>": [0.001, float("inf"), None], "head": [0.5]}


def row_of(path: str, layer: int | None, relative: float | None) -> ChangeRow:
    return ChangeRow(path, layer, "lora", {"a": (8, 2)}, 16, 1.0, relative, Spread(1.5, 1.0, 2.0), 0.9, 2, 0)


ROWS = [
    row_of(path, layer if len(sizes) > 1 else None, size)
    for path, sizes in SIZES.items()
    for layer, size in enumerate(sizes)
]
RECORDS = [{"kind": "train", "step": step, "loss": 3.0 / step} for step in range(1, 41)] + [
    {"kind": "held_out", "step": step, "loss": 1.0 / step, "accuracy": step / 50} for step in (10, 20, 40)
]


class Page(HTMLParser):
    """Elements of a page with their attributes and text, and whether it is well nested."""

    EMPTY = ("meta", "br")

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", "within": [each["tag"] for each in self.open], **dict(attributes)}
        self.elements.append(element)
        if tag not in self.EMPTY:
            self.open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for each in self.open:
            each["text"] += data

    def all(self, tag: str, **attributes) -> list[dict]:
        named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        return [e for e in self.elements if e["tag"] == tag and all(e.get(k) == v for k, v in named.items())]


@pytest.fixture(scope="module")
def page() -> Page:
    spectra = {"layers/block/attn/q": Spectrum(np.array([[3.0, 1.0], [2.0, 1e-9]]), None, (0, 1))}
    report = Report(
        title="runs/<x>: adapter at step 40",
        lead="lora & more",
        facts=(("numbers", "16", "of 99"),),
        heats=(heat_of("‖ΔW‖ / ‖W‖", ROWS, "relative"), grid_heat("φ", np.array([[0.25, 0.5]]))),
        charts=(
            ("Training", "", tuple(curves(RECORDS))),
            ("Spectra", "a line a layer", tuple(spectrum_charts(spectra))),
            ("Nothing", "", ()),
        ),
        sheets=(sheet("changes", ROWS), sheet("parameters", [])),
        about=(("step", "40"),),
        config="a: <b>\n",
    )
    return Page(render(report))


def test_every_cell_of_the_heat_map_is_a_row(page):
    cells = [e for e in page.all("i") if e.get("title", "").startswith(tuple(SIZES))]
    told = {e["title"].rpartition(": ")[0]: e.get("data-value") for e in cells}
    for row in ROWS:
        name = row.path if row.layer is None else f"{row.path}, layer {row.layer}"
        assert told[name] == (None if row.relative is None else f"{row.relative:.6g}")
    shares = {e["title"].rpartition(": ")[0]: float(re.search(r"--p:([\d.]+)%", e["style"])[1]) for e in cells}
    assert shares["layers/block/attn/q, layer 1"] == pytest.approx(10.0)  # 0.05 of the largest finite one, 0.5
    assert shares["head"] == shares["layers/block/mlp/<up>, layer 1"] == 100.0
    assert [e["text"] for e in page.all("span") if e.get("title") in SIZES] == list(SIZES)


def test_the_grid_has_its_shares(page):
    assert [e["data-value"] for e in page.all("i") if e.get("title", "").startswith("i = 1")] == ["0.25", "0.5"]


def test_the_table_has_every_row_and_sum(page):
    body = [e["text"] for e in page.all("td") if "tbody" in e["within"]]
    columns = len(page.all("th"))
    lines = [body[start : start + columns] for start in range(0, len(body), columns)]
    assert [line[0] for line in lines] == [row.path for row in ROWS]
    assert [line[3] for line in lines] == ["16"] * len(ROWS)
    assert [line[5] for line in lines[:3]] == ["0.0200", "0.0500", "0.0100"]
    assert lines[5][5] == ""
    foot = [e["text"] for e in page.all("td") if "tfoot" in e["within"]]
    assert (foot[0], foot[3]) == ("together", f"{16 * len(ROWS)}")


def test_curves_and_spectra_have_their_points(page):
    lines = [e["points"].split() for e in page.all("polyline")]
    assert [len(points) for points in lines] == [40, 3, 3, 2, 1]  # below a millionth a singular value is noise
    assert len(page.all("path", class_="dot")) == 6
    across = [float(point.split(",")[0]) for point in lines[1]]
    assert across == pytest.approx([100 * (step - 1) / 39 for step in (10, 20, 40)], abs=0.01)
    heights = [float(point.split(",")[1]) for point in lines[2]]
    assert heights[0] > heights[1] > heights[2]  # SVG counts downwards, accuracy rises


def test_nothing_is_fetched_and_text_stays_text(page):
    text = render(Report("<x>", "", (), (), (), (), ()))
    assert not re.search(r"https?://|url\(|@import|<link|src=", text)
    assert page.all("h1")[0]["text"] == "runs/<x>: adapter at step 40"
    assert page.all("pre")[0]["text"] == "a: <b>\n"
    assert [e["text"] for e in page.all("h2")] == ["Where", "Training", "Spectra", "Changes", "Metadata"]


def test_layers_that_are_modules_of_their_own_lie_beside_each_other():
    rows = [dataclasses.replace(ROWS[0], path=f"layers/{layer}/attn/q", layer=None) for layer in (0, 2)]
    (row,) = heat_of("", rows, "relative").rows
    assert (row.path, row.label, row.values) == ("layers/*/attn/q", "q", (0.02, None, 0.02))
    assert heat_of("", [dataclasses.replace(ROWS[0], relative=None)], "relative") is None


def test_charts_leave_out_what_cannot_be_drawn():
    points = ((0.0, 1.0), (1.0, float("nan")), (2.0, 0.0), (3.0, 10.0))
    assert 'points="0.00,96.30 100.00,3.70"' in line_chart("", [Series("", points, "held")], "", log=True)
    assert line_chart("", [Series("", ((0.0, float("nan")),), "held")], "") == ""
    long = [(float(x), 0.0) for x in range(5000)]
    assert len(thinned(long)) <= 600
    assert (thinned(long)[0], thinned(long)[-1], thinned(long[:3])) == (long[0], long[-1], long[:3])
    assert log_ticks(-0.1, 0.9) == [1.0, 2.0, 5.0]
    assert log_ticks(0.1, 0.9) == [2.0, 4.0, 6.0]
