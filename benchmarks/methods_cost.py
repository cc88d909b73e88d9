"""What each method's training step costs beside LoRA's: numbers trained, time, FLOPs, memory.

Every method of the registry at its defaults, on the linear kernels of a Llama-shaped decoder (12 layers × 512), AdamW,
8 × 256 tokens, float32. Each is timed in turn with LoRA rank 8 in one process, and the ratio of the medians is quoted:
seconds depend on the machine and its company, ratios much less; CPU seconds are those of all threads. FLOPs are those
of all matrix products of the compiled step, per parameter of the frozen kernels and token; an FFT or a gather is not
counted. Temporary bytes are the compiled program's own figure.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses
import json
import math
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from step_cost import DECODER, LENGTH, compile_step, interleaved, lora_floor, machine

from vlora_jax import LoRA, Method
from vlora_jax.adapters.registry import METHODS
from vlora_jax.errors import VloraError
from vlora_jax.training.allocator import keep_large_buffers

EXAMPLES, LIMIT = 8, 1.3
LORA = LoRA(rank=8, targets="all-linear")
# What a method's defaults cannot do on this model, or what they would be too large for it.
OPTIONS: dict[str, dict[str, Any]] = {
    "vblora": {"length": 32},  # divides every side: 512, 1376
    "lorta": {"targets": "attention", "heads": 8},  # one tensor for all kernels, which must be alike
}
STEPS = 1000  # of the run that schedules are for
ASIDE = ("token_rows", "bitfit", "selective")  # embeddings only; no biases here; what a run names


@dataclass(frozen=True)
class Row:
    """One method; seconds, CPU seconds and temporary bytes relative to LoRA's in the same turns."""

    method: str
    trained: int
    seconds: float
    cpu_seconds: float
    temporary: float
    per_parameter_and_token: float
    why: str


def chosen(names: list[str]) -> list[Method]:
    """Methods by name, all that train something of this model if there are no names."""
    wanted = names or [name for name in METHODS if name not in ASIDE]
    unknown = [name for name in wanted if name not in METHODS]
    if unknown:
        sys.exit(f"unknown method {unknown[0]!r}; there are {', '.join(METHODS)}")
    return [METHODS[name](**OPTIONS.get(name, {})).for_run(STEPS) for name in wanted]


def rows(methods: list[Method], repeats: int, console: Console) -> list[Row]:
    """Compile and time each method beside LoRA."""
    _, parameters = lora_floor(DECODER, EXAMPLES, "none")
    with console.status("compiling lora"):
        lora = compile_step(DECODER, EXAMPLES, LORA)
    found = []
    for method in methods:
        with console.status(f"compiling {method.name}"):
            program = compile_step(DECODER, EXAMPLES, method)
        wall, cpu = math.nan, math.nan
        if repeats:
            with console.status(f"timing {method.name}: {repeats} steps in turns with lora"):
                times = interleaved({"lora": lora, "method": program}, repeats)
            wall, cpu = (
                statistics.median(each[place] for each in times["method"])
                / statistics.median(each[place] for each in times["lora"])
                for place in (0, 1)
            )
        flops = program.flops / (parameters * EXAMPLES * LENGTH)
        why = type(method).cost if wall > LIMIT else ""
        row = Row(method.name, program.trained, wall, cpu, program.temporary / lora.temporary, flops, why)
        console.print(
            f"{row.method}: {row.seconds:.2f} of LoRA's step, {flops:.2f} FLOPs", style="dim", highlight=False
        )
        found.append(row)
        jax.clear_caches()
    return found


def show(console: Console, found: list[Row]) -> None:
    columns = ("method", "trained", "step ÷ LoRA's", "CPU s ÷", "temporary ÷", "FLOPs / parameter·token", "why")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in sorted(found, key=lambda row: (row.seconds, row.per_parameter_and_token)):
        table.add_row(
            row.method, f"{row.trained:,}", f"{row.seconds:.2f}", f"{row.cpu_seconds:.2f}", f"{row.temporary:.2f}",
            f"{row.per_parameter_and_token:.3f}", row.why,
        )  # fmt: skip
    console.print(table)
    slow = [row.method for row in found if row.seconds > LIMIT]
    console.print(f"above {LIMIT} × LoRA's step: {', '.join(slow) or 'none'}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Takes about a minute a method on 2 idle cores.",
    )  # fmt: skip
    parser.add_argument("methods", nargs="*", help="names; all if not given")
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed steps of each; 0: FLOPs and bytes only (default: 7)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args()
    if options.repeats < 0:
        parser.error("--repeats must be at least 0")
    keep_large_buffers()
    try:
        found = rows(chosen(options.methods), options.repeats, Console(stderr=True))
    except VloraError as error:
        sys.exit(str(error))
    if options.json:
        record = {"machine": machine(), "rows": [dataclasses.asdict(row) for row in found]}
        sys.stdout.write(json.dumps(record, indent=2) + "\n")
    else:
        show(Console(width=160), found)


if __name__ == "__main__":
    main()
