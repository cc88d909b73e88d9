"""What a sweep came to: its programs run one after the other, its members ranked, the winner as a run of its own."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlora_jax import checkpoint
from vlora_jax.adapters.adapter import count
from vlora_jax.errors import NonFiniteError
from vlora_jax.experiments.joint import alone
from vlora_jax.experiments.report import Mark
from vlora_jax.experiments.session import BEST, STATE, Session, Standing, standings_of
from vlora_jax.experiments.sweep import Member, Program
from vlora_jax.training import screens
from vlora_jax.training.logs import draw_curve
from vlora_jax.training.loop import CURVE
from vlora_jax.training.progress import Progress, about
from vlora_jax.training.runs import CHECKPOINTS, CONFIG, METRICS, newest_step, read_config, read_metrics, write_whole

PROGRAMS, WINNER, MEMBERS = "programs", "winner", "members"  # in the directory of the results


@dataclass(frozen=True)
class Outcome:
    """One member and where it stands.

    Attributes:
      program, place: where it is trained.
      trained: numbers that it trains.
    """

    member: Member
    standing: Standing
    program: int
    place: int
    trained: int

    @property
    def good(self) -> bool:
        """Whether it has an evaluation and did not fail."""
        return self.standing.progress.best is not None and not self.standing.fault

    def order(self, metric: str) -> tuple[float, float]:
        """Of its best evaluation, the best member first; where two are equally accurate, the lower loss is."""
        best = self.standing.progress.best or {}
        return (-best["accuracy"] if metric == "accuracy" else 0.0, best["loss"])


@dataclass(frozen=True)
class Setting:
    """Members that differ in their seed only.

    Attributes:
      accuracy, loss: at their best evaluations, over the members that have one and did not fail; None if none has.
      best: the member that is best; None if none has an evaluation.
    """

    name: str
    outcomes: tuple[Outcome, ...]
    accuracy: Mark | None
    loss: Mark | None
    best: Outcome | None

    @property
    def failed(self) -> int:
        return sum(bool(outcome.standing.fault) for outcome in self.outcomes)


def folder_of(results: Path, number: int) -> Path:
    """The directory of a program."""
    return results / PROGRAMS / str(number)


def sweep(
    plan: Sequence[Program],
    results: Path,
    devices: Sequence[Any],
    say: Callable[[str], None],
    watch: Callable[[int, Sequence[Standing], int], None],
    stop: Callable[[], bool],
) -> bool:
    """Train what is missing of a sweep; true if a request to stop came first, and all is saved.

    Args:
      plan: of `vlora_jax.experiments.sweep.programs`.
      results: their directory.
      devices: to train on.
      say: told, in a line each, what happens.
      watch: shown the number of a program, how its members stand, and the step.
      stop: asked after every step.
    """
    for number, program in enumerate(plan):
        folder = folder_of(results, number)
        known = standings_of(folder)
        if known is not None and not any(standing.active for standing in known):
            continue
        shown = lambda standings, step, number=number: watch(number, standings, step)
        if Session(program, folder, devices, say, shown, stop).run():
            return True
    return False


def outcomes(plan: Sequence[Program], results: Path) -> list[Outcome]:
    """Members that have started, by their newest checkpoints, in the order of the grid."""
    found = []
    for number, program in enumerate(plan):
        standings = standings_of(folder_of(results, number)) or []
        for place, (member, job, standing) in enumerate(zip(program.members, program.jobs, standings, strict=False)):
            found.append(Outcome(member, standing, number, place, count(job.state.trainable)))
    return sorted(found, key=lambda outcome: outcome.member.number)


def ranked(found: Sequence[Outcome], metric: str) -> list[Setting]:
    """Settings, the best first: by the mean over seeds of the metric at each member's best evaluation.

    Those of which a member failed come after those of which none did.
    """
    by_setting: dict[str, list[Outcome]] = {}
    for outcome in found:
        by_setting.setdefault(outcome.member.setting, []).append(outcome)
    settings = []
    for name, of_setting in by_setting.items():
        good = sorted((outcome for outcome in of_setting if outcome.good), key=lambda each: each.order(metric))
        bests = [outcome.standing.progress.best or {} for outcome in good]
        mark = lambda key: Mark.of([best[key] for best in bests]) if bests else None  # noqa: B023
        first = good[0] if good else None
        settings.append(Setting(name, tuple(of_setting), mark("accuracy"), mark("loss"), first))

    def order(setting: Setting) -> tuple:
        if setting.accuracy is None or setting.loss is None:
            return (True, setting.failed, 0.0, 0.0)
        return (False, setting.failed, -setting.accuracy.mean if metric == "accuracy" else 0.0, setting.loss.mean)

    return sorted(settings, key=order)


def write_runs(plan: Sequence[Program], results: Path, settings: Sequence[Setting], everyone: bool) -> Outcome:
    """Write the winner, or every member that did not fail, as a run directory; returns the winner.

    Raises:
      NonFiniteError: all members failed.
    """
    winner = settings[0].best
    if winner is None:
        reason = settings[0].outcomes[0].standing.fault
        raise NonFiniteError(f"all members failed, the first at {reason}; try lower optimizer.rate in the grid")
    write_run(plan[winner.program], results, winner, results / WINNER)
    if everyone:
        for outcome in (outcome for setting in settings for outcome in setting.outcomes if outcome.good):
            write_run(plan[outcome.program], results, outcome, results / MEMBERS / f"{outcome.member.number:03d}")
    return winner


def write_run(program: Program, results: Path, outcome: Outcome, out: Path) -> None:
    """A member as the run directory that training it by itself would have left; replaces that of another member."""
    config = outcome.member.config.model_copy(update={"run_dir": str(out)})
    if (out / CONFIG).exists() and read_config(out).decisive() == config.decisive():
        return
    folder, standing = folder_of(results, outcome.program), outcome.standing
    newest = newest_step(folder)
    assert newest is not None  # outcomes are read from a checkpoint
    assert standing.best is not None
    assert standing.data is not None
    saved = checkpoint.read(folder / CHECKPOINTS, newest)
    fingerprint = saved.metadata["fingerprints"][outcome.place]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    job = dataclasses.replace(program.jobs[outcome.place], config=config)
    saver = checkpoint.Checkpoints(partial / CHECKPOINTS)
    at_best = Progress(**standing.best["progress"])
    best_step = (standing.progress.best or {})["step"]
    parts = {best_step: (BEST, at_best, standing.best["data"], True)}
    if best_step != standing.step:
        parts[standing.step] = (STATE, standing.progress, standing.data, False)
    for step, (tree, progress, position, is_best) in parts.items():
        state = alone(job, saved.trees[tree], outcome.place)
        told = about(job, progress, position, fingerprint, saved.metadata["source_step"])
        saver.save(step, job.trees(state), told, is_best)
    saver.close()
    records = [json.dumps(record) + "\n" for record in metrics_of(read_metrics(folder), outcome.place)]
    write_whole(partial / METRICS, "".join(records))
    write_whole(partial / CONFIG, yaml.safe_dump(config.plain(), sort_keys=False))
    draw_curve(partial, partial / CURVE, screens.title(job))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def metrics_of(records: Sequence[Mapping[str, Any]], place: int) -> list[dict[str, Any]]:
    """One member's records, of those of its program."""
    own = []
    for record in records:
        values = {name: value[place] if isinstance(value, list) else value for name, value in record.items()}
        if values["loss"] is not None:
            own.append(values)
    return own
