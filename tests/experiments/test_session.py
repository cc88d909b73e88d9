"""Members of one program: each is what `train` makes of its config alone, whoever is beside it, also after a stop."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_sweep import MODEL, RUN, members, write_base

from vlora_jax import checkpoint
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import BaseMismatchError, ResumeError
from vlora_jax.experiments import outcomes
from vlora_jax.experiments.joint import alone
from vlora_jax.experiments.session import BEST, STATE
from vlora_jax.experiments.sweep import Member, programs
from vlora_jax.training.config import load_config
from vlora_jax.training.loop import train
from vlora_jax.training.results import read_run
from vlora_jax.training.runs import CHECKPOINTS, newest_step, read_metrics

ONE, THREE = jax.devices()[:1], jax.devices()[:3]
UNLIKE = [  # rate, rank, scale, sites, clipping, decay, moments, schedule, length, patience: all in one program
    ["seed=1", "optimizer.rate=3e-2"],
    ["adapter.rank=4", "adapter.alpha=4", "adapter.targets=q|up", "optimizer.clip=0.5", "adapter.b_rate=4"],
    ["seed=2", "optimizer.rate=1e-9", "evaluate.every=1", "evaluate.patience=2", "evaluate.metric=accuracy"],
    [
        "optimizer.schedule=constant", "steps=4", "optimizer.clip=null", "optimizer.b2=0.9", "optimizer.decay=0.1",
        "adapter.rank_stabilised=true", "optimizer.groups={head: 0.1}", "optimizer.warmup=0",
    ],
    ["optimizer.rate=1e30", "optimizer.warmup=0"],
]  # fmt: skip


def swept(plan, folder, stop_at=None, devices=THREE):
    """Whether a sweep was stopped, and what it said."""
    lines, asked = [], iter(range(1, 1000))
    stop = (lambda: False) if stop_at is None else (lambda: next(asked) >= stop_at)
    return outcomes.sweep(plan, folder, devices, lines.append, lambda *_: None, stop), lines


def states(plan, folder):
    """Flat arrays of every member's last and best state, as by itself."""
    found = {}
    for number, program in enumerate(plan):
        path = outcomes.folder_of(folder, number)
        saved = checkpoint.read(path / CHECKPOINTS, newest_step(path))
        for place, (member, job) in enumerate(zip(program.members, program.jobs, strict=True)):
            for tree in (STATE, BEST):
                state = alone(job, saved.trees[tree], place)
                keys = dataclasses.replace(state, key=jax.random.key_data(state.key))
                found[member.number, tree] = {path: np.asarray(leaf) for path, leaf in flatten(keys).items()}
    return found


def assert_close(one, two, atol):
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=atol, atol=atol, err_msg=name)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "run")


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """Members that differ in all that may differ, over three devices: one of the six places only fills up."""
    folder = tmp_path_factory.mktemp("sweeps") / "finished"
    plan = programs(members(base, *UNLIKE), THREE)
    stopped, _ = swept(plan, folder)
    assert not stopped
    return plan, folder, outcomes.outcomes(plan, folder)


def same_as_alone(finished, place, folder):
    """Hold a member against `train` of its config: tensors, optimiser, evaluations, data order, losses, early stop."""
    plan, results, found = finished
    outcome, (program,) = found[place], plan
    job = program.jobs[place]
    result = train(
        job.config.model_copy(update={"run_dir": str(folder / "alone")}), Console(file=io.StringIO()), devices=ONE
    )
    assert (outcome.standing.step, outcome.standing.fault) == (result.step, "")
    mine = states(plan, results)[place, STATE]
    key = jax.random.key_data(result.state.key)
    theirs = {path: np.asarray(leaf) for path, leaf in flatten(dataclasses.replace(result.state, key=key)).items()}
    assert_close(mine, theirs, 1e-5)
    progress, own = result.progress, outcome.standing.progress
    assert (own.early, own.evaluations, own.units) == (progress.early, progress.evaluations, progress.units)
    for mark, like in ((own.first, progress.first), (own.last, progress.last), (own.best, progress.best)):
        assert mark == pytest.approx(like, abs=1e-5)
    records = outcomes.metrics_of(read_metrics(outcomes.folder_of(results, 0)), place)
    for record, like in zip(records, read_metrics(folder / "alone"), strict=True):
        kept = {name: value for name, value in record.items() if name != "step_seconds"}
        assert kept == {name: pytest.approx(like[name], abs=1e-5) if name != "kind" else like[name] for name in kept}
    return outcome, result


