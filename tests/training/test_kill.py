"""SIGKILL at any moment, also in the middle of a save, then continue: bit for bit the run that was never killed."""

import io
import multiprocessing
import random
import time
from pathlib import Path

import pytest
from test_loop import TINY, assert_same_run

from vlora_jax.training.runs import CHECKPOINTS, METRICS

STEPS = 60
OVERRIDES = [*TINY, f"steps={STEPS}", "checkpoint.every=2", "evaluate.every=20", "data.augment=true"]


def session(run: Path) -> None:
    """One call of the command, in a process of its own."""
    import jax
    from rich.console import Console

    from vlora_jax.training.config import load_config
    from vlora_jax.training.loop import train

    train(load_config(None, [*OVERRIDES, f"run_dir={run}"]), Console(file=io.StringIO()), devices=jax.devices()[:1])


def lines(run: Path) -> int:
    return (run / METRICS).read_bytes().count(b"\n") if (run / METRICS).exists() else 0


def saving(run: Path) -> bool:
    """A save is under way: Orbax's temporary directory is there, or a step without its manifest."""
    found = list((run / CHECKPOINTS).glob("*")) if (run / CHECKPOINTS).exists() else []
    return any("tmp" in path.name or (path.name.isdigit() and not (path / "manifest.json").exists()) for path in found)


def killed(context, run: Path, kind: str, dice: random.Random) -> bool:
    """Start a session, kill it at a moment of this kind; whether it was still running then."""
    process = context.Process(target=session, args=(run,))
    process.start()
    if kind == "start":
        process.join(dice.uniform(0.2, 3.0))
    else:
        target, deadline = lines(run) + dice.randint(1, 4), time.monotonic() + 120
        wanted = (lambda: saving(run)) if kind == "save" else (lambda: lines(run) >= target)
        while not wanted() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.02))
    running = process.is_alive()
    process.kill()
    process.join()
    return running


@pytest.mark.slow
def test_twenty_kills_change_nothing(tmp_path):
    context = multiprocessing.get_context("forkserver")  # a clean process that has everything imported, forked anew
    context.set_forkserver_preload(["jax", "vlora_jax.training.loop", "sklearn.datasets", "sklearn.model_selection"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = context.Process(target=session, args=(whole,))
    process.start()
    process.join()
    assert process.exitcode == 0

    dice = random.Random(0)
    kinds = (["save", "step", "save", "step", "start", "save"] * 4)[:20]
    mid_save = 0
    for kind in kinds:
        assert killed(context, broken, kind, dice), "the run ended before it could be killed: too few steps"
        mid_save += saving(broken)
    assert mid_save >= 3, "no kill fell into a save"
    process = context.Process(target=session, args=(broken,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_run(whole, broken, STEPS)
