"""LoRA on a real encoder: all-MiniLM-L6-v2 learns SST-2, beside the frozen encoder, and again inside PEFT.

Trains configs/minilm_sst2_lora.yaml over several seeds, as `vlora-jax train` does. Accuracy is that of the last step on
the dev sentences, so that nothing is chosen by looking at them. Beside it:

1. the frozen encoder, with its head trained, and with pooler and head trained (the method `selective`). The states of a
   frozen encoder never change: they are computed once, and each of many steps then takes the library's train step a
   millisecond. The learning rate is chosen on seed 0, by the accuracy on a tenth of the training sentences;
2. each seed's adapter, exported as `vlora-jax export` does, loaded by PEFT on torch over the package's own files and
   given the same tokens: the accuracy must be the same. Skipped without the extra `parity` (torch and PEFT).

Needs the extra `minilm` and the sentences at ../shared/data/sst2, seen from the project; others with data.path=… and
data.held_out=….
"""

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from vlora_jax import apply, count
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.dataset import DataSet, Example
from vlora_jax.data.pipeline import held_out_batches
from vlora_jax.errors import VloraError
from vlora_jax.experiments.report import Mark
from vlora_jax.hub.where import locate
from vlora_jax.training.allocator import keep_large_buffers
from vlora_jax.training.config import PretrainedConfig, RunConfig, load_config
from vlora_jax.training.exchange import export_adapter
from vlora_jax.training.job import Job, load_data
from vlora_jax.training.loop import train
from vlora_jax.training.loss import Sums, classification
from vlora_jax.training.optimizers import optimizer
from vlora_jax.training.results import Trained, read_run
from vlora_jax.training.step import Subject, evaluate_step, train_step

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/minilm_sst2_lora.yaml"
SEEDS, ROWS = 3, 64
PROBES = {"frozen encoder: head": "head", "frozen encoder: pooler, head": "[pooler, head]"}
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LONGER = 4  # steps of a frozen encoder's head for each of LoRA's


@dataclasses.dataclass(frozen=True)
class Arm:
    """What was trained, over several seeds; accuracies are shares, `seconds` those of one seed's run (median)."""

    name: str
    trained: int
    steps: int
    rate: float
    accuracies: list[float]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Twin:
    """One seed's adapter here and in PEFT: accuracies, rows answered otherwise, largest gap of a logit, and logit."""

    seed: int
    ours: float
    theirs: float
    differing: int
    gap: float
    largest: float


@dataclasses.dataclass(frozen=True)
class States:
    """A frozen encoder's last state of each row's first token, `(rows, 1, width)`, and the row's class."""

    states: np.ndarray
    labels: np.ndarray

    def select(self, chosen: np.ndarray) -> "States":
        return States(self.states[chosen], self.labels[chosen])

    def batch(self, chosen: np.ndarray) -> Example:
        """One micro-batch, as a step takes it; states are where `classification` expects images."""
        return {"image": self.states[chosen][None], "label": self.labels[chosen][None], "id": chosen[None]}

    def stream(self, batch: int, seed: int) -> Iterator[Example]:
        """Batches without end, in a new order every epoch."""
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(len(self.labels))
            for start in range(0, len(order) - batch + 1, batch):
                yield self.batch(order[start : start + batch])


def from_states(model: Any, batch: dict[str, Any], train: bool) -> Sums:
    """Loss of the classes that an encoder's pooler and head give to states."""
    return classification(lambda states, train: model.logits(model.pooled(states)), batch, train)


def states_of(job: Job, rows: Any) -> States:
    """What the encoder makes of a source of sentences."""
    base = job.parameters()

    @jax.jit
    def first(base: Any, batch: dict[str, Any]) -> jax.Array:
        model = nnx.merge(job.subject.graphdef, base)
        return model.hidden(batch["tokens"], batch["segments"], batch.get("types"))[:, :1]

    found = []
    for batch in held_out_batches(dataclasses.replace(job.data, held_out=rows), ROWS):
        found.append(np.asarray(first(base, {name: array[0] for name, array in batch.items()})))
    labels = np.array([rows[index]["label"] for index in range(len(rows))])
    return States(np.concatenate(found)[: len(rows)], labels)


def probed(common: list[str], seeds: int, say: Callable[[str], None]) -> list[Arm]:
    """The frozen encoder, with each of `PROBES` trained on its states."""
    common = [each for each in common if not each.startswith("adapter.")] + ["adapter.method=selective"]
    job_of = lambda full, seed: Job.of(load_config(CONFIG, [*common, f"adapter.full={full}", f"seed={seed}"]))
    began, arms = time.perf_counter(), []
    job = job_of("head", 0)
    rows, dev = (states_of(job, source) for source in (job.data.train, job.data.held_out))
    prepared = time.perf_counter() - began
    for name, full in PROBES.items():
        job = job_of(full, 0)
        arm = probe(name, job, [job_of(full, seed).start() for seed in range(seeds)], rows, dev, say)
        arms.append(dataclasses.replace(arm, seconds=arm.seconds + prepared))
    return arms