def test_members_that_differ_in_numbers_ranks_and_sites_share_a_program(finished):
    plan, _, found = finished
    assert [len(program.members) for program in plan] == [5]
    assert [outcome.standing.step for outcome in found[:4]] == [6, 6, 3, 4]
    assert [outcome.standing.progress.early for outcome in found[:4]] == [False, False, True, False]
    assert len({outcome.trained for outcome in found}) == 2


def test_a_member_that_diverges_fails_by_itself(finished):
    _, _, found = finished
    assert [bool(outcome.standing.fault) for outcome in found] == [False] * 4 + [True]
    assert "is not finite" in found[4].standing.fault
    assert outcomes.ranked(found[3:], "accuracy")[-1].best is None


@pytest.mark.slow
def test_a_member_whose_held_out_loss_is_not_finite_has_no_best_step(base, tmp_path):
    plan = programs(members(base, ["seed=1"], ["optimizer.rate=1e30", "optimizer.warmup=0", "evaluate.every=1"]), ONE)
    swept(plan, tmp_path, devices=ONE)
    good, bad = outcomes.outcomes(plan, tmp_path)
    assert (good.standing.step, good.standing.fault) == (6, "")
    assert bad.standing.fault == "step 1: the held-out loss is not finite"
    assert bad.standing.best is None


def test_a_member_with_a_rank_sites_and_clipping_of_its_own_is_what_train_makes(finished, tmp_path):
    outcome, result = same_as_alone(finished, 1, tmp_path)
    assert outcome.trained == sum(leaf.size for leaf in jax.tree.leaves(result.state.trainable))


@pytest.mark.slow
def test_a_member_that_stops_early_is_what_train_makes(finished, tmp_path):
    outcome, _ = same_as_alone(finished, 2, tmp_path)
    assert (outcome.standing.progress.early, outcome.standing.step) == (True, 3)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 3])
def test_every_other_member_is_what_train_makes(finished, place, tmp_path):
    same_as_alone(finished, place, tmp_path)


