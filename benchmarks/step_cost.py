"""What a training step costs: a LoRA step against the fewest FLOPs it can take, VLoRA against its dense twin.

Two tables from the library's own compiled training step (`vlora_jax.training.step.train_step`), on CPU:

1. LoRA on every linear kernel of a Llama-shaped decoder: the FLOPs of all matrix products that the compiled program
   executes, loops counted as often as they run, divided by those that no LoRA step can do without.
2. Training the whole model, dense against detached star VLoRA: step time (medians of steps taken in turns), CPU time
   of all threads, FLOPs and peak temporary bytes, for each remat policy, on that decoder and on ViT-B/16.

Only the second table is timed; compiled FLOPs and bytes are the same on every run.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from vlora_jax import LoRA, Method, count, find_sites, init, split
from vlora_jax.adapters.trees import Tree
from vlora_jax.inspection.hlo import dot_flops
from vlora_jax.models.build import abstract_model, build
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.stack import Remat
from vlora_jax.models.vit import ViTConfig
from vlora_jax.training.allocator import keep_large_buffers
from vlora_jax.training.loss import LOSSES
from vlora_jax.training.optimizers import OptimizerConfig, optimizer
from vlora_jax.training.step import Batch, Subject, TrainState, train_step
from vlora_jax.vertical.config import Vertical

DECODER = DecoderConfig(layers=12, width=512, heads=8, mlp_width=1376, vocabulary=16_384)
WIDE = DECODER.model_copy(update={"layers": 8, "width": 1024, "heads": 16, "mlp_width": 2752, "vocabulary": 256})
VIT_B16 = ViTConfig(
    image=224, patch=16, channels=3, classes=1000, layers=12, width=768, heads=12, mlp_width=3072, class_token=True
)
ADAPTER = LoRA(rank=8, targets="all-linear")
INCREMENT = LoRA(rank=8, alpha=1.0, start="kaiming_both")
STAR = Vertical(size=4, structure="star", detach="base", increment=INCREMENT)

LENGTH = 256  # tokens of a decoder's example
LORA_BATCHES, LORA_REMATS = (8, 16), ("none", "full")  # 8 examples are one chunk of the loss, 16 are two
TIMED: tuple[tuple[str, Any, int, tuple[Remat, ...]], ...] = (
    ("decoder", DECODER, 8, ("none", "dots", "full")),
    ("decoder, bytes", DECODER.model_copy(update={"vocabulary": 256}), 8, ("none",)),  # next to no head, as in 7B
    ("wide decoder", WIDE, 8, ("none",)),  # products take a larger share of its step, as in every real model
    ("one compound", WIDE.model_copy(update={"layers": 4}), 8, ("none",)),  # no loop, whose bookkeeping is no product
    ("ViT-B/16", VIT_B16, 8, ("none",)),
)
FLOPS_GOAL, TIME_GOAL = 1.10, 0.80
REPEATS, QUICK_REPEATS = 11, 3


@dataclass(frozen=True)
class Program:
    """One compiled training step.

    Attributes:
      trained: numbers that train.
      flops: of all matrix products that one step executes.
      temporary: peak bytes besides the arguments and results.
      start: draws what the step takes besides the batch: the state, and what stays frozen.
    """

    run: Any
    start: Any
    batch: Batch
    trained: int
    flops: float
    temporary: int


@dataclass(frozen=True)
class LoRARow:
    """The LoRA step against its floor; FLOPs of one step."""

    remat: str
    batch: int
    flops: float
    floor: float
    per_parameter_and_token: float
    floor_per_parameter_and_token: float
    ratio: float
    temporary_bytes: int


@dataclass(frozen=True)
class StepRow:
    """One model's full training step; seconds are medians."""

    shape: str
    remat: str
    model: Literal["dense", "star"]
    parameters: int
    seconds: float
    cpu_seconds: float
    flops: float
    temporary_bytes: int