def probe(name: str, job: Job, starts: list[tuple], rows: States, dev: States, say: Callable[[str], None]) -> Arm:
    """What a job trains, learnt from states: first at every rate, then from every seed's start with the best."""
    subject, steps = Subject(job.subject.graphdef, job.subject.adapter, from_states), LONGER * job.config.steps
    marks = evaluate_step(subject)

    def accuracy(step: Any, seed: int, learnt: States, asked: States) -> float:
        base, state = starts[seed]
        state = jax.tree.map(jax.numpy.copy, state)  # the step takes its state's memory
        for _, batch in zip(range(steps), learnt.stream(job.config.data.batch, seed), strict=False):
            state, _ = step(state, base, batch)
        sums = marks(state, base, asked.batch(np.arange(len(asked.labels))))
        return float(sums["correct"] / sums["weight"])

    def step_of(rate: float) -> Any:
        how = job.config.optimizer.model_copy(update={"rate": rate})
        return train_step(subject, optimizer(how, steps, job.state.trainable, job.subject.adapter))

    order = np.random.default_rng(0).permutation(len(rows.labels))
    tenth, rest = rows.select(order[: len(order) // 10]), rows.select(order[len(order) // 10 :])
    found = {rate: accuracy(step_of(rate), 0, rest, tenth) for rate in RATES}
    rate = max(found, key=lambda rate: found[rate])
    say(f"{name}: of the left-out tenth, " + ", ".join(f"{share:.1%} at {rate:g}" for rate, share in found.items()))
    step, accuracies, times = step_of(rate), [], []
    for seed in range(len(starts)):
        began = time.perf_counter()
        accuracies.append(accuracy(step, seed, rows, dev))
        times.append(time.perf_counter() - began)
        say(f"{name}, seed {seed}: {accuracies[-1]:.2%}")
    return Arm(name, count(job.state.trainable), steps, rate, accuracies, statistics.median(times))


def adapted(common: list[str], seeds: int, runs: Path, say: Callable[[str], None]) -> tuple[Arm, list[Trained]]:
    """The config as it is, seed after seed."""
    trained, accuracies, times = [], [], []
    for seed in range(seeds):
        config = load_config(CONFIG, [*common, f"seed={seed}", f"run_dir={runs / str(seed)}"])
        result = train(config, Console(quiet=True))
        if result.stopped or result.progress.last is None:
            sys.exit(75)
        trained.append(read_run(runs / str(seed), result.step))
        accuracies.append(result.progress.last["accuracy"])
        times.append(result.progress.seconds)
        say(f"LoRA, seed {seed}: {accuracies[-1]:.2%}")
    adapter, config = trained[0].adapter, trained[0].config
    name = f"{adapter.method.name}, rank {getattr(adapter.method, 'rank', '–')}"
    seconds = statistics.median(times)
    return Arm(name, count(adapter), config.steps, config.optimizer.rate, accuracies, seconds), trained


def batches(data: DataSet) -> Iterator[dict[str, np.ndarray]]:
    """The dev sentences; the last batch has some of them again."""
    for batch in held_out_batches(data, ROWS):
        yield {name: array[0] for name, array in batch.items()}


def our_logits(trained: Trained, data: DataSet) -> np.ndarray:
    """Of all dev sentences, `(rows, classes)`."""

    @jax.jit
    def logits(base: Any, adapter: Any, batch: dict[str, Any]) -> jax.Array:
        return apply(
            trained.graphdef, base, adapter, batch["tokens"], segments=batch["segments"], types=batch.get("types")
        )

    found = [np.asarray(logits(trained.base, trained.adapter, batch)) for batch in batches(data)]
    return np.concatenate(found)[: len(data.held_out)]


def their_logits(exported: Path, model: PretrainedConfig, data: DataSet) -> np.ndarray:
    """The same of PEFT on torch."""
    import peft  # pyright: ignore[reportMissingImports]
    import torch
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)  # of one of them, about the other
    transformers.logging.set_verbosity_error()  # that the classifier is new: it comes with the adapter
    transformers.logging.disable_progress_bar()
    bare = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(locate(model.source)), num_labels=model.classes, dtype=torch.float32
    )
    adapted: Any = peft.PeftModel.from_pretrained(bare, str(exported)).eval()
    found = []
    for batch in batches(data):
        inputs = {name: torch.from_numpy(array).long() for name, array in batch.items() if array.ndim == 2}
        with torch.inference_mode():
            out = adapted(
                input_ids=inputs["tokens"], attention_mask=inputs["segments"], token_type_ids=inputs.get("types")
            )
        found.append(out.logits.numpy())
    return np.concatenate(found)[: len(data.held_out)]


