"""The same training and generation here and with PEFT on torch, step by step in turn, on this machine.

One Llama shape (12 layers, 512 wide, 8 heads, vocabulary 8,192; 46.3 M parameters in float32), the same batches, the
same adapter, AdamW with clipping on both sides. Each arm is a process of its own that stays; a round gives every arm
one step, so that all see the same machine. Three tables:

1. training at a fixed length (8 × 256 tokens): LoRA rank 8 on q and v, on all linear kernels, and full fine-tuning:
   real tokens a second (median), peak memory of the process, seconds of the first step (compilation included);
2. training on GSM8K at its real lengths, tokenised by a BPE of the same size trained on it: padded to the batch's
   longest row as PEFT's users do, against padded and packed here; tokens that are no padding count;
3. generation, greedy, prompts of different lengths: new tokens a second of `transformers`' generate and ours.

Needs the extra `parity` (torch and PEFT). Threads: both use all cores.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vlora_jax.training.allocator import TUNABLES

SHAPE = {"vocabulary": 8192, "width": 512, "layers": 12, "heads": 8, "mlp_width": 1376}
BATCH, LENGTH, RANK = 8, 256, 8
CEILING = 1024  # tokens of a GSM8K row at most; the longest has fewer
DATA = Path(__file__).parents[1] / "../shared/data/gsm8k/train.jsonl"
TARGETS = {"qv": ["q", "v"], "all-linear": ["q", "k", "v", "o", "gate", "up", "down"], "full": []}
PROMPTS, NEW = (40, 17, 64, 5, 33, 50, 28, 61), 128


def fixed_batches() -> Iterator[dict[str, np.ndarray]]:
    """Random tokens of a fixed length."""
    rng = np.random.default_rng(0)
    while True:
        tokens = rng.integers(0, SHAPE["vocabulary"], (BATCH, LENGTH + 1), np.int32)
        yield {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((BATCH, LENGTH), bool)}


def gsm8k_rows() -> list[np.ndarray]:
    """Token ids of every training problem with its solution, in a fixed random order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    texts = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, DATA.read_text().splitlines())]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocabulary"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    rows = [np.asarray(encoding.ids[:CEILING], np.int32) for encoding in tokenizer.encode_batch(texts)]
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def padded(rows: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Rows as one batch, zeros after their ends."""
    batch = {"tokens": np.zeros((len(rows), length), np.int32), "targets": np.zeros((len(rows), length), np.int32)}
    batch |= {"mask": np.zeros((len(rows), length), bool), "segments": np.zeros((len(rows), length), np.int32)}
    for place, row in enumerate(rows):
        batch["tokens"][place, : len(row) - 1], batch["targets"][place, : len(row) - 1] = row[:-1], row[1:]
        batch["mask"][place, : len(row) - 1] = batch["segments"][place, : len(row) - 1] = 1
    return batch


def longest_batches(multiple: int) -> Iterator[dict[str, np.ndarray]]:
    """GSM8K, `BATCH` rows at a time, padded to the longest of them, rounded up to a multiple."""
    rows = gsm8k_rows()
    while True:
        for start in range(0, len(rows) - BATCH, BATCH):
            chosen = rows[start : start + BATCH]
            yield padded(chosen, -(-(max(map(len, chosen)) - 1) // multiple) * multiple)


def packed_batches() -> Iterator[dict[str, np.ndarray]]:
    """GSM8K, several problems a row of 512 tokens: first fit, in the order of the data; 4 rows a batch."""
    rows, length, count = gsm8k_rows(), 512, 4
    rows = [row for row in rows if len(row) <= length + 1]  # all but a few
    waiting = list(rows)
    while True:
        batch = {name: np.zeros((count, length), np.int32) for name in ("tokens", "targets", "segments", "positions")}
        batch["mask"], used, documents = np.zeros((count, length), bool), [0] * count, [0] * count
        for row in list(waiting[:64]):  # the next problems only, as a buffer of a stream sees them
            fits = next((place for place in range(count) if used[place] + len(row) - 1 <= length), None)
            if fits is None:
                continue
            span = slice(used[fits], used[fits] + len(row) - 1)
            documents[fits] += 1
            batch["tokens"][fits, span], batch["targets"][fits, span] = row[:-1], row[1:]
            batch["segments"][fits, span], batch["mask"][fits, span] = documents[fits], True
            batch["positions"][fits, span] = np.arange(len(row) - 1)
            used[fits] += len(row) - 1
            waiting = [other for other in waiting if other is not row]
        yield batch
        if len(waiting) < 64:
            waiting += rows


BATCHES: dict[str, Callable[[], Iterator[dict[str, np.ndarray]]]] = {
    "fixed": fixed_batches,
    "padded": lambda: longest_batches(64),  # few shapes, so that few programs are compiled
    "longest": lambda: longest_batches(1),
    "packed": packed_batches,
}


def our_step(targets: str, data: str) -> Callable[[], int]:
    """One training step of ours; returns the tokens that were no padding."""
    import jax

    from vlora_jax import LoRA, init, split
    from vlora_jax.models.build import abstract_model, build
    from vlora_jax.models.decoder import DecoderConfig
    from vlora_jax.training.loss import LOSSES
    from vlora_jax.training.optimizers import OptimizerConfig, optimizer
    from vlora_jax.training.step import Subject, train_step

    config = DecoderConfig(**SHAPE, tied_head=False)  # type: ignore[arg-type]
    graphdef, _ = abstract_model(config)
    base = jax.jit(lambda key: split(build(config, key))[1])(jax.random.key(0))
    adapter = None
    if targets != "full":
        method = LoRA(rank=RANK, alpha=16, targets=TARGETS[targets])
        adapter = init(method, jax.random.key(1), base)
    subject = Subject(graphdef, adapter, LOSSES["next_token"])
    how = OptimizerConfig(rate=1e-4, warmup=0, schedule="constant", decay=0.0)
    tx = optimizer(how, 1000, base if adapter is None else adapter.trainable, adapter)
    state = jax.jit(lambda p: subject.start(p, tx, jax.random.key(2)))(base if adapter is None else adapter)
    base = base if adapter is not None else {}
    step, stream = train_step(subject, tx), BATCHES[data]()

    def one() -> int:
        nonlocal state
        batch = next(stream)
        micro: Any = {"id": np.arange(1), **{name: array[None] for name, array in batch.items()}}
        state, metrics = step(state, base, micro)
        float(metrics["loss"])
        return int(batch["mask"].sum())

    return one


def peft_step(targets: str, data: str) -> Callable[[], int]:
    """One training step of PEFT's; returns the tokens that were no padding."""
    import peft  # pyright: ignore[reportMissingImports]
    import torch

    model: Any = torch_model()
    if targets != "full":
        names = [f"{name}_proj" for name in TARGETS[targets]]
        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=names))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam, stream = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0), BATCHES[data]()
    model.train()

    def one() -> int:
        batch = {name: torch.from_numpy(array) for name, array in next(stream).items()}
        inputs = {"attention_mask": batch["segments"]} if "segments" in batch else {}
        logits = model(input_ids=batch["tokens"].long(), use_cache=False, **inputs).logits
        targets = torch.where(batch["mask"], batch["targets"].long(), -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        loss.item()
        return int(batch["mask"].sum())

    return one


def torch_model() -> Any:
    """The shape in transformers, with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=SHAPE["vocabulary"],
        hidden_size=SHAPE["width"],
        intermediate_size=SHAPE["mlp_width"],
        num_hidden_layers=SHAPE["layers"],
        num_attention_heads=SHAPE["heads"],
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def prompts() -> list[list[int]]:
    """Random prompts of different lengths."""
    rng = np.random.default_rng(0)
    return [rng.integers(1, SHAPE["vocabulary"], length).tolist() for length in PROMPTS]


def our_generation(rows: str, _: str) -> Callable[[], int]:
    """New tokens of one call to our generate."""
    import jax

    from vlora_jax import generate, split
    from vlora_jax.models.build import abstract_model, build
    from vlora_jax.models.decoder import DecoderConfig

    config = DecoderConfig(**SHAPE, tied_head=False)  # type: ignore[arg-type]
    graphdef = abstract_model(config)[0]
    base = jax.jit(lambda key: split(build(config, key))[1])(jax.random.key(0))
    chosen = prompts()[: int(rows)]
    return lambda: sum(map(len, generate(graphdef, base, chosen, most=NEW).tokens))


def their_generation(rows: str, _: str) -> Callable[[], int]:
    """New tokens of one call to transformers' generate."""
    import torch

    model, chosen = torch_model().eval(), prompts()[: int(rows)]
    length = max(map(len, chosen))
    tokens = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in chosen])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in chosen])

    def one() -> int:
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return (out.shape[1] - length) * len(chosen)

    return one


