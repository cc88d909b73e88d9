"""How a LoRA training step grows: time, FLOPs and temporary bytes against layers, length, batch and adapters.

LoRA rank 8 on all linear kernels of a Llama-shaped decoder, float32, on CPU. One size is varied at a time, the others
stay at 4 layers × 512, 4 examples of 256 tokens. `bound`: so many adapters at every kernel, their changes added, all of
them trained. `rows`: so many adapters stacked, each row of a batch of 8 with one of them, all of them trained.

Steps of one sweep are taken in turns, medians quoted. Each quantity gets the exponent of the power law and the line
that fit it best, and how far the farthest point lies from that line. FLOPs are those of all matrix products of the
compiled step, temporary bytes the compiled program's own figure: both are the same on every run, seconds are not.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from step_cost import ADAPTER, DECODER, Program, batch_of, compile_step, compiled_program, interleaved, machine

from vlora_jax import bind, count, init, split, stack_adapters
from vlora_jax.models.build import abstract_model, build
from vlora_jax.training.allocator import keep_large_buffers
from vlora_jax.training.loss import next_token
from vlora_jax.training.step import Batch

LAYERS, LENGTH, EXAMPLES, ROWS = 4, 256, 4, 8
CONFIG = DECODER.model_copy(update={"layers": LAYERS, "vocabulary": 256})  # next to no head, as in a large model
RATE = 1e-4  # of the plain descent by which several adapters are trained
QUANTITIES = {"seconds": "step s", "cpu_seconds": "CPU s", "flops": "GFLOPs", "temporary": "temporary MB"}
UNITS = {"seconds": 1.0, "cpu_seconds": 1.0, "flops": 1e9, "temporary": 1e6}


@dataclass(frozen=True)
class Point:
    """One size of a sweep; seconds are medians, not a number if nothing was timed."""

    size: int
    seconds: float
    cpu_seconds: float
    flops: float
    temporary: float


@dataclass(frozen=True)
class Growth:
    """How a quantity grows with a size: as size^exponent, and as intercept + slope · size.

    Attributes:
      miss: of the point that lies farthest from the line, relative to its value.
    """

    exponent: float
    intercept: float
    slope: float
    miss: float


def several(adapters: int, by_rows: bool) -> Program:
    """A step of plain descent for several adapters, which are bound together or have rows of the batch each."""
    graphdef, _ = abstract_model(CONFIG)
    rows = jnp.arange(ROWS) % adapters if by_rows else None

    def start(key: jax.Array) -> tuple[Any, Any]:
        base = split(build(CONFIG, key))[1]
        drawn = [init(ADAPTER, each, base) for each in jax.random.split(key, adapters)]
        return [stack_adapters(drawn)] if by_rows else drawn, base

    def step(state: list, base: Any, batch: Batch) -> tuple[list, jax.Array]:
        micro = {name: array[0] for name, array in batch.items()}

        def loss(trainable: list) -> jax.Array:
            bound = [each.with_trainable(own) for each, own in zip(state, trainable, strict=True)]
            return next_token(bind(graphdef, base, *bound, rows=rows), micro, True)["loss"]

        trainable = [each.trainable for each in state]
        value, slopes = jax.value_and_grad(loss)(trainable)
        new = jax.tree.map(lambda leaf, slope: leaf - RATE * slope, trainable, slopes)
        return [each.with_trainable(own) for each, own in zip(state, new, strict=True)], value

    trained = count(jax.eval_shape(start, jax.random.key(0))[0])
    return compiled_program(jax.jit(step, donate_argnums=0), start, batch_of(CONFIG, ROWS, LENGTH), trained)


def deep(layers: int) -> Program:
    return compile_step(CONFIG.model_copy(update={"layers": layers}), EXAMPLES, ADAPTER, LENGTH)


SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[int], Program]]] = {
    "layers": ((2, 4, 8, 16, 32), deep),
    "length": ((64, 128, 256, 512, 1024), lambda length: compile_step(CONFIG, EXAMPLES, ADAPTER, length)),
    "batch": ((1, 2, 4, 8, 16), lambda examples: compile_step(CONFIG, examples, ADAPTER, LENGTH)),
    "bound": ((1, 2, 4, 8), lambda adapters: several(adapters, by_rows=False)),
    "rows": ((1, 2, 4, 8), lambda adapters: several(adapters, by_rows=True)),
}
QUICK_SIZES, QUICK_REPEATS = 3, 3


def points(name: str, sizes: Sequence[int], repeats: int, console: Console) -> list[Point]:
    """Compile the step at each size, and time them in turns."""
    programs = {}
    for size in sizes:
        with console.status(f"compiling {name} {size}"):
            programs[str(size)] = SWEEPS[name][1](size)
    times = {size: [(math.nan, math.nan)] for size in programs}
    if repeats:
        with console.status(f"timing {name}: {repeats} steps of each size in turns"):
            times = interleaved(programs, repeats)
    found = []
    for size, program in programs.items():
        wall, cpu = (statistics.median(column) for column in zip(*times[size], strict=True))
        found.append(Point(int(size), wall, cpu, program.flops, program.temporary))
    jax.clear_caches()
    return found


def growth(sizes: Sequence[float], values: Sequence[float]) -> Growth:
    """The fits by least squares: of logarithms for the power law, relative to the values for the line."""
    x, y = np.asarray(sizes, float), np.asarray(values, float)
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    return Growth(
        exponent=float(np.polyfit(np.log(x), np.log(y), 1)[0]),
        intercept=float(intercept),
        slope=float(slope),
        miss=float(np.abs((intercept + slope * x) / y - 1).max()),
    )


def rounded(exponent: float) -> str:
    return f"{round(exponent, 2) + 0.0:.2f}"  # no -0.00


def growths(found: Sequence[Point]) -> dict[str, Growth]:
    """Of every quantity that was measured."""
    values = {name: [getattr(point, name) for point in found] for name in QUANTITIES}
    sizes = [point.size for point in found]
    return {name: growth(sizes, each) for name, each in values.items() if not math.isnan(each[0])}


def show(console: Console, sweeps: dict[str, list[Point]]) -> None:
    table = Table("against", "size", *QUANTITIES.values(), box=None, padding=(0, 2, 0, 0))
    for name, found in sweeps.items():
        for point in found:
            cells = [getattr(point, quantity) / unit for quantity, unit in UNITS.items()]
            table.add_row(name, f"{point.size:,}", *(f"{cell:,.3f}" for cell in cells))
        fits = growths(found)
        lines = {
            "grows as": lambda fit, unit: f"size^{rounded(fit.exponent)}",
            "or": lambda fit, unit: f"{fit.intercept / unit:,.3g} + {fit.slope / unit:,.3g}·size",
            "within": lambda fit, unit: f"{fit.miss:.1%}",
        }
        for what, told in lines.items():
            cells = [told(fits[quantity], unit) if quantity in fits else "" for quantity, unit in UNITS.items()]
            table.add_row("", what, *cells, end_section=what == "within")
        table.add_row()
    console.print(table)


def draw(sweeps: dict[str, list[Point]], file: Path) -> None:
    """Each quantity relative to that of a sweep's smallest size, over the size relative to it."""
    from matplotlib.figure import Figure  # without pyplot there is no global state and no display

    shown = [
        name for name in ("seconds", "flops", "temporary") if any(name in growths(each) for each in sweeps.values())
    ]
    figure = Figure(figsize=(4.2 * len(shown), 4.5), dpi=120, layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(shown), sharex=True, sharey=True))
    for panel, quantity in zip(panels, shown, strict=True):
        for name, found in sweeps.items():
            sizes = [point.size / found[0].size for point in found]
            values = [getattr(point, quantity) / getattr(found[0], quantity) for point in found]
            label = f"{name}: size^{rounded(growths(found)[quantity].exponent)}"
            panel.plot(sizes, values, marker="o", markersize=4, label=label)
        most = max(found[-1].size / found[0].size for found in sweeps.values())
        panel.plot([1, most], [1, most], color="grey", linewidth=1, linestyle="--", label="in proportion")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_title({"seconds": "seconds a step", "flops": "FLOPs", "temporary": "temporary bytes"}[quantity])
        panel.set_xlabel("size ÷ the smallest")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("÷ that of the smallest")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Close other programs before you trust the times. --quick to see that it works.",
    )  # fmt: skip
    parser.add_argument("sweeps", nargs="*", help=f"which of {', '.join(SWEEPS)}; all if not given")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed steps of each size; 0: FLOPs and bytes only (default: 7)"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_SIZES} smallest sizes, {QUICK_REPEATS} timed steps at most"
    )
    parser.add_argument("--plot", type=Path, default=Path("runs/scaling.png"), help="(default: runs/scaling.png)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    unknown = [name for name in options.sweeps if name not in SWEEPS]
    if unknown:
        parser.error(f"unknown sweep {unknown[0]!r}; there are {', '.join(SWEEPS)}")
    if options.repeats < 0:
        parser.error("--repeats must be at least 0")
    keep_large_buffers()
    most, repeats = (QUICK_SIZES, min(options.repeats, QUICK_REPEATS)) if options.quick else (None, options.repeats)
    progress = Console(stderr=True)
    chosen = options.sweeps or SWEEPS
    found = {name: points(name, SWEEPS[name][0][:most], repeats, progress) for name in chosen}
    draw(found, options.plot)
    if options.json:
        plain = {
            name: {
                "points": list(map(dataclasses.asdict, each)),
                "growth": {quantity: dataclasses.asdict(fit) for quantity, fit in growths(each).items()},
            }
            for name, each in found.items()
        }
        sys.stdout.write(json.dumps({"machine": machine(), "repeats": repeats, "sweeps": plain}, indent=2) + "\n")
        return
    where, out = machine(), Console(width=140)
    out.print(f"{where['machine']}: {where['processor']}, {where['cores']} cores; jax {where['jax']}", highlight=False)
    show(out, found)
    out.print(f"plot: {options.plot}", highlight=False)


if __name__ == "__main__":
    main()