def twins(trained: list[Trained], folder: Path, say: Callable[[str], None]) -> list[Twin]:
    """Every run's adapter here and in PEFT."""
    data, found = load_data(trained[0].config), []
    labels = np.array([data.held_out[index]["label"] for index in range(len(data.held_out))])
    for run in trained:
        exported = folder / f"peft{run.config.seed}"
        export_adapter(run, exported)
        model: Any = run.config.model
        ours, theirs = our_logits(run, data), their_logits(exported, model, data)
        answers = ours.argmax(-1), theirs.argmax(-1)
        right, theirs_right = (float((answer == labels).mean()) for answer in answers)
        differing, gap = int((answers[0] != answers[1]).sum()), float(np.abs(ours - theirs).max())
        found.append(Twin(run.config.seed, right, theirs_right, differing, gap, float(np.abs(ours).max())))
        say(f"seed {run.config.seed}: {right:.2%} here, {theirs_right:.2%} in PEFT")
    return found


def table(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    shown = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        shown.add_column(column, justify="right" if place else "left")
    for row in rows:
        shown.add_row(*row)
    return shown


def show(console: Console, config: RunConfig, arms: list[Arm], found: list[Twin], skipped: str) -> None:
    """Both tables."""
    seeds = len(arms[0].accuracies)
    columns = ("what is trained", "numbers", "rate", "steps", "dev accuracy", "lowest – highest", "seconds")
    rows = [
        (
            arm.name, f"{arm.trained:,}", f"{arm.rate:g}", f"{arm.steps:,}",
            f"{Mark.of(arm.accuracies):.2%}",
            f"{min(arm.accuracies):.2%} – {max(arm.accuracies):.2%}", f"{arm.seconds:.0f}",
        )
        for arm in arms
    ]  # fmt: skip
    title = f"MiniLM on SST-2, steps of {config.data.batch}, last step, {seeds} seeds; mean ± standard error"
    console.print(table(title, columns, rows))
    if skipped:
        console.print(skipped, highlight=False)
        return
    columns = ("seed", "here", "PEFT", "other answers", "largest logit gap", "largest logit")
    rows = [
        (str(t.seed), f"{t.ours:.2%}", f"{t.theirs:.2%}", str(t.differing), f"{t.gap:.1e}", f"{t.largest:.2f}")
        for t in found
    ]
    console.print(table("\nthe exported adapters in PEFT on torch, the same tokens", columns, rows))


def missing_files(config: RunConfig) -> list[str]:
    """Local files of sentences that are not there."""
    assert isinstance(config.data, DatasetConfig)
    places = [config.data.path, config.data.held_out]
    return [place for place in places if isinstance(place, str) and Path(place).suffix and not Path(place).exists()]


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    say = lambda line: Console(stderr=True).print(line, highlight=False, soft_wrap=True)
    own = load_config(CONFIG)
    assert isinstance(own.data, DatasetConfig)
    steps = options.steps or own.steps
    common = [f"data.path={ROOT / str(own.data.path)}", f"data.held_out={ROOT / str(own.data.held_out)}"]
    common += [f"steps={steps}", f"evaluate.every={steps}", f"checkpoint.every={steps}", "log.tensorboard=false"]
    common += options.overrides
    config = load_config(CONFIG, common)
    missing = missing_files(config)
    if missing:
        line = f"skipped: {missing[0]} does not exist; name files of sentences with data.path=… data.held_out=…"
        sys.stdout.write((json.dumps({"skipped": line}) if options.json else line) + "\n")
        return
    skipped = "" if all(map(importlib.util.find_spec, ("torch", "peft"))) else (
        "PEFT is not compared: torch and peft are missing, pip install 'vlora_jax[parity]'"
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        lora, trained = adapted(common, options.seeds, Path(folder), say)
        arms = [lora, *probed(common, options.seeds, say)]
        found = [] if skipped else twins(trained, Path(folder), say)
    if options.json:
        record = {"arms": arms, "peft": found}
        plain = {name: [dataclasses.asdict(each) for each in rows] for name, rows in record.items()}
        sys.stdout.write(json.dumps(plain | ({"skipped": skipped} if skipped else {}), indent=2) + "\n")
    else:
        show(Console(width=120), config, arms, found, skipped)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Takes about 15 minutes on 2 idle cores; --seeds 1 --steps 40 shows in 3 that it works.",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"runs of each kind (default: {SEEDS})")
    parser.add_argument("--steps", type=int, help="of LoRA (default: the config's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config of every arm")
    options = parser.parse_args()
    if options.seeds < 1 or (options.steps is not None and options.steps < 1):
        parser.error("--seeds and --steps must be at least 1")
    keep_large_buffers()
    try:
        run(options)
    except VloraError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
