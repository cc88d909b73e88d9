"""A comparison as pictures, and as one HTML page that needs nothing else."""

import base64
import html
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vlora_jax.experiments.compare import CompareConfig
from vlora_jax.experiments.report import Line, about, by_task, frontier, legend, rows_of

STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --dim: #5a5a5a; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --dim: #aaa; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
p { color: var(--dim); max-width: 50rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
tr.front td { font-weight: 600; }
img { max-width: 100%; background: #fff; border-radius: 8px; margin-top: 1rem; }
"""


def draw_pareto(found: Sequence[Line]) -> bytes:
    """One task's marks against numbers trained, and the methods that none beats with as few, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    lines = [line for line in found if line.mark is not None]
    front = frontier(lines)
    figure = Figure(figsize=(10, 6.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    accuracy = found[0].metric == "accuracy"
    value = lambda line: line.mark.mean * (100 if accuracy else 1)
    spread = lambda line: 0.0 if math.isnan(line.mark.error) else line.mark.error * (100 if accuracy else 1)
    axes.plot([line.trained for line in front], list(map(value, front)), color="#c4722b", linewidth=1)
    colours = {line.method: "#c4722b" if line in front else "#1f5f99" for line in lines}
    for line in lines:
        colour = colours[line.method]
        axes.errorbar(line.trained, value(line), spread(line), fmt="o", color=colour, markersize=4, elinewidth=0.8)
    counts = [line.trained for line in lines]
    if all(counts):
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=max(1, min(filter(None, counts), default=1) / 3))
    values = [value(line) for line in lines]
    if not accuracy and min(values, default=0) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
    axes.margins(x=0.1)  # for the names
    axes.set_xlabel("numbers trained")
    axes.set_ylabel("accuracy (%)" if accuracy else "loss")
    axes.grid(alpha=0.25)
    axes.set_title(f"{found[0].task}: bold ones are beaten by none that trains as few")
    far = below(values) if accuracy else []
    if far:
        left_out = ", ".join(f"{line.method} {value(line):.1f}" for line in lines if value(line) in far)
        kept = [each for each in values if each not in far]
        room = 0.08 * (max(kept) - min(kept))
        axes.set_ylim(min(kept) - 2 * room, max(kept) + room)
        axes.text(0.01, 0.02, f"below: {left_out}", transform=axes.transAxes, fontsize=7, color="#555")
    shown = [line for line in sorted(lines, key=lambda line: line not in front) if value(line) not in far]
    names = [(line.method, line.trained, value(line), line in front, colours[line.method]) for line in shown]
    write_names(figure, axes, names)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def below(values: Sequence[float]) -> list[float]:
    """Values so far below all others that these would lie on top of each other; none of a few.

    >>> below([52.0, 78.0, 80.0, 81.0, 82.0, 83.0])
    [52.0]
    >>> below([52.0, 60.0, 70.0, 80.0, 82.0, 83.0])
    []
    """
    ordered = sorted(values)
    for place in range(len(ordered) // 4, 0, -1):
        if ordered[place] - ordered[place - 1] > 2 * (ordered[-1] - ordered[place]):
            return ordered[:place]
    return []


def write_names(figure: Any, axes: Any, names: Sequence[tuple[str, float, float, bool, str]]) -> None:
    """Write names beside their points where they cover neither points nor each other, with a line if that is not near.

    Args:
      names: name, place, whether it is bold, colour; the first ones get the nearest places.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    axes.autoscale(False)  # lines to names move nothing
    points, pixels = axes.transData.transform([(x, y) for _, x, y, _, _ in names]), figure.dpi / 72
    frame, taken = axes.get_window_extent(), [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in points]
    for (name, x, y, bold, colour), point in zip(names, points, strict=True):
        text = axes.annotate(
            name, (x, y), (0, 0), textcoords="offset points", fontsize=7, weight="bold" if bold else "normal",
            color=colour,
        )  # fmt: skip
        width, height = text.get_window_extent().size
        for radius, angle in itertools.product((5, 10, 16, 24, 34, 46, 60, 76), range(0, 360, 30)):
            across, up = (radius * pixels * turn(math.radians(angle)) for turn in (math.cos, math.sin))
            across -= width if across < -1 else width / 2 if across < 1 else 0
            box = Bbox.from_bounds(point[0] + across, point[1] + up - height / 2, width, height)
            if (
                not box.count_overlaps(taken)
                and frame.x0 < box.x0 < box.x1 < frame.x1
                and frame.y0 < box.y0 < box.y1 < frame.y1
            ):
                break
        taken.append(box)
        text.set_position(((box.x0 - point[0]) / pixels, (box.y0 - point[1]) / pixels))
        if radius > 10:
            near = [min(max(at, low), high) for at, low, high in zip(point, box.min, box.max, strict=True)]
            end = axes.transData.inverted().transform(near)
            axes.plot([x, end[0]], [y, end[1]], color=colour, linewidth=0.4, alpha=0.6)


def page(comparison: CompareConfig, found: Sequence[Line], pictures: Mapping[str, bytes]) -> str:
    """All tasks as one page; light or dark as the reader's system is.

    Args:
      pictures: PNGs by task.
    """
    parts = [f"<p>{html.escape(legend(comparison))}</p>"]
    for task, mine in by_task(comparison, found).items():
        columns, rows = rows_of(mine)
        front = {line.method for line in frontier(mine)}
        cells = lambda tag, row: "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in row)
        body = [f'<tr class="{"front" if row[0] in front else ""}">{cells("td", row)}</tr>' for row in rows]
        source = "data:image/png;base64," + base64.b64encode(pictures[task]).decode()
        parts += [
            f"<h2>{html.escape(task)}</h2><p>{html.escape(about(comparison.tasks[task], mine).replace('`', ''))}</p>",
            f'<div class="wide"><table><tr>{cells("th", columns)}</tr>{"".join(body)}</table></div>',
            f'<img src="{source}" alt="{html.escape(task)}: {mine[0].metric} against numbers trained">',
        ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = "<title>Comparison</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}{title}<style>{STYLE}</style></head><body><h1>Comparison</h1>\n"
        + ("\n".join(parts) + "\n</body></html>\n")
    )
