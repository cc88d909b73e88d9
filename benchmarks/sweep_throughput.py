"""Adapters trained per second: many in one program, as `vlora-jax sweep` does, against one after another.

Members are LoRA adapters with rates of their own on one frozen, random Vision Transformer or decoder. A step of the
joint program and a step of a single run (the library's own, `Job.step`) are compiled first, which is timed apart, and
then taken in turns, reading and placing of their data included; figures are for runs of `--steps` steps.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from vlora_jax.data.pipeline import TrainBatches
from vlora_jax.experiments.joint import Joint
from vlora_jax.experiments.sweep import Member, programs
from vlora_jax.training.allocator import keep_large_buffers
from vlora_jax.training.config import load_config
from vlora_jax.training.job import Job

LORA = ["adapter.method=lora", "adapter.targets=attn|mlp", "optimizer.warmup=10"]
MODELS = {
    "vit": ["model.vertical=null", "model.layers=4", "data.batch=32"],
    "decoder": [
        "model=null", "model.family=decoder", "model.layers=4", "model.width=128", "model.heads=4",
        "model.mlp_width=352", "model.vocabulary=257", "data.name=pystdlib", "data.part=prose", "data.length=64",
        "data.batch=8", "evaluate.metric=loss",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One number of members; seconds are medians of a step, of the joint program and of a single run."""

    members: int
    joint_compile: float
    single_compile: float
    joint_step: float
    single_step: float
    joint_per_second: float
    single_per_second: float

    @property
    def ratio(self) -> float:
        return self.joint_per_second / self.single_per_second


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until the result is there, and the result."""
    began = time.perf_counter()
    result = jax.block_until_ready(function())
    return time.perf_counter() - began, result


def single(job: Job) -> tuple[float, Callable[[], Any]]:
    """Seconds to compile one run's step, and a function that takes the next one."""
    seconds, compiled = timed(lambda: job.step().lower(job.state, job.base, job.batch).compile())
    base, state = job.start()
    order = TrainBatches(job.data, job.config.data.batch, job.config.accumulate, job.config.seed)

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, base, job.place(next(order)))
        return metrics

    return seconds, step


def together(jobs: tuple[Job, ...]) -> tuple[float, Callable[[], Any]]:
    """The same of the joint step of several runs."""
    joint = Joint.of(jobs, jax.devices()[:1])
    starts = [job.start(begin=jobs[0].beginning) for job in jobs]
    state = joint.stacked([joint.joined(job, state) for job, (_, state) in zip(jobs, starts, strict=True)])
    base, own, active = joint.base(starts[0][0]), joint.own(), joint.flags([True] * len(jobs))
    orders = [TrainBatches(job.data, job.config.data.batch, job.config.accumulate, job.config.seed) for job in jobs]
    batch = joint.place([next(order) for order in orders])
    seconds, compiled = timed(lambda: joint.step().lower(state, base, batch, own, active).compile())

    def step() -> Any:
        nonlocal state
        state, metrics = compiled(state, base, joint.place([next(order) for order in orders]), own, active)
        return metrics

    return seconds, step


def row(model: str, count: int, rank: int, steps: int, repeats: int) -> Row:
    """Measure one number of members; both kinds of steps in turns, so that a busy moment meets both."""
    changes = [*MODELS[model], *LORA, f"adapter.rank={rank}", f"steps={steps}"]
    rates = [1e-3 * (1 + place) for place in range(count)]
    configs = [load_config(None, [*changes, f"optimizer.rate={rate}"]) for rate in rates]
    members = [Member(place, {}, config) for place, config in enumerate(configs)]
    (program,) = programs(members, jax.devices()[:1])
    joint_compile, joint_step = together(program.jobs)
    single_compile, single_step = single(program.jobs[0])
    joint_step()
    single_step()
    pairs = [(timed(joint_step)[0], statistics.median(timed(single_step)[0] for _ in range(3))) for _ in range(repeats)]
    joint, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
    return Row(count, joint_compile, single_compile, joint, alone, count / (steps * joint), 1 / (steps * alone))


def table(rows: list[Row], steps: int) -> Table:
    """All rows for a terminal."""
    shown = Table(title=f"adapters trained per second, {steps} steps each, compilation apart", box=None)
    for name in ("members", "together", "one by one", "ratio", "step together", "step alone", "compile", "alone"):
        shown.add_column(name, justify="right")
    for each in rows:
        shown.add_row(
            str(each.members), f"{each.joint_per_second:.3f}", f"{each.single_per_second:.3f}", f"{each.ratio:.2f}",
            f"{1e3 * each.joint_step:.1f} ms", f"{1e3 * each.single_step:.1f} ms", f"{each.joint_compile:.1f} s",
            f"{each.single_compile:.1f} s",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--members", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=100, help="of the runs that the figures are for")
    parser.add_argument("--repeats", type=int, default=15, help="joint steps that are timed")
    parser.add_argument("--json", type=Path, help="write the rows there as well")
    options = parser.parse_args()
    keep_large_buffers()
    rows = [row(options.model, count, options.rank, options.steps, options.repeats) for count in options.members]
    Console().print(table(rows, options.steps))
    print(f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}, model {options.model}")
    if options.json:
        options.json.write_text(json.dumps([asdict(each) | {"ratio": each.ratio} for each in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
