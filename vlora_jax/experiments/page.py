"""A comparison as pictures, and as one HTML page that needs nothing else."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence

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
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    accuracy = found[0].metric == "accuracy"
    value = lambda line: line.mark.mean * (100 if accuracy else 1)
    spread = lambda line: 0.0 if math.isnan(line.mark.error) else line.mark.error * (100 if accuracy else 1)
    axes.plot([line.trained for line in front], list(map(value, front)), color="#c4722b", linewidth=1)
    for line in lines:
        best = line in front
        colour = "#c4722b" if best else "#1f5f99"
        axes.errorbar(line.trained, value(line), spread(line), fmt="o", color=colour, markersize=4, elinewidth=0.8)
        axes.annotate(
            line.method, (line.trained, value(line)), (4, 4), textcoords="offset points", fontsize=7,
            weight="bold" if best else "normal", color=colour,
        )  # fmt: skip
    axes.set_xscale("log" if all(line.trained for line in lines) else "symlog")
    values = [line.mark.mean for line in lines if line.mark is not None]
    if not accuracy and min(values, default=0) > 0 and max(values) / min(values) > 20:
        axes.set_yscale("log")
    axes.margins(x=0.12)  # for the names
    axes.set_xlabel("numbers trained")
    axes.set_ylabel("accuracy (%)" if accuracy else "loss")
    axes.grid(alpha=0.25)
    axes.set_title(f"{found[0].task}: bold ones are beaten by none that trains as few")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


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