def batch_of(config: Any, examples: int, length: int = LENGTH) -> Batch:
    """Random inputs and targets, one micro-batch; `length` tokens of each example, where there are tokens."""
    rng = np.random.default_rng(0)
    integers = lambda below, *shape: jnp.asarray(rng.integers(below, size=(1, examples, *shape)), jnp.int32)
    if isinstance(config, ViTConfig):
        images = rng.normal(size=(1, examples, config.image, config.image, config.channels))
        return {"id": integers(1), "image": jnp.asarray(images, jnp.float32), "label": integers(config.classes)}
    tokens, targets = (integers(config.vocabulary, length) for _ in range(2))
    return {"id": integers(1), "tokens": tokens, "targets": targets, "mask": jnp.ones_like(tokens)}


def compile_step(config: Any, examples: int, method: Method | None, length: int = LENGTH) -> Program:
    """The training step of an adapter on a model, or of the whole model, compiled from shapes."""
    graphdef, _ = abstract_model(config)
    task = "classification" if isinstance(config, ViTConfig) else "next_token"

    def parts(key: jax.Array) -> tuple[Any, Tree]:
        params = split(build(config, key))[1]
        if method is not None:
            return init(method, key, params), params
        trained, rest = nnx.split_state(params, nnx.Param, ...)
        return trained, rest

    trains, _ = jax.eval_shape(parts, jax.random.key(0))
    adapter = None if method is None else trains
    subject = Subject(graphdef, adapter, LOSSES[task])
    tx = optimizer(OptimizerConfig(), 1000, trains if adapter is None else adapter.trainable, adapter)

    def start(key: jax.Array) -> tuple[TrainState, Tree]:
        trains, base = parts(key)
        return subject.start(trains, tx, key), base

    return compiled_program(train_step(subject, tx), start, batch_of(config, examples, length), count(trains))


def compiled_program(step: Any, start: Callable, batch: Batch, trained: int) -> Program:
    """A jitted `(state, base, batch) → (state, …)`, compiled for what `start` draws from a key."""
    compiled = step.lower(*jax.eval_shape(start, jax.random.key(0)), batch).compile()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return Program(compiled, jax.jit(start), batch, trained, dot_flops(compiled.as_text()), temporary)


def lora_floor(config: DecoderConfig, examples: int, remat: str) -> tuple[float, int]:
    """FLOPs that no LoRA step on all linear kernels can do without, and the parameters of frozen products.

    For each token and kernel entry 2 forward and 2 for the gradient of the activations, none for that of the kernel.
    With full remat 2 more, but not for a block's last kernel, `down`, whose output nothing needs again, and not for
    the head. Attention has 6 products (2 forward, 4 backward; 2 more with full remat) over the pairs of tokens that a
    causal mask leaves.
    What is above the floor: the adapter's own products and the masked pairs that blocks of attention compute.
    """
    sites = [site for site in find_sites(abstract_model(config)[1]) if site.kind != "embed"]
    kernels = {site.path: site.layers * site.in_dim * site.out_dim for site in sites}
    head = config.vocabulary * config.width
    tokens, again = examples * LENGTH, remat == "full"
    repeated = sum(numbers for path, numbers in kernels.items() if not path.endswith("mlp/down")) if again else 0
    products = tokens * (4 * (sum(kernels.values()) + head) + 2 * repeated)
    pairs = examples * config.layers * config.heads * LENGTH * (LENGTH + 1) // 2
    return products + (8 if again else 6) * 2 * pairs * config.dim, sum(kernels.values()) + head


def lora_rows(console: Console) -> list[LoRARow]:
    """Compile the LoRA step in each form."""
    rows = []
    for examples in LORA_BATCHES:
        for remat in LORA_REMATS:
            config = DECODER.model_copy(update={"remat": remat})
            with console.status(f"compiling LoRA, remat {remat}, batch {examples}"):
                program = compile_step(config, examples, ADAPTER)
            floor, parameters = lora_floor(config, examples, remat)
            unit = parameters * examples * LENGTH
            ratio = program.flops / floor
            rows.append(
                LoRARow(
                    remat, examples, program.flops, floor, program.flops / unit, floor / unit, ratio, program.temporary
                )
            )
    return rows


