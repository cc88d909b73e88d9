"""Run configs: what is read from files and overrides, and the one line that each mistake gets."""

from pathlib import Path

import pytest
import yaml

import vlora_jax as vj
from vlora_jax.errors import ConfigError
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.training.config import PystdlibConfig, RunConfig, load_config
from vlora_jax.vertical.config import Vertical

CONFIGS = Path(__file__).parents[2] / "configs"
DEFAULT = CONFIGS / "default.yaml"
DATASET = "data={name: dataset, format: text, "
PROFILE = "must be the FIRST:LAST step to profile, counted from 1, like 10:12"


def mistake(*overrides: str, path: Path | None = None) -> str:
    """The message of the error that a config raises; it must be one line."""
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown key 'sed'; nearest: 'seed'"),
        ("optimizer.rat=1", "unknown key 'optimizer.rat'; nearest: 'optimizer.rate'"),
        ("data.bach=3", "unknown key 'data.bach'; nearest: 'data.batch'"),
        ("model.widht=3", "unknown key 'model.widht'; nearest: 'model.width'"),
        ("model.vertical.sise=3", "unknown key 'model.vertical.sise'; nearest: 'model.vertical.size'"),
        ("digits=3", "unknown key 'digits'; nearest: 'init_from'"),
        ("data.digits=3", "unknown key 'data.digits'; nearest: 'data.turns'"),
        ("model={family: pretrained, sorce: x}", "unknown key 'model.sorce'; nearest: 'model.source'"),
        ("adapter.method=lroa", "adapter: unknown method 'lroa'; nearest: 'lora'"),
        ("adapter.rnk=3", "adapter: lora has no option 'rnk'; nearest: 'rank'"),
        ("model.vertical.increment.method=lroa", "model.vertical.increment: unknown method 'lroa'; nearest: 'lora'"),
        ("model.vertical.increment.rnk=3", "model.vertical.increment: lora has no option 'rnk'; nearest: 'rank'"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(override, message):
    assert mistake(override) == f"config: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=many", "steps: Input should be a valid integer (it is 'many')"),
        ("steps=true", "steps: Input should be a valid integer (it is True)"),
        ("steps=0", "steps: Input should be greater than 0 (it is 0)"),
        ("run_dir=3", "run_dir: Input should be a valid string (it is 3)"),
        ("optimizer.rate=.inf", "optimizer.rate: Input should be a finite number (it is inf)"),
        ("optimizer.groups.digits=-1", "optimizer.groups.digits: Input should be greater than 0 (it is -1)"),
        ("optimizer.name=adam", "optimizer.name: Input should be 'adamw', 'lion', 'sgd' or 'adafactor' (it is 'adam')"),
        ("checkpoint.keep=1", "checkpoint.keep: Input should be greater than or equal to 2 (it is 1)"),
        (
            "model.family=vti",
            "model.family: 'vti' is none of 'vit', 'decoder', 'encoder', 'seq2seq', 'matrix', 'pretrained'",
        ),
        ("data.name=digit", "data.name: 'digit' is none of 'digits', 'pystdlib', 'low_rank', 'dataset'"),
        ("data={batch: 3}", "data needs a name"),
        ("adapter.rank=0", "adapter: lora: rank is 0; it must be at least 1"),
        ("adapter.alpha=.nan", "adapter: lora: alpha is nan; it must be a finite number"),
        ("model.vertical.increment.rank=0", "model.vertical.increment: lora: rank is 0; it must be at least 1"),
        ("model.layers=10", "vertical.size 4 does not divide layers 10; nearest size that does: 5"),
        ("model=null", "model is null: give a model, or init_from to take one from a run"),
        ("mesh={data: -1, fsdp: -1}", "mesh [-1, -1, 1] must be sizes of at least 1, at most one of them -1"),
        (DATASET + "path: 3}", "data.path: Input should be a valid string (it is 3)"),
        (DATASET + "path: a, held_out: true}", "data.held_out: Input should be a valid string (it is True)"),
        (DATASET + "path: a, header: [3]}", "data.header.0: Input should be a valid string (it is 3)"),
        (DATASET + "path: a, lenght: 3}", "unknown key 'data.lenght'; nearest: 'data.length'"),
        ("optimizer.groups={3: 2.0}", "optimizer.groups.3: Input should be a valid string (it is 3)"),
        ("log.profile_steps=12:10", f"log.profile_steps: {PROFILE} (it is '12:10')"),
        ("log.profile_steps='0:'", f"log.profile_steps: {PROFILE} (it is '0:')"),
        ("log.profile_steps=0:3", f"log.profile_steps: {PROFILE} (it is '0:3')"),
        ("log.profile_steps=499:501", "log.profile_steps 499:501 ends beyond the last step, 500"),
        ("mesh.tensor=0", "mesh [-1, 1, 0] must be sizes of at least 1, at most one of them -1"),
    ],
)
def test_an_impossible_value_is_named_with_its_key(override, message):
    assert mistake(override) == f"config: {message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed' must look like key.sub=value"),
        ("seed=[", "override 'seed=[': '[' is not a YAML value"),
        ("seed=0b_", "override 'seed=0b_': '0b_' is not a YAML value"),
        ("seed=!!int x", "override 'seed=!!int x': '!!int x' is not a YAML value"),
    ],
)
def test_an_override_that_is_none(override, message):
    assert mistake(override) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: [1\nsteps: 2", ", line 2, column 6: expected ',' or ']', but got ':'"),
        ("- seed", " must hold keys and values, not list"),
        ("seed: 1\noptimizer: {rate: 1, rate: 2}", ", line 2, column 22: rate is given twice"),
        ("model: {width: 0x_}", ", line 1, column 16: invalid literal for int() with base 16: ''"),
        ("optimizer: {rat: 1}", ": unknown key 'optimizer.rat'; nearest: 'optimizer.rate'"),
        ("name: \xe9", " cannot be read: 'utf-8' codec can't decode byte 0xe9 in position 6: unexpected end of data"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert mistake(path=path) == f"{path}{message}"


def test_a_missing_file_is_answered_with_the_nearest(tmp_path):
    for name in ("lora.yaml", "decoder.yaml"):
        (tmp_path / name).write_text("seed: 1")
    assert mistake(path=tmp_path / "loar.yaml") == f"{tmp_path}/loar.yaml does not exist; nearest: {tmp_path}/lora.yaml"
    assert mistake(path=tmp_path / "no" / "a.yaml") == f"{tmp_path}/no/a.yaml does not exist"


def test_overrides_are_yaml_values(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {rate: 2E-4, warmup: 7}\nmodel: {family: vit, vertical: {size: 2}}")
    config = load_config(path, ["adapter={method: lora, rank: 3}", "adapter.alpha=1e+2", "model.vertical=null"])
    assert config.optimizer.rate == 0.0002
    assert config.optimizer.warmup == 7
    assert config.adapter == vj.LoRA(rank=3, alpha=100.0)
    assert config.model.vertical is None
    assert load_config(path, ["optimizer.rate=1e-3"]).optimizer.rate == 0.001
    assert load_config(path, ["log.profile_steps=10:12"]).log.profiled == range(10, 13), "no sexagesimal number"
    for date in ("2026-11-27", "2026-02-30"):
        assert load_config(path, [f"run_dir={date}"]).run_dir == date


@pytest.mark.parametrize("turn", [1, -1])
def test_a_tag_empties_its_section_wherever_it_stands(turn):
    overrides = ["data.length=32", "data.name=pystdlib", "model.vertical.increment.method=diagonal"]
    overrides += ["model.vertical.size=2", "model.vocabulary=300", "model.family=decoder"]
    config = load_config(None, overrides[::turn])
    assert config.data == PystdlibConfig(length=32)
    assert config.model == DecoderConfig(vocabulary=300, vertical=Vertical(size=2, increment=vj.Diagonal()))


def test_another_optimiser_keeps_its_rate_and_schedule(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {name: adamw, rate: 1e-4, schedule: linear, groups: {name: 2.0}}")
    optimizer = load_config(path, ["optimizer.name=lion", "optimizer.groups.head=0.5"]).optimizer
    assert (optimizer.name, optimizer.rate, optimizer.schedule) == ("lion", 1e-4, "linear")
    assert optimizer.groups == {"name": 2.0, "head": 0.5}


def test_an_open_rate_is_that_of_what_is_trained():
    """And is stored as a number, so that a run goes on with it whatever becomes of the defaults."""
    rate_and_decay = lambda *overrides: [
        load_config(None, overrides).plain()["optimizer"][k] for k in ("rate", "decay")
    ]
    assert rate_and_decay() == [3e-3, 0.3]
    assert rate_and_decay("adapter.method=vera") == [vj.VeRA.default_rate, 0.0]
    assert rate_and_decay("adapter.method=vera", "optimizer.rate=1e-4", "optimizer.decay=0.1") == [1e-4, 0.1]


def test_plain_values_are_the_whole_config(tmp_path):
    overrides = [
        "adapter.rank_pattern={mlp: 4}",
        "adapter.targets=[q, v]",
        "optimizer.groups={head: 0.1}",
        "mesh.fsdp=2",
    ]
    config = load_config(None, [*overrides, "model.family=decoder", "data.name=pystdlib", "init_from=runs/base"])
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.plain()))
    assert load_config(path) == config
    assert load_config(path) != load_config(path, ["adapter.rank_pattern.mlp=5"])


def identity(*overrides: str) -> dict:
    return load_config(None, overrides).identity()


@pytest.mark.parametrize(
    "override",
    ["run_dir=x", "mesh.data=4", "log.every=1", "log.progress=false", "checkpoint.keep=9", "evaluate.batch=7"],
)
def test_what_may_change_while_a_run_goes_on(override):
    assert identity(override) == identity()


MODEL = ("model.layers=8", "model.vertical.size=2", "model.vertical.increment.rank=2", "adapter.rank=3")
REST = ("seed=1", "steps=9", "accumulate=2", "data.batch=8", "optimizer.groups.head=2", "evaluate.every=1")


@pytest.mark.parametrize("override", [*MODEL, *REST, "init_from=runs/base"])
def test_what_makes_it_another_run(override):
    now, before = identity(override), identity()
    assert override.partition("=")[0] in {key for key in now | before if now.get(key) != before.get(key)}


def test_steps_may_change_where_nothing_done_depended_on_them():
    constant = ("optimizer.schedule=constant", "optimizer.warmup=100")
    assert identity(*constant, "steps=100") == identity(*constant, "steps=200")
    assert identity(*constant, "steps=99") != identity(*constant, "steps=200"), "the warmup was cut short"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_repository_loads(path):
    assert load_config(path).steps > 0


@pytest.mark.skipif(not DEFAULT.exists(), reason="configs/default.yaml is not there")
def test_the_default_config_is_what_runs_without_one():
    assert yaml.safe_load(DEFAULT.read_text()) == RunConfig().plain()
    assert load_config(DEFAULT) == load_config(None) == RunConfig()


def test_an_empty_file_is_the_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "run.yaml") == RunConfig()


def test_what_contradicts_itself_is_refused():
    assert mistake("model=null", "model.width=16") == "model=null leaves no room for model.width; drop one of them"
    assert mistake("model.vertical=true", "model.vertical.size=2").startswith("model.vertical.size: vertical is True")
    assert "must be without * ? [ ]" in mistake("run_dir=runs/lr[1e-3]")


def test_an_increment_with_one_option_keeps_the_released_others():
    overrides = ["model.family=decoder", "model.vertical.increment.rank=2"]
    increment = load_config(None, overrides).model.vertical.increment
    assert (increment.rank, increment.alpha, increment.start) == (2, 1.0, "kaiming_both")
