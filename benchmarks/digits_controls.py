"""Is it the increments? VLoRA on the digits against the controls that its claim needs (arXiv 2406.09315).

Every arm trains the embedded run's Vision Transformer for the same steps on the same data, over several seeds: the
dense model, hard tying (layers of a compound share their kernels as they are), VLoRA as star and chain with and
without detaching, and a dense model narrowed to VLoRA's number of parameters. Accuracy is that of the last step on
the held-out images, so that nothing is chosen by looking at them. All arms share one learning rate, that of the
embedded run. Step times are medians over all steps; the arms run one after another, so a busy machine blurs them.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from vlora_jax import count
from vlora_jax.data.pipeline import TrainBatches, held_out_batches
from vlora_jax.errors import VloraError
from vlora_jax.experiments.report import Mark
from vlora_jax.models.build import abstract_model
from vlora_jax.models.vit import ViTConfig
from vlora_jax.training.allocator import keep_large_buffers
from vlora_jax.training.config import RunConfig, load_config
from vlora_jax.training.job import Job
from vlora_jax.training.step import evaluate_step

SEEDS, STEPS = 5, 300
STRUCTURES = {
    "star, detach base": ["model.vertical.structure=star", "model.vertical.detach=base"],
    "star, no detach": ["model.vertical.structure=star", "model.vertical.detach=none"],
    "chain, detach base": ["model.vertical.structure=chain", "model.vertical.detach=base"],
    "chain, no detach": ["model.vertical.structure=chain", "model.vertical.detach=none"],
}


@dataclass(frozen=True)
class Arm:
    """One kind of model, trained over several seeds; accuracies are shares, times seconds."""

    name: str
    parameters: int
    accuracies: list[float]
    losses: list[float]
    step_seconds: float


def narrowed(model: ViTConfig) -> list[str]:
    """Overrides for the dense model whose number of parameters is nearest to that of a vertical one."""
    wanted = count(abstract_model(model)[1])
    dense = model.model_copy(update={"vertical": None})
    ratio = model.mlp_width // model.width
    widths = range(model.heads, model.width + 1, model.heads)
    sizes = {
        width: count(abstract_model(dense.model_copy(update={"width": width, "mlp_width": ratio * width}))[1])
        for width in widths
    }
    width = min(widths, key=lambda width: abs(sizes[width] - wanted))
    return ["model.vertical=null", f"model.width={width}", f"model.mlp_width={ratio * width}"]


def arms(model: ViTConfig) -> dict[str, list[str]]:
    """Overrides of the embedded run, by the arm's name."""
    narrow = narrowed(model)
    return {
        "dense": ["model.vertical=null"],
        f"dense, narrowed ({narrow[1].split('.')[1]})": narrow,
        "hard-tied": ["model.vertical.enabled=false"],
        **STRUCTURES,
    }


def trained(name: str, overrides: list[str], common: list[str], seeds: int, console: Console) -> Arm:
    """Train an arm over all seeds with one compiled program."""
    compiled: Any = None
    accuracies, losses, times, parameters = [], [], [], 0
    for seed in range(seeds):
        job = Job.of(load_config(None, [*common, *overrides, f"seed={seed}"]))
        compiled = compiled or (job.step().lower(job.state, job.base, job.batch).compile(), evaluate_step(job.subject))
        step, evaluate = compiled
        base, state = job.start()
        batches = TrainBatches(job.data, job.config.data.batch, job.config.accumulate, seed)
        parameters = job.model_parameters
        for _ in range(job.config.steps):
            batch = job.place(next(batches))
            began = time.perf_counter()
            state, metrics = step(state, base, batch)
            jax.block_until_ready(metrics["loss"])
            times.append(time.perf_counter() - began)
        sums = [evaluate(state, base, job.place(b)) for b in held_out_batches(job.data, job.config.evaluate.batch)]
        total = {key: sum(float(each[key]) for each in sums) for key in sums[0]}
        accuracies.append(total["correct"] / total["weight"])
        losses.append(total["loss"] / total["weight"])
        console.print(f"{name}, seed {seed}: accuracy {accuracies[-1]:.2%}", highlight=False)
    return Arm(name, parameters, accuracies, losses, statistics.median(times))


def show(console: Console, results: list[Arm], config: RunConfig) -> None:
    """All arms as a table."""
    seeds = len(results[0].accuracies)
    table = Table(
        title=f"digits, {config.steps} steps of {config.data.batch}, seeds: {seeds}; mean ± standard error",
        title_justify="left", box=None, padding=(0, 2, 0, 0),
    )  # fmt: skip
    table.add_column("model")
    for column in ("parameters", "of dense", "held-out accuracy", "held-out loss", "step", "of dense"):
        table.add_column(column, justify="right")
    dense = results[0]
    for arm in results:
        table.add_row(
            arm.name, f"{arm.parameters:,}", f"{arm.parameters / dense.parameters:.1%}",
            f"{Mark.of(arm.accuracies):.2%}", f"{statistics.mean(arm.losses):.4f}",
            f"{1e3 * arm.step_seconds:.1f} ms", f"{arm.step_seconds / dense.step_seconds:.2f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Takes about 15 minutes on 2 idle cores; --seeds 1 --steps 50 shows in 3 that it works.",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each model (default: {SEEDS})")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default: {STEPS})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config of every arm")
    options = parser.parse_args()
    if options.seeds < 1 or options.steps < 1:
        parser.error("--seeds and --steps must be at least 1")
    keep_large_buffers()
    common = [f"steps={options.steps}", *options.overrides]
    try:
        config = load_config(None, common)
        if not isinstance(config.model, ViTConfig) or config.model.vertical is None:
            parser.error("the model of the arms is a vertical Vision Transformer")
        results = [
            trained(name, overrides, common, options.seeds, Console(stderr=True))
            for name, overrides in arms(config.model).items()
        ]
    except VloraError as error:
        sys.exit(str(error))
    if options.json:
        sys.stdout.write(json.dumps([asdict(arm) for arm in results], indent=2) + "\n")
    else:
        show(Console(width=110), results, config)


if __name__ == "__main__":
    main()