KINDS: dict[str, Callable[[str, str], Callable[[], int]]] = {
    "ours": our_step, "peft": peft_step, "ours generates": our_generation, "transformers generates": their_generation,
}  # fmt: skip


def serve(kind: str, what: str, data: str) -> None:
    """A worker: one step a line on standard input, `{"seconds", "tokens", "memory"}` a line on standard output."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    one = KINDS[kind](what, data)
    for _ in sys.stdin:
        began, cpu = time.perf_counter(), time.process_time()
        tokens = one()
        record = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu, "tokens": tokens}
        record["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(record), file=out, flush=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One arm: medians over the rounds after the first."""

    arm: str
    tokens_per_second: float
    cpu_seconds: float
    memory: int
    first: float


def measure(arms: dict[str, tuple[str, str, str]], rounds: int) -> list[Row]:
    """Take every arm's steps in turn."""
    environment = os.environ | {"GLIBC_TUNABLES": ":".join(f"{name}={value}" for name, value in TUNABLES.items())}
    workers = {}
    for name, arm in arms.items():
        command = [sys.executable, __file__, "--worker", json.dumps(arm)]
        tuned = environment if arm[0].startswith("ours") else None  # as `vlora-jax train` starts itself
        workers[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=tuned
        )
    records: dict[str, list[dict]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, worker in workers.items():
            assert worker.stdin
            assert worker.stdout
            worker.stdin.write("\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
            if not line:
                sys.exit(f"{name} ended: run {' '.join(map(str, worker.args))!r} to see why")  # type: ignore[arg-type]
            records[name].append(json.loads(line))
    for worker in workers.values():
        assert worker.stdin
        worker.stdin.close()
        worker.wait()
    rows = []
    for name, steps in records.items():
        later = steps[1:]
        speed = sum(s["tokens"] for s in later) / sum(s["seconds"] for s in later)
        if "fixed" in arms[name] or "generates" in arms[name][0]:  # equal steps: the median is robust
            speed = statistics.median(s["tokens"] / s["seconds"] for s in later)
        cpu = statistics.median(s["cpu"] for s in later)
        rows.append(Row(name, speed, cpu, max(s["memory"] for s in steps), steps[0]["seconds"]))
    return rows


def show(title: str, rows: list[Row], against: str, console: Console) -> None:
    """One table; the arm whose name begins with `against` has ratio 1 in its group."""
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("arm", "tokens/s", "÷ theirs", "CPU s a step", "peak MiB", "first step s"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    base = 1.0
    for row in rows:
        base = row.tokens_per_second if row.arm.startswith(against) else base
        table.add_row(
            row.arm, f"{row.tokens_per_second:,.0f}", f"{row.tokens_per_second / base:.2f}", f"{row.cpu_seconds:.2f}",
            f"{row.memory / 2**20:,.0f}", f"{row.first:.1f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="steps of every arm after the first")
    parser.add_argument("--only", choices=[*TARGETS, "gsm8k", "generate"], help="one part alone")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve(*json.loads(options.worker))
        return
    console = Console()
    for targets in TARGETS:
        if options.only in (None, targets):
            arms = {f"PEFT {targets}": ("peft", targets, "fixed"), f"ours {targets}": ("ours", targets, "fixed")}
            rows = measure(arms, options.rounds)
            show(f"training, {BATCH} × {LENGTH} tokens, {targets}", rows, "PEFT", console)
    if options.only in (None, "gsm8k"):
        if DATA.exists():
            for targets in ("qv", "all-linear"):
                arms = {"PEFT padded": ("peft", targets, "longest"), "ours padded": ("ours", targets, "padded")}
                arms["ours packed"] = ("ours", targets, "packed")
                title = f"training on GSM8K at its real lengths, {targets}"
                show(title, measure(arms, 4 * options.rounds), "PEFT", console)
        else:
            console.print(f"GSM8K left out: there is no {DATA.name} in {DATA.parent.name}/")
    if options.only in (None, "generate"):
        for rows in ("1", "8"):
            arms = {
                "transformers": ("transformers generates", rows, ""),
                "ours": ("ours generates", rows, ""),
            }
            title = f"greedy generation, {rows} prompts, {NEW} new tokens"
            show(title, measure(arms, max(3, options.rounds // 2)), "transformers", console)


if __name__ == "__main__":
    main()
