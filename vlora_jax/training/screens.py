"""The first and the last thing a run shows."""

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from vlora_jax.adapters.adapter import count
from vlora_jax.adapters.quantize import left_whole
from vlora_jax.adapters.quantized import is_quantized
from vlora_jax.adapters.trees import flatten
from vlora_jax.data.summary import Summary
from vlora_jax.distributed.specs import stored_bytes, undivided
from vlora_jax.training.job import Job, dense_twin

SHOWN = 600  # letters of a piece of an example
FAMILIES = {"vit": "Vision Transformer", "seq2seq": "encoder–decoder", "matrix": "matrix of zeros"}


def plain_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def title(job: Job) -> str:
    """A run in half a line."""
    model, vertical = job.model, job.model.vertical
    shared = (
        "" if vertical is None else f", {vertical.structure} of {vertical.size}" if vertical.enabled else ", hard-tied"
    )
    kind = "dense" if vertical is None else "VLoRA"
    what = f"{job.config.adapter.name} on a {kind}" if job.config.adapter is not None else kind
    family = FAMILIES.get(model.family, model.family)
    return f"{what} {family} ({model.layers} layers × {model.width}{shared}) on {job.data.name}"


def mebibytes(number: float) -> str:
    return f"{number / 2**20:,.1f} MiB"


def share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})"


def first_screen(job: Job, memory: Any = None) -> Table:
    """What is going to be trained, on what, and what it takes.

    Args:
      memory: `memory_analysis()` of the compiled step, where the backend has one.
    """
    config, vertical = job.config, job.model.vertical
    table = plain_table(title(job))
    total = job.model_parameters
    if vertical is not None:
        twin = dense_twin(job.model)
        table.add_row("parameters", f"{total:,}; {total / twin:.1%} of the dense twin's {twin:,}")
    else:
        table.add_row("parameters", f"{total:,}")
    table.add_row("trained", share(count(job.state.trainable), total))
    if job.subject.adapter is not None:
        sites, whole = job.subject.adapter.sites, job.subject.adapter.trainable["full"]
        if sites:
            shown = ", ".join(sorted({site.path.rsplit("/", 1)[-1] for site in sites}))
            table.add_row("adapter", f"{config.adapter.formula} at {sum(s.layers for s in sites)} kernels: {shown}")  # type: ignore[union-attr]
        if whole:
            table.add_row("trained whole", f"{sum(map(count, whole.values())):,} numbers: {', '.join(sorted(whole))}")
    if config.quantize is not None:
        table.add_row("quantised", held_in_fewer_bits(job))
    if job.choices:
        factored = [choice.path for choice in job.choices if choice.factored]
        built = [choice.path for choice in job.choices if not choice.factored]
        forms = [f"{name}: {', '.join(paths)}" for name, paths in (("factored", factored), ("built", built)) if paths]
        table.add_row("increments", f"{'; '.join(forms)} (the cheaper form in FLOPs)")
    examples = config.data.batch * config.accumulate
    micro = f" in {config.accumulate} micro-batches" if config.accumulate > 1 else ""
    table.add_row(
        "data", f"{len(job.data.train):,} to train on, {len(job.data.held_out):,} held out; {examples} a step{micro}"
    )
    if job.data.task == "next_token" and job.data.summary is None:
        table.add_row("supervised", f"{supervised(job):.1%} of the tokens")
    table.add_row(
        "types", f"parameters {job.model.param_dtype}, activations {job.model.dtype}, remat {job.model.remat}"
    )
    device = job.mesh.devices.flat[0]
    axes = " × ".join(f"{name} {size}" for name, size in job.mesh.shape.items() if size > 1) or "no mesh"
    axes += ", lengths over tensor between branches" if config.mesh.sequence else ""
    table.add_row("devices", f"{job.mesh.size} × {device.device_kind} ({axes})")
    for line in undivided(job.base if job.subject.adapter is not None else job.state.trainable, job.mesh):
        table.add_row("replicated", line)
    parts = job.bytes() | ({"temporaries": memory.temp_size_in_bytes} if memory is not None else {})
    table.add_row("memory", ", ".join(f"{name} {mebibytes(size)}" for name, size in parts.items()) + " a device")
    table.add_row("run", f"{config.run_dir}; stop with Ctrl-C, the same command continues")
    return table


def held_in_fewer_bits(job: Job) -> str:
    """What of a frozen base is quantised, and what is not."""
    assert job.config.quantize is not None
    held = [leaf for leaf in flatten(job.base).values() if is_quantized(leaf)]
    numbers, bits = sum(leaf.size for leaf in held), 8 * stored_bytes(held)
    text = (
        f"{share(numbers, job.model_parameters)} as {job.config.quantize}, {bits / numbers:.2f} bits each with scales"
    )
    return "; ".join([text, *left_whole(job.base, job.config.quantize)])


def data_screen(summary: Summary) -> Table:
    """What the rows hold: counts, what was left out or cut, and examples with the mask visible.

    What the loss counts stands in ⟦ ⟧, so that plain text shows it too.
    """
    table = plain_table("the data")
    for name, part in (("training", summary.train), ("held out", summary.held_out)):
        rows = f" in {part.rows:,} rows" if part.rows != part.documents else ""
        learnt = ""
        if part.supervised is not None:
            learnt = f"; supervised {share(part.supervised, part.tokens)}; {part.ends:,} end in a supervised eos"
        table.add_row(
            name,
            f"{part.documents:,} documents{rows} of {summary.length}; tokens: median {part.median}, longest "
            f"{part.longest}{learnt}",
        )
    for note in summary.notes:
        table.add_row("", Text(note))
    for warning in summary.warnings:
        table.add_row("warning", Text(warning, style="yellow"))
    for number, example in enumerate(summary.examples, 1):
        shown = Text()
        for text, learnt in example:
            short = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
            shown.append(f"⟦{short}⟧" if learnt else short, style="bold green" if learnt else "dim")
        table.add_row(f"example {number}", shown)
    return table


def supervised(job: Job) -> float:
    """Share of the held-out tokens that the loss counts."""
    masks = [job.data.held_out[index]["mask"].mean() for index in range(min(256, len(job.data.held_out)))]
    return float(sum(masks) / len(masks))


def last_screen(job: Job, progress: Any, curve: Path) -> Table:
    """What came out."""
    table = plain_table("done")
    total = job.model_parameters
    if job.config.adapter is not None:
        table.add_row("trained parameters", share(count(job.state.trainable), total))
        table.add_row("model parameters", f"{total:,}, unchanged")
    else:
        twin = dense_twin(job.model)
        table.add_row("parameters", f"{total:,}")
        if job.model.vertical is not None:
            table.add_row("dense twin", f"{twin:,} ({twin / total:.2f}× as many)")
    if progress.first is not None:
        table.add_row("held-out before", outcome(progress.first))
    if progress.last is not None:
        table.add_row("held-out", outcome(progress.last))
    if progress.best is not None and progress.best != progress.last:
        table.add_row("best", f"{outcome(progress.best)} at step {progress.best['step']} (kept)")
    table.add_row("seconds", f"{progress.seconds:.1f}")
    table.add_row("run directory", str(job.config.run_dir))
    table.add_row("loss curve", str(curve))
    return table


def outcome(found: dict[str, Any]) -> str:
    return f"accuracy {found['accuracy']:.2%}, loss {found['loss']:.4f}"
