"""The page in a real browser, at the width of a phone and of a desk, by day and by night; where Chromium is there."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from test_report import RECORDS, row_of

from vlora_jax.inspection.kinds import sheet
from vlora_jax.inspection.report.page import Report, render
from vlora_jax.inspection.report.views import curves, heat_of, spectrum_charts
from vlora_jax.inspection.spectra import Spectrum

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEIGHT = 1500
MEASURE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({
  over: document.documentElement.scrollWidth - innerWidth,
  cells: [...document.querySelectorAll(".grid i")].map((e) => e.getBoundingClientRect())
    .map((box) => [box.x + box.width / 2, box.y + box.height / 2]),
  text: parseFloat(getComputedStyle(document.querySelector(".grid span")).fontSize)}), "*"))</script>"""
FRAME = """<!doctype html><body style="margin:0">
<iframe src="page.html" style="width:{}px;height:{}px;border:0"></iframe><output></output>
<script>addEventListener("message", (e) => document.querySelector("output").textContent = e.data)</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A page of thirty-two layers of seven kernels."""
    names = [*(f"attn/{name}" for name in "qkvo"), *(f"mlp/{name}" for name in ("gate", "up", "down"))]
    rows = [
        row_of(f"layers/block/{name}", layer, 0.01 + 0.002 * layer * (1 + place))
        for place, name in enumerate(names)
        for layer in range(32)
    ]
    spectra = {f"layers/block/{name}": Spectrum(np.geomspace(1, 0.01, 16) * np.ones((32, 1)), None, tuple(range(32)))
               for name in names}  # fmt: skip
    heat = heat_of("‖ΔW‖ / ‖W‖", rows, "relative")
    assert heat is not None
    charts = ("Training", "", tuple(curves(RECORDS))), ("Spectra", "", tuple(spectrum_charts(spectra)))
    about = (("base fingerprint", "0123456789abcdef" * 4),)
    report = Report(
        "runs/a_rather_long_name_of_a_run", "lora", (), (heat,), charts, (sheet("changes", rows),), about, "a: 1"
    )
    made = tmp_path_factory.mktemp("page")
    (made / "page.html").write_text(render(report).replace("</body>", f"{MEASURE}</body>"))
    return made


def chromium(folder: Path, width: int, dark: bool, *options: str) -> str:
    """Run the browser on the page in a frame of a width; its standard output."""
    (folder / "frame.html").write_text(FRAME.format(width, HEIGHT))
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1300,{HEIGHT}",
        f"--blink-settings=preferredColorScheme={int(not dark)}", "--virtual-time-budget=4000", *options,
        str(folder / "frame.html"),
    ]  # fmt: skip
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("dark", [False, True])
def test_the_heat_map_is_drawn_and_nothing_runs_over_the_edge(folder, width, dark):
    """Cells of one value look alike, of others differ, in the order of the scale; the page is as wide as the screen."""
    told = re.search(r"<output>(\{.*?\})</output>", chromium(folder, width, dark, "--dump-dom"))
    assert told is not None
    found = json.loads(told[1])
    assert found["over"] <= 0
    assert found["text"] >= 12
    picture = folder / f"{width}.png"
    chromium(folder, width, dark, f"--screenshot={picture}")
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert (pixels[5, 5].mean() < 0.5) == dark
    at = lambda place: pixels[int(found["cells"][place][1]), int(found["cells"][place][0])]
    last_row = [at(6 * 32 + layer).mean() for layer in (0, 10, 20, 31)]
    steps = np.diff(last_row) * (1 if dark else -1)
    assert (steps > 0.03).all(), last_row
    np.testing.assert_allclose(at(0), at(32), atol=0.02)
