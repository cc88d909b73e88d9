"""What to draw of what inspection found: rows as heat maps, spectra and records as lines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlora_jax.adapters.sites import layer_number, role
from vlora_jax.inspection.report.charts import Form, Heat, HeatRow, Series, line_chart
from vlora_jax.inspection.sheets import FOUR, THREE, percent
from vlora_jax.inspection.spectra import Spectrum

FLOOR = 1e-6  # of the largest singular value of a chart, below which points are noise


def heat_of(
    title: str,
    rows: Sequence[Any],
    value: str,
    form: Form = FOUR,
    low: float | None = None,
    high: float | None = None,
) -> Heat | None:
    """A heat map of one field of rows with a path and a layer; None if no row knows it.

    Layers that are modules of their own (`layers/3/attn/q`) are put beside each other as stacked ones are.
    """
    found: dict[str, dict[int | None, float | None]] = {}
    for row in rows:
        number = getattr(row, value)
        number = getattr(number, "mean", number)
        path, layer = place_of(row.path, row.layer)
        found.setdefault(path, {})[layer] = number
    known = {path: cells for path, cells in found.items() if any(cell is not None for cell in cells.values())}
    if not known:
        return None
    depth = max((layer for cells in known.values() for layer in cells if layer is not None), default=0) + 1
    labels = short(list(known))
    made = tuple(
        HeatRow(path, label, (cells[None],) if None in cells else tuple(cells.get(layer) for layer in range(depth)))
        for (path, cells), label in zip(known.items(), labels, strict=True)
    )
    return Heat(title, made, tuple(map(str, range(depth))), form=form, low=low, high=high)


def grid_heat(title: str, grid: np.ndarray) -> Heat:
    """A matrix of shares, its rows and columns counted from 1."""
    rows = tuple(HeatRow(f"i = {i}", str(i), tuple(map(float, line))) for i, line in enumerate(grid, 1))
    names = tuple(str(j) for j in range(1, grid.shape[1] + 1))
    return Heat(title, rows, names, axis="j", form=THREE, low=0.0, high=1.0)


def spectrum_charts(spectra: Mapping[str, Spectrum]) -> list[str]:
    """A chart for each kernel (those of one role in all layers together): singular values, a line a layer."""
    lines: dict[str, list[tuple[int | None, np.ndarray]]] = {}
    for path, spectrum in spectra.items():
        for layer, values in zip(spectrum.layers, spectrum.values, strict=True):
            where, number = place_of(path, layer)
            lines.setdefault(where, []).append((number, values))
    charts = []
    for (_, layers), label in zip(lines.items(), short(list(lines)), strict=True):
        floor = FLOOR * max(float(values.max(initial=0.0)) for _, values in layers)
        last = max((layer or 0 for layer, _ in layers), default=0) or 1
        series = [
            Series(
                label if layer is None else f"layer {layer}",
                tuple((float(i), float(value)) for i, value in enumerate(values, 1) if value > floor),
                "layer",
                (layer or 0) / last,
            )
            for layer, values in layers
        ]
        chart = line_chart(label, series, "number of the singular value", log=True, legend=False)
        charts += [chart] if chart else []
    return charts


def curves(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss and accuracy of a run over its steps, from the records of its metrics.jsonl."""

    def line(kind: str, key: str) -> tuple[tuple[float, float], ...]:
        return tuple((float(r["step"]), float(r[key])) for r in records if r["kind"] == kind and r.get(key) is not None)

    train, held = line("train", "loss"), line("held_out", "loss")
    low, high = min((y for _, y in train + held), default=1), max((y for _, y in train + held), default=1)
    losses = [Series("training", train, "train"), Series("held out", held, "held", dots=True)]
    accuracy = [Series("held out", line("held_out", "accuracy"), "held", dots=True)]
    made = [
        line_chart("Loss (nats)", [each for each in losses if each.points], "step", log=low > 0 and high / low > 20),
        line_chart("Accuracy", [each for each in accuracy if each.points], "step", percent),
    ]
    return [chart for chart in made if chart]


def place_of(path: str, layer: int | None) -> tuple[str, int | None]:
    """The role of a kernel and its layer, whether layers are stacked or modules of their own.

    >>> place_of("layers/block/attn/q", 2), place_of("layers/3/attn/q", None), place_of("head", None)
    (('layers/block/attn/q', 2), ('layers/*/attn/q', 3), ('head', None))
    """
    if layer is None and role(path) != path:
        return role(path), layer_number(path)
    return path, layer


def short(paths: Sequence[str]) -> list[str]:
    """Paths without the components that all of them start with.

    >>> short(["layers/block/attn/q", "layers/block/mlp/up"]), short(["layers/attn/q", "head"]), short(["layers/up"])
    (['attn/q', 'mlp/up'], ['layers/attn/q', 'head'], ['up'])
    """
    parts = [path.split("/") for path in paths]
    common = 0
    while all(len(each) > common + 1 and each[common] == parts[0][common] for each in parts):
        common += 1
    return ["/".join(each[common:]) for each in parts]
