"""Runs on a base in 4 bits: trained, stopped, continued, merged, and put beside the base as it was."""

import json

import numpy as np
import pytest
from commands import call
from test_loop import LORA, assert_same_run, config, leaves_of, quiet

from vlora_jax.adapters.quantized import is_quantized
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import BaseMismatchError, ConfigError
from vlora_jax.training.job import Job
from vlora_jax.training.opened import open_adapter, open_model
from vlora_jax.training.results import read_run, write_ordinary
from vlora_jax.training.runs import read_metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "base"
    quiet(config(run))
    return run


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "qlora"
    return run, *quiet(config(run, *LORA, "quantize=nf4", f"init_from={base}"))


def held_out(run, step):
    return next(r["loss"] for r in read_metrics(run) if r["kind"] == "held_out" and r["step"] == step)


def test_it_learns_says_what_it_holds_and_keeps_the_adapter_alone(trained):
    run, _, shown = trained
    assert held_out(run, 12) < held_out(run, 0)
    assert "as nf4, 6.00 bits each with scales" in shown, "16 inputs to a scale"
    assert {name.split("/")[0] for name in leaves_of(run, 12)} == {"trainable", "optimizer", "rng"}
    again = read_run(run)
    assert again.missing == ""
    assert any(map(is_quantized, flatten(again.base).values()))


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(trained, base, tmp_path):
    run, *_ = trained
    other = config(tmp_path / "stopped", *LORA, "quantize=nf4", f"init_from={base}")
    quiet(other, stop_at=5)
    quiet(other)
    assert_same_run(run, tmp_path / "stopped", 12)


def test_a_merge_goes_onto_the_values_that_were_trained_on(trained, tmp_path):
    run, *_ = trained
    written = write_ordinary(read_run(run), tmp_path / "merged")
    assert written.gap < 1e-5 * max(1, written.largest)
    more = config(tmp_path / "more", "model=null", f"init_from={tmp_path / 'merged'}", "steps=1")
    result, _ = quiet(more)
    assert result.progress.first["loss"] == pytest.approx(held_out(run, read_run(run).step), abs=1e-5)
    merged = read_run(tmp_path / "merged")
    assert not any(map(is_quantized, flatten(merged.base).values()))
    assert merged.config.quantize is None


def test_its_adapter_is_not_taken_for_one_of_the_base_as_it_was(trained, base):
    run, *_ = trained
    with pytest.raises(BaseMismatchError, match="its base was held as nf4: merge it, or give the run itself"):
        open_adapter(str(run), open_model(str(base)))


def test_an_adapter_of_the_base_as_it_was_is_not_taken_for_one_of_a_quantised_base(trained, base, tmp_path):
    run, *_ = trained
    quiet(config(tmp_path / "plain", *LORA, f"init_from={base}", "steps=1", "optimizer.warmup=1"))
    with pytest.raises(BaseMismatchError, match="this one is held as nf4: give the adapter's own run, or the model as"):
        open_adapter(str(tmp_path / "plain"), open_model(str(run)))


def test_a_base_that_trains_or_has_nothing_to_hold_so_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="quantize nf4 is for a frozen base; without an adapter the model trains"):
        Job.of(config(tmp_path / "none", "quantize=nf4"))
    small = ["model.width=8", "model.mlp_width=8", "adapter.method=lora", "adapter.rank=2", "quantize=nf4"]
    with pytest.raises(ConfigError, match="no kernel can be held as nf4"):
        Job.of(config(tmp_path / "small", *small))


def test_where_codes_and_scales_lie_is_shown(trained, capsys):
    run, *_ = trained
    code, out, error = call(capsys, "inspect", run, "--specs", "--mesh", "1,2,1", "--json")
    assert (code, error) == (0, "")
    rows = {row["path"]: row for row in json.loads(out)["tensors"] if row["part"] == "base"}
    codes, scale = (rows[f"layers/block/mlp/up/kernel/{part}"] for part in ("codes", "scale"))
    assert (codes["dtype"], codes["shape"], scale["shape"]) == ("uint8", [1, 8, 16], [1, 1, 16])
    assert codes["bytes"] == np.prod(codes["shape"]), "one block of inputs is not split in two"


def test_another_form_is_another_run(trained, base):
    run, *_ = trained
    with pytest.raises(Exception, match="quantize"):
        quiet(config(run, *LORA, "quantize=int8", f"init_from={base}"))
