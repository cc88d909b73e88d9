"""The commands as a shell sees them: what they print, and how they end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import call
from compiling import QUICK
from test_loop import TINY

from vlora_jax.adapters.registry import METHODS
from vlora_jax.training.config import RunConfig
from vlora_jax.training.runs import METRICS, read_metrics

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"XLA_FLAGS": QUICK, "GLIBC_TUNABLES": ""}


ADAPTER = ["adapter.method=lora"]
BAD = {
    "unknown key": (["stepz=3"], "unknown key 'stepz'; nearest: 'steps'"),
    "unknown nested key": (["optimizer.rte=1"], "unknown key 'optimizer.rte'; nearest: 'optimizer.rate'"),
    "target that matches nothing": ([*ADAPTER, "adapter.targets=atn"], "target 'atn' matches nothing; nearest: "),
    "one target of several": ([*ADAPTER, "adapter.targets=[mlp,kq]"], "target 'kq' matches nothing; nearest: "),
    "rank 0": ([*ADAPTER, "adapter.rank=0"], "lora: rank is 0; it must be at least 1"),
    "rank above the kernel": ([*ADAPTER, "adapter.rank=17"], "rank 17 is above the smaller side, 16, of "),
    "NaN alpha": ([*ADAPTER, "adapter.alpha=.nan"], "lora: alpha is nan; it must be a finite number"),
    "a shared projection too small": (
        ["adapter.method=vera", "adapter.max_out=4"],
        "vera: max_out is 4; layers/block/attn/k needs 16, raise it or exclude the site",
    ),
    "unlike kernels for one tensor": (["adapter.method=lorta"], "kernels must be (16, 16), all of one size: exclude"),
    "vertical rank 0": (["model.vertical.increment.rank=0"], "lora: rank is 0; it must be at least 1"),
    "steps to profile": (["--profile-steps", "0:"], "log.profile_steps: must be the FIRST:LAST step to profile"),
    "steps beyond the last": (["--profile-steps", "10:13"], "log.profile_steps 10:13 ends beyond the last step, 12"),
    "missing file": (["--config", "configs/defualt.yaml"], "configs/defualt.yaml does not exist; nearest: "),
    "depth not divisible": (["model.layers=7"], "vertical.size 2 does not divide layers 7; nearest size that does: 1"),
    "batch over a mesh": (["data.batch=30"], "data.batch 30 cannot be split over 8 devices"),
    "no run to start from": (["model=null", "init_from=runs/nowhere"], "runs/nowhere does not exist"),
    "a model of other data": (
        ["data.name=pystdlib"],
        "data pystdlib/code is for next_token, which model.family vit cannot learn",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, message = BAD[case]
    tiny = [each for each in TINY if "model=null" not in arguments or not each.startswith("model.")]
    tiny = [each for each in tiny if not (case == "a model of other data" and each.startswith("data."))]
    code, out, error = call(capsys, "train", f"run_dir={tmp_path / 'run'}", *tiny, *arguments)
    assert (code, out) == (2, "")
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_an_unwritable_directory_and_a_run_of_another_config(tmp_path, capsys):
    (tmp_path / "file").touch()
    code, _, error = call(capsys, "train", *TINY, f"run_dir={tmp_path / 'file' / 'run'}")
    assert (code, "cannot be written" in error, error.count("\n")) == (2, True, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("steps: 3\n")
    code, _, error = call(capsys, "train", *TINY, f"run_dir={tmp_path / 'run'}")
    assert (code, "belongs to another config" in error, error.count("\n")) == (2, True, 1)


def test_print_config_is_a_config_that_gives_the_same(tmp_path, capsys):
    code, out, _ = call(capsys, "train", "--print-config", "seed=7")
    assert code == 0
    (tmp_path / "c.yaml").write_text(out)
    assert call(capsys, "train", "--config", str(tmp_path / "c.yaml"), "--print-config")[1] == out
    assert RunConfig(seed=7).plain() == yaml.safe_load(out)


def test_a_dry_run_shows_everything_and_writes_nothing(tmp_path, capsys):
    code, out, _ = call(capsys, "train", "--dry-run", *TINY, f"run_dir={tmp_path / 'run'}")
    assert code == 0
    for part in ("parameters", "of the dense twin's", "memory", "factored (", "nothing was trained or written"):
        assert part in out
    assert list(tmp_path.iterdir()) == []


def test_methods_lists_the_registry(capsys):
    code, out, _ = call(capsys, "methods")
    assert code == 0
    assert all(name in out for name in METHODS)
    records = json.loads(call(capsys, "methods", "--json")[1])
    assert [record["name"] for record in records] == list(METHODS)
    assert records[0]["options"]["rank"] == 8


def test_doctor_names_versions_and_devices(capsys):
    code, out, _ = call(capsys, "doctor")
    assert code == 0
    assert "nothing to fix" in out
    assert all(part in out for part in ("python", "jax", "device 7", "extra parity", "memory"))


def test_doctor_names_what_is_missing_and_the_fix(capsys, monkeypatch):
    from vlora_jax.cli import doctor

    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "optax" else "0.0.1")
    code, out, _ = call(capsys, "doctor")
    assert code == 1
    assert "to fix: optax" in out
    assert "pip install 'optax" in out


@pytest.mark.parametrize("kind", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_exits_with_75_and_the_same_command_continues(kind, tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = [*TINY, f"run_dir={run_dir}", "steps=4000", "evaluate.every=4000", "log.tensorboard=true"]
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and len(read_metrics(run_dir)) < 5:
        time.sleep(0.02)
    process.send_signal(kind)
    out, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (75, "stopping after the next step; once more to stop at once\n")
    done = read_metrics(run_dir)[-1]["step"]
    assert f"stopped and saved at step {done} of 4000; the same command continues {run_dir}" in out
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    code, out, _ = call(capsys, "inspect", str(run_dir), "--json")
    assert (code, json.loads(out)["step"]) == (0, done)
    assert (run_dir / METRICS).exists()


@pytest.mark.slow
def test_inspect_and_merge_of_a_run(tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert call(capsys, "train", *TINY, f"run_dir={run_dir}", "steps=1", "evaluate.every=1")[0] == 0
    code, out, _ = call(capsys, "inspect", str(run_dir), "--layers", "--where", "attn/q", "--sort", "relative")
    assert code == 0
    assert "layers/block/attn/q" in out
    assert "attn/k" not in out
    record = json.loads(call(capsys, "inspect", str(run_dir), "--json")[1])
    assert {row["path"] for row in record["changes"]} >= {"layers/block/attn/q", "layers/block/mlp/up"}
    assert all(0 < row["relative"] < 1 and 1 <= row["rank"]["mean"] <= 2.01 for row in record["changes"])
    code, _, error = call(capsys, "inspect", str(run_dir), "--where", "atn")
    assert (code, "--where 'atn' matches nothing; nearest: " in error) == (2, True)
    code, out, _ = call(capsys, "merge", str(run_dir), "--out", str(tmp_path / "dense"))
    assert code == 0
    assert "largest logit gap" in out
    assert call(capsys, "merge", str(run_dir), "--out", str(tmp_path / "dense"))[0] == 2
