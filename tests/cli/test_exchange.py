"""import, export and merge of runs on models of transformers, without transformers."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import call
from helpers import close, filled, mostly_slow, moved
from safetensors.numpy import save_file

import vlora_jax as vj
from vlora_jax.errors import ResourceError
from vlora_jax.hub.load import load_model
from vlora_jax.hub.peft import read_peft, write_peft
from vlora_jax.hub.peft_file import CONFIG, TENSORS
from vlora_jax.hub.save import save
from vlora_jax.models.build import abstract_model
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.training.exchange import export_adapter, head_of, write_merged

LLAMA = DecoderConfig(
    width=8, heads=2, kv_heads=1, mlp_width=12, norm="rms", activation="silu", gated=True, qkv_bias=False,
    out_bias=False, mlp_bias=False, rotary_theta=1e4, vocabulary=11, layers=3, max_positions=None, tied_head=False,
)  # fmt: skip
IDS = jnp.array([[1, 2, 3, 10]])
METHODS = {
    "lora": vj.LoRA(rank=2, targets="attention", rank_pattern={"q": [1, 0, 2]}, full="norm"),
    "dora": vj.DoRA(rank=2, targets=["q", "head"]),
    "vera": vj.VeRA(rank=6, targets=["q", "down"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model directory, and the model as loaded from it."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    graphdef, shapes = abstract_model(LLAMA)
    save(folder, graphdef, filled(shapes, 0))
    return folder, load_model(folder, notify=lambda line: None)


@pytest.fixture(params=mostly_slow(list(METHODS), ("lora", "vera")))
def imported(request, base, tmp_path, capsys):
    """A PEFT directory, its adapters, and the run that it became."""
    folder, model = base
    adapter = jax.jit(lambda base: vj.init(METHODS[request.param], jax.random.key(0), base))(model.base)
    noise = moved(adapter)
    gains = {path: (frozen["gain"] != 0).astype(jnp.float32) for path, frozen in adapter.frozen["sites"].items()}
    for path, alive in gains.items():
        factors = noise.trainable["sites"][path]
        factors["a"], factors["b"] = factors["a"] * alive[:, None, :], factors["b"] * alive[:, :, None]
    write_peft(tmp_path / "peft", noise, model.base, model.names, base_name=str(folder))
    code, out, error = call(capsys, "import", tmp_path / "peft", "--out", tmp_path / "run")
    assert (code, error) == (0, "")
    assert f"{request.param} on {len(adapter.sites)} sites" in out
    return request.param, noise, tmp_path


def test_what_is_imported_is_exported_byte_for_byte(imported, base, capsys):
    _, _, folder = imported
    code, out, error = call(capsys, "export", folder / "run", "--out", folder / "again")
    assert (code, error) == (0, "")
    assert "read back" in out
    for name in (TENSORS, CONFIG):
        assert (folder / "again" / name).read_bytes() == (folder / "peft" / name).read_bytes()


def test_the_run_can_be_looked_into(imported, capsys):
    _, adapter, folder = imported
    code, out, _ = call(capsys, "inspect", folder / "run", "--json")
    assert code == 0
    rows = json.loads(out)["changes"]
    assert {row["path"] for row in rows} >= {site.path for site in adapter.sites}


def test_it_is_merged_into_a_model_of_transformers(imported, base, capsys):
    _, adapter, folder = imported
    code, out, error = call(capsys, "merge", folder / "run", "--out", folder / "merged")
    assert (code, error) == (0, "")
    assert "largest logit gap" in out
    merged, model = load_model(folder / "merged", notify=lambda line: None), base[1]
    apply = jax.jit(functools.partial(vj.apply, model.graphdef))
    close(apply(merged.base, None, IDS), apply(model.base, adapter, IDS), 1e-5)


def test_an_adapter_of_a_base_in_fewer_bits_says_so_to_who_loads_it(base, tmp_path):
    held = vj.quantize(base[1].base, "int8")
    adapter = jax.jit(lambda base: vj.init(vj.LoRA(rank=2, targets="q"), jax.random.key(0), base))(held)
    exported = write_peft(tmp_path / "peft", adapter, held, base[1].names)
    assert "trained on a base held as int8" in exported.about
    assert "trained on a base held as int8" in (tmp_path / "peft/README.md").read_text()


def test_a_directory_in_use_is_refused_before_anything_is_computed(unchecked, tmp_path):
    (tmp_path / "note").touch()
    for write in (write_merged, export_adapter):
        with pytest.raises(ResourceError, match="is there already and not empty"):
            write(None, tmp_path)  # looks at no run


def test_for_servers_its_residual_is_printed_and_limited(imported, base, capsys):
    name, _, folder = imported
    if name == "lora":
        code, _, error = call(capsys, "export", folder / "run", "--out", folder / "plain", "--as-lora")
        assert (code, "norm/scale is trained whole" in error, error.count("\n")) == (2, True, 1)
        return
    arguments = ("export", folder / "run", "--out", folder / "plain", "--as-lora", "--max-rank", 4)
    code, _, error = call(capsys, *arguments, "--limit", 0.001)
    assert (code, "above the limit 0.001" in error, error.count("\n")) == (2, True, 1)
    assert not (folder / "plain").exists()
    code, out, _ = call(capsys, *arguments)
    assert code == 0
    assert "layers/block/attn/q" in out
    (plain,) = read_peft(folder / "plain", base[1].base, base[1].names)
    assert (plain.method.name, plain.method.rank, plain.method.scale) == ("lora", 4, 1.0)


def test_an_adapter_tells_the_classes_of_its_head_also_where_its_task_is_not_told(tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.score.weight": np.zeros((5, 8), np.float32)}, tmp_path / TENSORS)
    assert head_of(tmp_path) == {"head": None}
    assert head_of(tmp_path, "lm") == {"head": "lm"}
    assert head_of(tmp_path, "sequence") == {"head": "sequence", "classes": 5}
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "task_type": "TOKEN_CLS"}')
    assert head_of(tmp_path) == {"head": "token", "classes": 5}


def test_mistakes_are_one_line_and_exit_code_2(base, tmp_path, capsys):
    folder, model = base
    adapter = vj.init(vj.LoRA(rank=2, targets="q"), jax.random.key(0), model.base)
    write_peft(tmp_path / "peft", adapter, model.base, model.names)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "note").touch()
    peft, run = tmp_path / "peft", tmp_path / "run"
    shutil.copytree(peft, tmp_path / "lost")
    known = json.loads((peft / CONFIG).read_text())
    (tmp_path / "lost" / CONFIG).write_text(json.dumps(known | {"init_lora_weights": "pissa_niter_4"}))
    wrong = {
        "init_lora_weights is 'pissa_niter_4'": ("import", tmp_path / "lost", "--out", run, "--base", folder),
        "does not name its base; give it with --base": ("import", peft, "--out", run),
        "no tensor changes the base": ("import", peft, "--out", run, "--base", folder),
        "is there already and not empty": ("import", peft, "--out", tmp_path / "used", "--base", folder),
        "head: Input should be 'lm', 'sequence'": ("import", peft, "--out", run, "--base", folder, "--head", "ml"),
        "classes: Input should be greater than 0": ("import", peft, "--out", run, "--base", folder, "--classes", 0),
        "dtype: Input should be 'float32' or": ("import", peft, "--out", run, "--base", folder, "--dtype", "int8"),
        "adapter_config.json does not exist": ("import", tmp_path, "--out", run, "--base", folder),
    }
    for message, arguments in wrong.items():
        code, out, error = call(capsys, *arguments)
        assert (code, out, error.count("\n")) == (2, "", 1), error
        assert message in error
    assert not run.exists()
    code, _, _ = call(capsys, "import", peft, "--out", run, "--base", folder, "--fresh")
    assert code == 0
    assert run.exists()
