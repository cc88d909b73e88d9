"""Heat maps and line charts as HTML and SVG that fit any width: text keeps its size, only the drawing is stretched."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlora_jax.inspection.sheets import FOUR, compact

Form = Callable[[float], str]
POINTS = 600  # of a line at most
WIDE = 48  # columns, beyond which a heat map takes the whole width


@dataclass(frozen=True)
class HeatRow:
    """One module: its path, a short label, and a value for each layer; a single one if the kernel is not stacked."""

    path: str
    label: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Heat:
    """A heat map of modules by layers.

    Attributes:
      columns: what the columns are called; `axis` says what they are.
      low, high: the two ends of the scale; with None the data's own, from zero unless they lie close together.
    """

    title: str
    rows: tuple[HeatRow, ...]
    columns: tuple[str, ...]
    axis: str = "layer"
    form: Form = FOUR
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """A line: its points, and how it is drawn.

    Attributes:
      style: a class of the page's style sheet, `"held"`.
      shade: between 0 and 1, where it stands among lines of one style; None where it stands alone.
      dots: with a dot at each point.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    style: str
    shade: float | None = None
    dots: bool = False


def heat_map(heat: Heat) -> str:
    """A grid of cells, each with its value in `data-value` and in words in `title`."""
    low, high = _ends(heat)
    spoken = lambda row, place: f"{row.path}, {heat.axis} {heat.columns[place]}" if len(row.values) > 1 else row.path
    lines = []
    for row in heat.rows:
        whole = f";grid-column:span {len(heat.columns)}" if len(row.values) == 1 else ""
        cells = "".join(
            _cell(spoken(row, place), value, low, high, heat.form, whole) for place, value in enumerate(row.values)
        )
        lines.append(f'<span title="{html.escape(row.path)}">{html.escape(row.label)}</span>{cells}')
    every = max(1, math.ceil(len(heat.columns) / 16))
    numbers = "".join(
        f"<b>{html.escape(name) if place % every == 0 else ''}</b>" for place, name in enumerate(heat.columns)
    )
    wide = " wide" if len(heat.columns) > WIDE else ""
    return (
        f'<figure class="heat{wide}"><figcaption>{html.escape(heat.title)}</figcaption><div class="scroll">'
        f'<div class="grid" style="--columns:{len(heat.columns)}">{"".join(lines)}<span>{heat.axis}</span>{numbers}'
        f'</div></div><p class="scale">{heat.form(low)}<i></i>{heat.form(high)}<output></output></p></figure>'
    )


def line_chart(
    title: str, series: Sequence[Series], x_label: str, form: Form = compact, log: bool = False, legend: bool = True
) -> str:
    """Lines over one another.

    Args:
      form: of the numbers on the vertical axis.
      log: logarithmic heights; points at or below zero are left out.
    """
    kept = [[point for point in each.points if _drawable(point, log)] for each in series]
    every = [point for points in kept for point in points]
    if not every:
        return ""
    left, right = min(x for x, _ in every), max(x for x, _ in every)
    heights = [math.log10(y) if log else y for _, y in every]
    bottom, top = _padded(min(heights), max(heights))
    across = lambda x: 100 * (x - left) / (right - left) if right > left else 50.0
    up = lambda y: 100 * ((math.log10(y) if log else y) - bottom) / (top - bottom)
    drawn = "".join(
        _line(each, [(across(x), 100 - up(y)) for x, y in thinned(points)])
        for each, points in zip(series, kept, strict=True)
        if points
    )
    marks = log_ticks(bottom, top) if log else ticks(bottom, top, 5)
    rules = "".join(f'<path class="rule" d="M0 {100 - up(y):.2f}H100"/>' for y in marks)
    ys = "".join(f'<span style="bottom:{up(y):.2f}%">{form(y)}</span>' for y in marks)
    xs = "".join(f'<span style="left:{across(x):.2f}%">{x:g}</span>' for x in ticks(left, right, 5, whole=True))
    names = "".join(f'<span class="{each.style}"><i></i>{html.escape(each.name)}</span>' for each in series)
    return (
        f'<figure class="chart"><figcaption>{html.escape(title)}</figcaption>'
        + (f'<p class="legend">{names}</p>' if legend else "")
        + f'<div class="plot"><div class="ys">{ys}</div>'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{html.escape(title)}">'
        f'{rules}{drawn}</svg><div class="xs">{xs}</div></div><p class="axis">{html.escape(x_label)}</p></figure>'
    )


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Round numbers between two, about so many: 1, 2 or 5 times a power of ten apart.

    >>> ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    >>> ticks(1, 4, 5, whole=True)
    [1.0, 2.0, 3.0, 4.0]
    """
    if high <= low:
        return [float(low)]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two powers of ten, given by their exponents.

    >>> log_ticks(-2.0, 1.0)
    [0.01, 0.1, 1.0, 10.0]
    """
    decades = range(math.floor(low), math.ceil(high) + 1)
    within = lambda values: [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    every = max(1, math.ceil(len(decades) / 6))
    tens = within([10.0**decade for decade in decades if decade % every == 0])
    if len(tens) >= 3:
        return tens
    steps = within([factor * 10.0**decade for decade in decades for factor in (1, 2, 5)])
    return steps if len(steps) >= 3 else ticks(10**low, 10**high, 5)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every so many-th point of a long line, and its last."""
    every = math.ceil(len(points) / POINTS)
    return [*points[:-1:every], points[-1]]


def _cell(name: str, value: float | None, low: float, high: float, form: Form, whole: str) -> str:
    if value is None:
        return f'<i class="none" style="--p:0%{whole}" title="{html.escape(name)}: unknown"></i>'
    known = high > low and math.isfinite(value)
    share = min(max((value - low) / (high - low), 0.0), 1.0) if known else float(value > low)
    spoken = html.escape(f"{name}: {form(value)}")
    return f'<i style="--p:{share:.1%}{whole}" data-value="{value:.6g}" title="{spoken}"></i>'


def _ends(heat: Heat) -> tuple[float, float]:
    values = [v for row in heat.rows for v in row.values if v is not None and math.isfinite(v)] or [0.0]
    low, high = min(values), max(values)
    low = low if low < 0 or (low > high / 2 and high > low) else 0.0
    return low if heat.low is None else heat.low, high if heat.high is None else heat.high


def _drawable(point: tuple[float, float], log: bool) -> bool:
    return math.isfinite(point[1]) and (point[1] > 0 or not log)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _line(series: Series, points: Sequence[tuple[float, float]]) -> str:
    shade = "" if series.shade is None else f' style="--p:{series.shade:.0%}"'
    path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
    dots = "".join(f'<path class="dot" d="M{x:.2f} {y:.2f}h0"/>' for x, y in points) if series.dots else ""
    name = f"<title>{html.escape(series.name)}</title>"
    return f'<g class="{series.style}"{shade}>{name}<polyline points="{path}"/>{dots}</g>'