def step_rows(console: Console, repeats: int) -> list[StepRow]:
    """Compile and time dense and star side by side in each form."""
    rows = []
    for shape, config, examples, remats in TIMED:
        for remat in remats:
            programs = {}
            for model, vertical in (("dense", None), ("star", STAR)):
                with console.status(f"compiling {shape}, {model}, remat {remat}"):
                    varied = config.model_copy(update={"remat": remat, "vertical": vertical})
                    programs[model] = compile_step(varied, examples, None)
            with console.status(f"timing {shape}, remat {remat}: {repeats} steps of each model in turns"):
                times = interleaved(programs, repeats)
            for model, program in programs.items():
                wall, cpu = (statistics.median(column) for column in zip(*times[model], strict=True))
                rows.append(StepRow(shape, remat, model, program.trained, wall, cpu, program.flops, program.temporary))
    return rows


def interleaved(programs: dict[str, Program], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds and CPU seconds of each step, the programs taking turns after one step each to warm up."""
    states = {name: program.start(jax.random.key(0)) for name, program in programs.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    for _ in range(repeats + 1):
        for name, program in programs.items():
            state, base = states[name]
            wall, cpu = time.perf_counter(), cpu_seconds()
            state, _ = jax.block_until_ready(program.run(state, base, program.batch))
            times[name].append((time.perf_counter() - wall, cpu_seconds() - cpu))
            states[name] = state, base
    return {name: each[1:] for name, each in times.items()}


def cpu_seconds() -> float:
    """Time that all threads of this process have computed, in user and system mode."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def machine() -> dict[str, Any]:
    """Where this runs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "machine": platform.node(),
        "processor": processor or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "allocator": os.environ.get("GLIBC_TUNABLES"),
    }


def ratios(rows: list[StepRow]) -> list[dict[str, Any]]:
    """Star ÷ dense in each form."""
    pairs = zip(rows[::2], rows[1::2], strict=True)
    keys = ("parameters", "seconds", "cpu_seconds", "flops", "temporary_bytes")
    return [
        {"shape": star.shape, "remat": star.remat, **{key: getattr(star, key) / getattr(dense, key) for key in keys}}
        for dense, star in pairs
    ]


def show_lora(console: Console, rows: list[LoRARow]) -> None:
    table = Table("remat", "batch", "FLOPs / parameter·token", "floor", "ratio", "temporary MB", title="1. LoRA step")
    for row in rows:
        table.add_row(
            row.remat,
            f"{row.batch} × {LENGTH}",
            f"{row.per_parameter_and_token:.3f}",
            f"{row.floor_per_parameter_and_token:.3f}",
            f"{row.ratio:.3f}",
            f"{row.temporary_bytes / 1e6:,.0f}",
        )
    console.print(table)
    worst = max(row.ratio for row in rows)
    console.print(f"Worst ratio {worst:.3f}; goal at most {FLOPS_GOAL:.2f}: {met(worst <= FLOPS_GOAL)}.")
    console.print(
        f"LoRA rank {ADAPTER.rank} on all linear kernels of {described(DECODER)}, head tied to the embedding. "
        "Parameters: kernels of frozen products, the head's too; looking an embedding up is no product. "
        "Floor: forward 2, activation gradient 2; with full remat 2 more, but for each block's last kernel, whose "
        "output nothing needs again, and the head; attention over causal pairs of tokens, 6 products, 8 with full "
        "remat. The adapter's own products and the masked half of attention's diagonal blocks are not in the floor.\n"
    )


def show_steps(console: Console, rows: list[StepRow], repeats: int) -> None:
    table = Table(
        "model", "remat", "", "parameters", "step s", "CPU s", "GFLOPs", "temporary MB", title="2. Full training"
    )
    for (dense, star), ratio in zip(zip(rows[::2], rows[1::2], strict=True), ratios(rows), strict=True):
        for row in (dense, star):
            cells = (f"{row.parameters:,}", f"{row.seconds:.3f}", f"{row.cpu_seconds:.3f}", f"{row.flops / 1e9:,.1f}")
            table.add_row(row.shape, row.remat, row.model, *cells, f"{row.temporary_bytes / 1e6:,.0f}")
        columns = ("parameters", "seconds", "cpu_seconds", "flops", "temporary_bytes")
        table.add_row("", "", "star ÷ dense", *(f"{ratio[column]:.3f}" for column in columns), end_section=True)
    console.print(table)
    for ratio in ratios(rows):
        if ratio["remat"] == "none":
            verdict = met(ratio["seconds"] <= TIME_GOAL)
            console.print(
                f"{ratio['shape']}, plain step: {ratio['seconds']:.3f} of the dense step; "
                f"goal at most {TIME_GOAL:.2f}: {verdict}."
            )
    console.print(
        f"Star VLoRA, {STAR.size} layers a compound, rank {INCREMENT.rank}, base detached, against its "
        f"dense twin; AdamW, float32, medians of {repeats} steps taken in turns. Decoder: {described(DECODER)}, "
        f"8 × {LENGTH} tokens; bytes: the same with a vocabulary of 256, so that the head, which VLoRA does not "
        f"change, takes as small a share of the step as in a large model; wide: {WIDE.layers} × {WIDE.width}, bytes; "
        "one compound: 4 layers of it; "
        "ViT-B/16: 8 images of 224 × 224, 1,000 classes. Temporary: peak bytes besides "
        "parameters, optimiser and batch, from the compiled program's memory analysis."
    )


def described(config: DecoderConfig) -> str:
    return (
        f"a decoder of {config.layers} layers × {config.width}, {config.heads} heads, MLP {config.mlp_width}, "
        f"vocabulary {config.vocabulary:,}"
    )


def met(reached: bool) -> str:
    return "met" if reached else "NOT met"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Close other programs before you trust the times: compare CPU seconds, which suffer less from company.\n"
        "Takes about 8 minutes on 2 idle cores, --quick 4, --part lora half a minute; needs 6 GB of memory.\n\n"
        "examples:\n"
        "  python benchmarks/step_cost.py --part lora          FLOPs and bytes only, nothing is timed\n"
        "  python benchmarks/step_cost.py --json > cost.json   the same figures for a program",
    )
    parser.add_argument("--part", choices=("lora", "steps", "all"), default="all", help="which table (default: both)")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"timed steps a model (default: {REPEATS})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_REPEATS} timed steps: to see that it works")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args()
    keep_large_buffers()
    repeats = QUICK_REPEATS if options.quick else options.repeats
    if repeats < 1:
        parser.error(f"--repeats {repeats}: it must be at least 1")
    if jax.default_backend() != "cpu":
        parser.error(
            f"backend {jax.default_backend()}: only CPU programs show all their products; set JAX_PLATFORMS=cpu"
        )

    out, progress = Console(width=100), Console(stderr=True)
    where = machine()
    if not options.json:
        out.print(f"{where['machine']}: {where['processor']}, {where['cores']} cores; jax {where['jax']}")
        out.print(
            f"memory allocator, the same for all: GLIBC_TUNABLES={where['allocator'] or 'not set'}\n", soft_wrap=True
        )
    lora = lora_rows(progress) if options.part != "steps" else []
    if lora and not options.json:
        show_lora(out, lora)
    steps = step_rows(progress, repeats) if options.part != "lora" else []
    if steps and not options.json:
        show_steps(out, steps, repeats)
    if options.json:
        tables = {"lora": list(map(dataclasses.asdict, lora)), "steps": list(map(dataclasses.asdict, steps))}
        print(json.dumps({**where, **tables, "star_over_dense": ratios(steps), "repeats": repeats}, indent=2))


if __name__ == "__main__":
    main()