def test_a_stopped_sweep_continues_bit_for_bit(finished, tmp_path):
    plan, folder, found = finished
    stopped, _ = swept(plan, tmp_path, stop_at=4)  # after the one has stopped early, and the other has ended
    assert stopped
    active = [outcome.standing.active for outcome in outcomes.outcomes(plan, tmp_path)]
    assert active == [True, True, False, False, False]
    stopped, lines = swept(plan, tmp_path)
    assert not stopped
    assert f"continuing {outcomes.folder_of(tmp_path, 0)} after step 4" in lines
    one, two = states(plan, folder), states(plan, tmp_path)
    assert one.keys() == two.keys()
    for key in one:
        assert_close(one[key], two[key], 0)
    marks = lambda of: [(o.standing.progress.best, o.standing.progress.last, o.standing.data) for o in of]
    assert marks(outcomes.outcomes(plan, tmp_path)) == marks(found)
    losses = lambda path: [(r["step"], r["loss"], r.get("batch")) for r in read_metrics(outcomes.folder_of(path, 0))]
    assert losses(tmp_path) == losses(folder)
    before = (outcomes.folder_of(folder, 0) / "metrics.jsonl").read_text()
    assert swept(plan, folder) == (False, [])  # what is finished is left alone
    assert (outcomes.folder_of(folder, 0) / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_another_base_and_other_data_are_refused(finished, tmp_path):
    (program,), folder = finished[0], tmp_path
    swept([program], folder, stop_at=1)
    first, *rest = program.jobs
    other = dataclasses.replace(first, data=dataclasses.replace(first.data, fingerprint="0"))
    with pytest.raises(ResumeError, match="is not the data that this run was started on"):
        swept([dataclasses.replace(program, jobs=(other, *rest))], folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint, "fingerprint", lambda tree: "other")
        with pytest.raises(BaseMismatchError, match="was trained on a base with fingerprint"):
            swept([program], folder)


@pytest.mark.slow
def test_a_sweep_continues_on_other_devices(finished, tmp_path):
    plan, folder, _ = finished
    swept(plan, tmp_path, stop_at=2)
    swept(plan, tmp_path, devices=ONE)
    one, two = states(plan, folder), states(plan, tmp_path)
    for key in one:
        assert_close(one[key], two[key], 1e-5)


def test_a_member_becomes_the_run_that_train_would_have_left(finished, tmp_path):
    plan, folder, found = finished
    outcomes.write_run(plan[0], folder, found[1], tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert (run.missing, run.step) == ("", found[1].standing.progress.best["step"])
    assert run.base is not None
    state = states(plan, folder)[1, BEST]
    for path, leaf in flatten(run.adapter.trainable).items():
        np.testing.assert_array_equal(leaf, state[f"trainable/{path}"])
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    console = Console(file=io.StringIO(), width=200)
    again = train(run.config.model_copy(update={"run_dir": str(tmp_path / "run")}), console, devices=ONE)
    assert "is finished at step 6: nothing to do" in console.file.getvalue()
    assert again.progress.best == found[1].standing.progress.best


@pytest.mark.slow
def test_eight_members_on_eight_devices(base, tmp_path):
    many = members(base, *([f"seed={seed}", f"optimizer.rate={rate}"] for seed in range(4) for rate in (1e-3, 1e-2)))
    found = []
    for name, devices in {"one": ONE, "eight": jax.devices()}.items():
        plan = programs(many, devices)
        swept(plan, tmp_path / name, devices=devices)
        found.append(states(plan, tmp_path / name))
    for key in found[0]:
        assert_close(found[0][key], found[1][key], 1e-5)
    settings = outcomes.ranked(outcomes.outcomes(plan, tmp_path / "eight"), "accuracy")
    outcomes.write_runs(plan, tmp_path / "eight", settings, True)
    written = {path.name: read_run(path) for path in (tmp_path / "eight" / "members").iterdir()}
    assert {name: run.config.seed for name, run in written.items()} == {f"00{n}": n // 2 for n in range(8)}


@pytest.mark.slow
def test_a_base_over_fsdp_trains_the_same_members(base, tmp_path):
    """Then the batch lies over devices, not the members."""
    found = []
    for name, mesh in {"one": "mesh.data=1", "four": "mesh.fsdp=4"}.items():
        devices = ONE if name == "one" else jax.devices()[:4]
        plan = programs(members(base, ["seed=1", mesh], ["adapter.rank=4", mesh]), devices)
        swept(plan, tmp_path / name, devices=devices)
        found.append(states(plan, tmp_path / name))
    for key in found[0]:
        assert_close(found[0][key], found[1][key], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", "pissa", "vera", "adalora", "ia3"])
def test_other_methods_train_together_as_alone(base, method, tmp_path):
    sizes = {"ia3": [], "adalora": ["adapter.rank=2", "adapter.target_rank=1"]}.get(method, ["adapter.rank=2"])
    own = [*RUN, "model=null", f"init_from={base}", f"adapter.method={method}", "adapter.full=head", *sizes]
    one, other = (load_config(None, [*own, change]) for change in ("seed=1", "optimizer.rate=3e-3"))
    plan = programs([Member(0, {}, one), Member(1, {}, other)], ONE)
    swept(plan, tmp_path / "sweep", devices=ONE)
    same_as_alone((plan, tmp_path / "sweep", outcomes.outcomes(plan, tmp_path / "sweep")), 1, tmp_path)


@pytest.mark.slow
def test_whole_models_train_together_as_alone(tmp_path):
    own = [*MODEL, *RUN, "model.qkv_bias=false"]  # a key's bias has no gradient but rounding, which Adam makes large
    many = [Member(s, {}, load_config(None, [*own, f"seed={s}"])) for s in range(2)]
    plan = programs(many, ONE)
    swept(plan, tmp_path / "sweep", devices=ONE)
    same_as_alone((plan, tmp_path / "sweep", outcomes.outcomes(plan, tmp_path / "sweep")), 1, tmp_path)
