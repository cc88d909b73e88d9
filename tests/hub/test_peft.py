"""PEFT's adapter directories without PEFT: what they mean, what is refused, and round trips."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, moved
from peft_tiny import IDS, Q, V, model, read, tensors, write

import vlora_jax as vj
from vlora_jax.adapters.merge import site_delta
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import AdapterFileError, BaseMismatchError, ConversionError, ResourceError
from vlora_jax.hub.peft import read_peft, write_peft
from vlora_jax.hub.peft_file import CONFIG, TENSORS, read_tensors


def test_a_file_s_change_is_its_formula(tmp_path):
    """ΔWᵀ = α/r · lora_B lora_A, in every layer."""
    (adapter,) = read(write(tmp_path))
    values, base = tensors(), flatten(model()[1])
    for site, key in zip(adapter.sites, (Q, V), strict=True):
        delta = jax.jit(functools.partial(site_delta, adapter, site))(base[site.leaf_path])
        for layer in range(3):
            a, b = (values[f"{key.format(layer)}.lora_{name}.weight"] for name in "AB")
            close(delta[layer], 1.5 * (b @ a).T)


def test_half_precision_files_are_read_in_float32(tmp_path):
    halves = {key: value.astype(np.float16) for key, value in tensors().items()}
    (adapter,) = read(write(tmp_path, halves))
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter)} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(
        adapter.factors("layers/block/attn/q")["a"][1], halves[f"{Q.format(1)}.lora_A.weight"].T
    )


def test_a_pattern_for_a_layer_gives_that_layer_its_rank(tmp_path):
    values = tensors() | {
        f"{Q.format(1)}.lora_A.weight": np.ones((5, 8), np.float32),
        f"{Q.format(1)}.lora_B.weight": np.ones((8, 5), np.float32),
    }
    (adapter,) = read(write(tmp_path, values, rank_pattern={"layers.1.self_attn.q_proj": 5}))
    assert adapter.method.rank_pattern == (("layers/block/attn/q", (2, 5, 2)),)
    start = vj.init(adapter.method, jax.random.key(0), model()[1])
    jax.tree.map(np.testing.assert_array_equal, adapter.frozen, start.frozen)
    assert jax.tree.map(jnp.shape, adapter.trainable) == jax.tree.map(jnp.shape, start.trainable)


CONFIGS = {
    "no type": ({"peft_type": None}, "peft_type is None; it can be LORA, "),
    "another method": ({"peft_type": "POLY"}, "peft_type is 'POLY'; it can be LORA, "),
    "an unknown field": ({"lora_alfa": 3}, "unknown field 'lora_alfa'; nearest: 'lora_alpha'"),
    "a rank of 0": ({"r": 0}, "r is 0: "),
    "a rank that is text": ({"r": "2"}, "r is '2': "),
    "an alpha that is no number": ({"lora_alpha": float("nan")}, "lora_alpha is nan; it must be finite"),
    "an infinite alpha": ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern.* is inf"),
    "a switch that changes the model": ({"layer_replication": [[0, 2]]}, "layer_replication is .* not supported"),
    "another such switch": ({"use_qalora": True}, "use_qalora is True"),
    "a start that cannot be rebuilt": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
    "another such start": ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda'.*let PEFT convert it"),
    "an expression with layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": [1]},
        "target_modules is a regular expression, which layers_to_transform",
    ),
    "a broken expression": ({"target_modules": "(q_proj"}, "target_modules: .* is not a regular expression"),
    "layers without a choice": ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    "one target too many": ({"target_modules": ["q_proj", "v_proj", "w_proj"]}, "target_modules 'w_proj' matches no"),
    "no target": ({"target_modules": []}, "target_modules .* matches no module"),
    "a target without a kernel": (
        {"target_modules": ["input_layernorm"]},
        "selects model.layers.0.input_layernorm, which",
    ),
    "a pattern of no module": ({"rank_pattern": {"w_proj": 4}}, "rank_pattern 'w_proj' matches no module"),
    "a pattern of no target": ({"alpha_pattern": {"up_proj": 4}}, "alpha_pattern 'up_proj' matches no module"),
    "patterns that differ": (
        {"rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 3}},
        "rank_pattern: .* both match model.layers.0.self_attn.q_proj and differ",
    ),
    "an exclusion of nothing": ({"exclude_modules": ["w_proj"]}, "exclude_modules 'w_proj' matches no module"),
    "a layer that is not there": ({"layers_to_transform": [0, 3]}, "layers_to_transform has 3, in which nothing"),
    "whole modules that are not there": ({"modules_to_save": ["score"]}, "modules_to_save 'score' matches no module"),
    "rows that are not there": ({"trainable_token_indices": [11]}, "must be different rows of model.embed_tokens"),
    "rows of no embedding": ({"trainable_token_indices": {"norm": [1]}}, "which is no embedding"),
    "rows and whole": (
        {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]},
        "model.embed_tokens has trained rows and is adapted or trained whole as well",
    ),
    "another rank": ({"r": 3}, r"lora_A.weight is \[2, 8\], expected \[3, 8\]"),
    "DoRA without magnitudes": ({"use_dora": True}, "6 of 18 tensors are missing .*lora_magnitude_vector"),
    "a bias of B in DoRA": ({"use_dora": True, "lora_bias": True}, "exclude each other"),
}


@pytest.mark.parametrize(("config", "message"), CONFIGS.values(), ids=CONFIGS)
def test_configs_that_do_not_fit_are_refused(tmp_path, config, message):
    with pytest.raises(AdapterFileError, match=message) as caught:
        read(write(tmp_path, **config))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


FIRST = f"{Q.format(0)}.lora_A.weight"


def without(key):
    return {name: value for name, value in tensors().items() if name != key}


VALUES = {
    "one dropped": (
        lambda: without(FIRST),
        "1 of 12 tensors are missing .*nearest to .*layers.0.self_attn.q_proj.lora_A",
    ),
    "one added": (
        lambda: tensors() | {f"{Q.format(7)}.lora_A.weight": np.ones((2, 8), np.float32)},
        "1 are unexpected",
    ),
    "one renamed": (
        lambda: without(FIRST) | {FIRST.replace("q_proj", "q_porj"): np.ones((2, 8), np.float32)},
        "1 of 12 tensors are missing .*1 are unexpected .*q_porj",
    ),
    "one transposed": (
        lambda: tensors() | {FIRST: np.ones((8, 2), np.float32)},
        r"q_proj.lora_A.weight is \[8, 2\], exp",
    ),
    "another prefix": (
        lambda: {key.replace("model.model", "model.language_model"): value for key, value in tensors().items()},
        "none of its 12 tensors fits this model: the file has base_model.language_model.*, the model needs base_",
    ),
    "a base tensor smuggled in": (
        lambda: tensors() | {f"{Q.format(0)}.base_layer.weight": np.ones((8, 8), np.float32)},
        "1 are unexpected .*base_layer.weight",
    ),
    "NaN": (
        lambda: tensors() | {FIRST: np.full((2, 8), np.nan, np.float32)},
        "q_proj.lora_A.weight has values that are",
    ),
    "infinity": (lambda: tensors() | {FIRST: np.full((2, 8), np.inf, np.float32)}, "has values that are not finite"),
    "nothing trained": (
        lambda: {key: value * ("lora_A" in key) for key, value in tensors().items()},
        "no tensor changes the base; fresh=True",
    ),
}


@pytest.mark.parametrize(("values", "message"), VALUES.values(), ids=VALUES)
def test_tensors_that_do_not_fit_are_refused(tmp_path, values, message):
    with pytest.raises(AdapterFileError, match=message):
        read(write(tmp_path, values()))


def test_an_adapter_that_is_announced_as_fresh_may_change_nothing(tmp_path):
    assert read(write(tmp_path, {k: v * ("lora_A" in k) for k, v in tensors().items()}), fresh=True)


def test_copies_of_the_base_must_be_copies(tmp_path):
    _, base, _ = model()
    key, table = "base_model.model.model.embed_tokens", np.asarray(flatten(base)["embed/embedding"])
    values = {
        f"{key}.lora_embedding_A": np.ones((2, 11), np.float32),
        f"{key}.lora_embedding_B": np.ones((8, 2), np.float32),
        f"{key}.base_layer.weight": table,
    }
    (adapter,) = read(write(tmp_path, values, target_modules=["embed_tokens"]))
    assert [site.path for site in adapter.sites] == ["embed"]
    with pytest.raises(AdapterFileError, match=r"embed_tokens.base_layer.weight must be a copy .* for another base"):
        read(write(tmp_path, values | {f"{key}.base_layer.weight": table + 1}, target_modules=["embed_tokens"]))


@pytest.mark.parametrize("config", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}])
def test_a_tied_head_is_refused_until_it_is_untied(tmp_path, config):
    with pytest.raises(AdapterFileError, match=r"model.embed_tokens shares its values with lm_head: .*untie=True"):
        read(write(tmp_path, **config), tied=True)


METHODS = {
    "lora": vj.LoRA(rank=3, alpha=5.5, targets="attention"),
    "every option": vj.LoRA(
        rank=2,
        alpha=3.0,
        rank_stabilised=True,
        targets=["attention", "head"],
        rank_pattern={"q": [4, 0, 2], "k": 1},
        alpha_pattern={"v": [1.0, 2.0, 0.5], "head": 7.0},
        bias=True,
        full=["norm", "attn_norm", "embed"],
    ),
    "dora": vj.DoRA(rank=2, targets="all-linear", rank_pattern={"mlp/up": [0, 1, 3]}, dropout=0.1),
    "an embedding": vj.LoRA(rank=2, targets="embed"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_written_reads_back_as_the_same_adapter(tmp_path, method):
    graphdef, base, names = model()
    adapter = moved(vj.init(method, jax.random.key(0), base))
    mask = {p: (f["gain"] != 0).astype(jnp.float32) for p, f in adapter.frozen["sites"].items()}
    for path, alive in mask.items():  # noise beyond a layer's rank has no effect, and is not written
        factors = adapter.trainable["sites"][path]
        factors["a"], factors["b"] = factors["a"] * alive[:, None, :], factors["b"] * alive[:, :, None]
        for name in {"m", "bias"} & set(factors):
            none = ~alive.any(axis=1)[:, None]
            start = vj.init(method, jax.random.key(0), base).factors(path)[name]
            factors[name] = jnp.where(none, start, factors[name])
    exported = write_peft(tmp_path / "out", adapter, base, names, base_name="tiny")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", CONFIG, TENSORS]
    (again,) = read_peft(tmp_path / "out", base, names)
    for part in ("trainable", "frozen"):
        ours, theirs = flatten(getattr(adapter, part)), flatten(getattr(again, part))
        assert set(ours) == set(theirs)
        for path, value in ours.items():
            np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    call = jax.jit(functools.partial(vj.apply, graphdef))
    close(call(base, again, IDS), call(base, adapter, IDS))
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert list(config) == sorted(config)
    assert config["base_model_name_or_path"] == "tiny"
    assert exported.tensors == len(read_tensors(tmp_path / "out" / TENSORS)[0])


def test_token_rows_go_beside_it(tmp_path):
    _, base, names = model()
    lora = moved(vj.init(vj.LoRA(rank=2, targets="q"), jax.random.key(0), base))
    rows = moved(vj.init(vj.TokenRows(indices=(7, 2), targets="embed"), jax.random.key(0), base))
    write_peft(tmp_path / "out", [lora, rows], base, names)
    again = read_peft(tmp_path / "out", base, names)
    assert [adapter.method.name for adapter in again] == ["lora", "token_rows"]
    np.testing.assert_array_equal(again[1].factors("embed")["rows"], rows.factors("embed")["rows"])


def test_what_the_format_cannot_say_is_refused(tmp_path):
    _, base, names = model()
    new = lambda method: vj.init(method, jax.random.key(0), base)
    lora = new(vj.LoRA(rank=2, targets="q"))
    for adapters, kinds in ([lora, lora], "lora, lora"), ([new(vj.Diagonal(targets="q"))], "diagonal"):
        with pytest.raises(
            ConversionError, match=f"one adapter of a method that PEFT has, and token_rows, not {kinds}; as_lora"
        ):
            write_peft(tmp_path / "out", adapters, base, names)
    with pytest.raises(ConversionError, match="not ; as_lora makes them one"):
        write_peft(tmp_path / "out", [], base, names)
    assert not (tmp_path / "out").exists()


def test_a_directory_in_use_is_left_alone(tmp_path):
    _, base, names = model()
    adapter = vj.init(vj.LoRA(rank=2, targets="q"), jax.random.key(0), base)
    (tmp_path / "note").write_text("mine")
    with pytest.raises(ResourceError, match="is there already and not empty"):
        write_peft(tmp_path, adapter, base, names)
    assert [path.name for path in tmp_path.iterdir()] == ["note"]
    (tmp_path / "new").mkdir()
    write_peft(tmp_path / "new", adapter, base, names)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "note"]


def test_a_file_of_ours_knows_its_base(tmp_path):
    _, base, names = model()
    write_peft(tmp_path / "out", moved(vj.init(vj.LoRA(rank=2, targets="q"), jax.random.key(0), base)), base, names)
    other = jax.tree.map(lambda leaf: leaf + 1, base)
    with pytest.raises(BaseMismatchError, match=r"made for the base \w+, this one is \w+; is it .*any_base=True"):
        read_peft(tmp_path / "out", other, names)
    assert read_peft(tmp_path / "out", other, names, any_base=True)
