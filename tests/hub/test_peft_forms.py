"""Files of every method that PEFT has, without PEFT: round trips, and that nothing is passed over."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, moved
from peft_tiny import IDS, model
from test_methods import CHANGES_AT_START

import vlora_jax as vj
from vlora_jax.adapters.registry import METHODS
from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import AdapterFileError, ConversionError
from vlora_jax.hub.peft import read_peft, write_peft
from vlora_jax.hub.peft_file import CONFIG, TENSORS, read_tensors, write_tensors
from vlora_jax.hub.peft_forms import FORMS, form_of

SMALL = {
    "rank": 2,
    "target_rank": 1,
    "steps": 9,
}  # options for kernels as small as the ones here, where a method has them
# Beside those, for what a method has no default that fits, or a choice that its files must tell.
OPTIONS = {
    "ia3": {"feedforward": "down"},
    "randlora": {"alpha": 4.0},
    "fourierft": {"frequencies": 5, "scaling": 10.0},
    "vblora": {"vectors": 6, "length": 4},
    "ln_tuning": {"targets": ["attn_norm", "norm"]},
    "token_rows": {"targets": "embed", "indices": [7, 2]},
}
NAMES = [name for name, method in METHODS.items() if form_of(method)]

every_method = pytest.mark.parametrize("name", NAMES)
on_layers = pytest.mark.parametrize("name", [name for name in NAMES if "targets" not in OPTIONS.get(name, {})])


def new(name, **options):
    """An adapter with random values on three kernels of the tiny Llama."""
    fields = METHODS[name].__dataclass_fields__
    small = {key: value for key, value in SMALL.items() if key in fields} | OPTIONS.get(name, {})
    return drawn(METHODS[name](**{"targets": ["q", "v", "down"]} | small | options))


@functools.cache
def drawn(method):
    return moved(jax.jit(lambda base: vj.init(method, jax.random.key(0), base))(model()[1]))


def written(name, folder, **options):
    """Such an adapter and its directory."""
    _, base, names = model()
    adapter = new(name, **options)
    write_peft(folder / name, adapter, base, names)
    return adapter, folder / name


def read(folder, **options):
    _, base, names = model()
    return read_peft(folder, base, names, **options)


def changed(folder, change):
    """A directory's tensors as `change` makes them."""
    values = dict(read_tensors(folder / TENSORS)[0])
    values = change(values) or values
    write_tensors(folder / TENSORS, values, {"format": "pt"})


def edit(folder, **config):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_methods_say_what_peft_calls_them():
    assert {name: METHODS[name].peft for name in NAMES} == {
        form.method.name: form.peft_type for form in reversed(FORMS)
    }
    for name, method in METHODS.items():
        if method.peft:  # as it is, or as an adapter of another method that computes the same
            own = method.exported is vj.Method.exported
            exported = None if own else new(name)
            form = form_of(method if exported is None else type(exported.method.exported(exported).method))
            assert form is not None, f"PEFT has {name}, and there is no form to read and write it"
            assert form.peft_type == method.peft


@every_method
def test_what_is_written_reads_back_as_the_same_adapter(name, tmp_path):
    graphdef, base, _ = model()
    adapter, folder = written(name, tmp_path)
    (again,) = read(folder)
    ours, theirs = (flatten((each.trainable, each.frozen)) for each in (adapter, again))
    assert set(ours) == set(theirs)
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    place = {"targets": (), "exclude": (), "full": ()} | dict.fromkeys(
        (field for field in adapter.method.__dataclass_fields__ if isinstance(getattr(again.method, field), tuple)), ()
    )
    assert dataclasses.replace(again.method, **place) == dataclasses.replace(adapter.method, **place)
    call = jax.jit(functools.partial(vj.apply, graphdef))
    close(call(base, again, IDS), call(base, adapter, IDS))
    assert np.abs(call(base, again, IDS) - call(base, None, IDS)).max() > 1e-3


@every_method
def test_every_tensor_is_accounted_for(name, tmp_path):
    """Each of the first layer's and each shared one dropped, renamed, with another shape, or not finite."""
    _, folder = written(name, tmp_path)
    whole = dict(read_tensors(folder / TENSORS)[0])
    shared = [key for key in whole if not key.startswith("base_model.model.")]
    for key in [*shared, *(key for key in whole if "layers.0." in key or "layers" not in key)]:
        wrong = {
            f"1 of {len(whole)} tensors are missing" if len(whole) > 1 else "none of its 0 tensors fits": {
                name: value for name, value in whole.items() if name != key
            },
            "1 are unexpected": whole | {f"{key}_too": whole[key]},
            f"{key} is ": whole | {key: np.concatenate([whole[key], whole[key]])},
        }
        if whole[key].dtype == np.float32:
            wrong["not finite"] = whole | {key: np.full_like(whole[key], np.nan)}
        for message, values in wrong.items():
            write_tensors(folder / TENSORS, values, {})
            with pytest.raises(AdapterFileError, match=message.replace(".", r"\.")):
                read(folder)
    write_tensors(folder / TENSORS, whole, {})
    assert read(folder)


@every_method
def test_every_field_of_the_config_is_known_and_has_its_type(name, tmp_path):
    _, folder = written(name, tmp_path)
    config = json.loads((folder / CONFIG).read_text())
    kind = form_of(METHODS[name]).config
    edit(folder, **{f"{'bias' if 'bias' in config else 'target_modules'}_too": 3})
    with pytest.raises(AdapterFileError, match=r"unknown field '(bias|target_modules)_too'; nearest: '"):
        read(folder)
    for field in kind.lacks:
        (folder / CONFIG).write_text(json.dumps(config | {field: None}))
        with pytest.raises(AdapterFileError, match=f"unknown field '{field}'"):
            read(folder)
    for field in set(config) - {"peft_version", "inference_mode", "peft_type"} - kind.ignored:
        (folder / CONFIG).write_text(json.dumps(config | {field: {"a": [1.5]}}))
        with pytest.raises(AdapterFileError, match=field):
            read(folder)
    (folder / CONFIG).write_text(json.dumps(config))
    assert read(folder)


@every_method
def test_names_that_match_nothing_are_refused(name, tmp_path):
    _, folder = written(name, tmp_path)
    targets = json.loads((folder / CONFIG).read_text())["target_modules"]
    edit(folder, target_modules=[*targets, "w_proj"])
    with pytest.raises(AdapterFileError, match="target_modules 'w_proj' matches no module"):
        read(folder)
    edit(folder, target_modules=targets[:-1])
    with pytest.raises(AdapterFileError, match=r"unexpected|matches no module"):
        read(folder)


@on_layers
def test_layers_that_are_not_adapted_change_nothing(name, tmp_path):
    """A file without the second layer: its logits are those of the adapter with that layer as at the start."""
    graphdef, base, _ = model()
    adapter, folder = written(name, tmp_path)
    changed(folder, lambda values: {key: value for key, value in values.items() if "layers.1." not in key})
    config = json.loads((folder / CONFIG).read_text())
    modules = [
        f"model.layers.{n}.{m}" for n in (0, 2) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    edit(folder, target_modules=modules)
    if "feedforward_modules" in config:
        edit(folder, feedforward_modules=[module for module in modules if "down_proj" in module])
    if name in CHANGES_AT_START:
        with pytest.raises(
            AdapterFileError, match=r"layer 1 of layers/.* is not adapted, .* no values that change nothing"
        ):
            read(folder)
        return
    (again,) = read(folder)
    start = vj.init(adapter.method, jax.random.key(0), base)
    keep = lambda one, other: jnp.stack([one[0], other[1], one[2]])
    sites = jax.tree.map(keep, adapter.trainable["sites"], start.trainable["sites"])
    call = jax.jit(functools.partial(vj.apply, graphdef))
    close(call(base, again, IDS), call(base, adapter.with_trainable(adapter.trainable | {"sites": sites}), IDS))
    write_peft(tmp_path / "again", again, base, model()[2])
    before, after = (read_tensors(each / TENSORS)[0] for each in (folder, tmp_path / "again"))
    assert set(before) == set(after)


@on_layers
def test_what_is_trained_whole_goes_with_it(name, tmp_path):
    _, base, names = model()
    adapter = new(name, full=["norm", "head"])
    write_peft(tmp_path / "out", adapter, base, names)
    (again,) = read(tmp_path / "out")
    assert set(again.trainable["full"]) == {"norm/scale", "head/kernel"}
    jax.tree.map(np.testing.assert_array_equal, again.trainable["full"], adapter.trainable["full"])


@every_method
def test_a_fresh_adapter_is_told_from_a_trained_one(name, tmp_path):
    _, base, names = model()
    start = vj.init(new(name).method, jax.random.key(0), base)
    write_peft(tmp_path / "out", start, base, names)
    if name in CHANGES_AT_START:
        assert read(tmp_path / "out")
        return
    with pytest.raises(AdapterFileError, match="no tensor changes the base; fresh=True"):
        read(tmp_path / "out")
    assert read(tmp_path / "out", fresh=True)


@on_layers
def test_the_card_says_what_it_is(name, tmp_path):
    _, folder = written(name, tmp_path)
    card = (folder / "README.md").read_text()
    assert f"# {METHODS[name].__name__}" in card
    assert ", ".join(json.loads((folder / CONFIG).read_text())["target_modules"]) in card


@on_layers
def test_as_a_plain_lora_it_changes_the_model_alike(name):
    """Of the kernels' full rank: nothing is left out; where the change is thin, not even by rounding."""
    graphdef, base, _ = model()
    adapter = new(name)
    lora, residuals = vj.as_lora(base, adapter, max_rank=8)
    call = jax.jit(functools.partial(vj.apply, graphdef))
    close(call(base, lora, IDS), call(base, adapter, IDS), 1e-5)
    for site in adapter.sites:
        factors = {key: value[0] for key, value in adapter.factors(site.path).items()} | adapter.shared_at(site.path)
        pair = adapter.method.for_site(site).low_rank((site.in_dim, site.out_dim), factors)
        thin = pair is not None and pair[0].shape[1] <= 8
        assert residuals[site.path].max() <= (0 if thin else 1e-5)


@on_layers
def test_kernels_that_peft_does_not_have_it_for_are_refused(name, tmp_path):
    form = form_of(METHODS[name])
    if form.embeddings:
        pytest.skip("PEFT has it for embeddings")
    _, base, names = model()
    folder = tmp_path / "out"
    try:
        adapter = new(name, targets=["q", "down", "embed"])
    except vj.errors.ConfigError:
        pytest.skip("neither have we")
    with pytest.raises(
        ConversionError, match=f"embed_tokens is an embedding, for which PEFT does not have {form.peft_type}"
    ):
        write_peft(folder, adapter, base, names)
    _, folder = written(name, tmp_path)
    edit(folder, target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"])
    with pytest.raises(AdapterFileError, match="embed_tokens is an embedding"):
        read(folder)


def test_whole_numbers_are_told_from_others(tmp_path):
    _, folder = written("vera", tmp_path)
    changed(folder, lambda values: values | {"base_model.vera_A": values["base_model.vera_A"].astype(np.int32)})
    with pytest.raises(AdapterFileError, match=r"base_model.vera_A is I32; F32, F16, BF16 are possible"):
        read(folder)


def test_vera_s_projections_may_be_left_to_the_key(tmp_path):
    """Without them the file is smaller and means the same; with the wrong flag or other values it is refused."""
    _, base, names = model()
    adapter, folder = written("vera", tmp_path, save_projection=False, projection_key=7)
    assert not any("vera_A" in key for key in read_tensors(folder / TENSORS)[0])
    (again,) = read(folder)
    jax.tree.map(np.testing.assert_array_equal, again.shared, adapter.shared)
    edit(folder, save_projection=True)
    with pytest.raises(AdapterFileError, match=r"2 of 20 tensors are missing .*base_model.vera_A"):
        read(folder)
    other = new("vera", save_projection=False, projection="jax")
    with pytest.raises(ConversionError, match="vera: save_projection is false, and A and B are not what PEFT draws"):
        write_peft(tmp_path / "other", other, base, names)
    larger = new("vera", max_in=16)
    with pytest.raises(ConversionError, match=r"are not of the size that PEFT gives them, \(12, 8\)"):
        write_peft(tmp_path / "larger", larger, base, names)
    write_peft(tmp_path / "kept", new("vera", projection="jax"), base, names)
    (again,) = read(tmp_path / "kept")
    jax.tree.map(np.testing.assert_array_equal, again.shared, new("vera", projection="jax").shared)


IA3_CONFIGS = {
    "a list that is left out": ({"feedforward_modules": None}, "feedforward_modules is null, which stands for a list"),
    "a name of nothing": ({"feedforward_modules": ["up_proj"]}, "feedforward_modules 'up_proj' matches no module that"),
    "another side": ({"feedforward_modules": []}, r"down_proj.ia3_l is \[1, 12\], expected \[8, 1\]"),
    "layers that differ": (
        {"feedforward_modules": ["layers.0.mlp.down_proj"]},
        "the scaled side is True for model.layers.0.mlp.down_proj and False for model.layers.1.mlp.down_proj",
    ),
}


@pytest.mark.parametrize(("config", "message"), IA3_CONFIGS.values(), ids=IA3_CONFIGS)
def test_ia3_s_sides_must_fit(config, message, tmp_path):
    _, folder = written("ia3", tmp_path)
    edit(folder, **config)
    with pytest.raises(AdapterFileError, match=message):
        read(folder)


def test_rows_of_a_tied_embedding_may_be_there_twice(tmp_path):
    """PEFT writes them for the head as well; they must be the same."""
    graphdef, base, names = model(tied=True)
    adapter = moved(vj.init(vj.TokenRows(indices=[7, 2], targets="embed"), jax.random.key(0), base))
    write_peft(tmp_path / "out", adapter, base, names)
    whole = dict(read_tensors(tmp_path / "out" / TENSORS)[0])
    head = "base_model.model.lm_head.trainable_tokens_delta"
    assert set(whole) == {head, "base_model.model.model.embed_tokens.trainable_tokens_delta"}
    again = read_peft(tmp_path / "out", base, names)
    call = jax.jit(functools.partial(vj.apply, graphdef))
    close(call(base, again, IDS), call(base, adapter, IDS))
    write_tensors(tmp_path / "out" / TENSORS, whole | {head: whole[head] + 1}, {})
    with pytest.raises(AdapterFileError, match=r"lm_head.trainable_tokens_delta must be a copy of .*embed_tokens"):
        read_peft(tmp_path / "out", base, names)
    write_tensors(tmp_path / "out" / TENSORS, {key: value for key, value in whole.items() if key != head}, {})
    assert read_peft(tmp_path / "out", base, names)


def test_rows_are_of_embeddings_only(tmp_path):
    _, base, names = model()
    adapter = moved(vj.init(vj.TokenRows(indices=[1], targets="q"), jax.random.key(0), base))
    with pytest.raises(ConversionError, match="q_proj is no embedding, for which PEFT does not have TRAINABLE_TOKENS"):
        write_peft(tmp_path / "out", adapter, base, names)
    _, folder = written("token_rows", tmp_path)
    for indices, message in (
        ([7, 7], "has a row twice"),
        ([7, 11], "indices has 11; embed has 11 rows"),
        ([], r"\[2, 8\], expected \[0, 8\]"),
    ):
        edit(folder, token_indices=indices)
        with pytest.raises(AdapterFileError, match=message):
            read(folder)


@pytest.mark.parametrize(("mode", "rank"), [("default", 3), ("bat", 4)])
def test_files_of_bone_are_read_as_miss(mode, rank, tmp_path):
    """Its name until PEFT 0.19, in the config and in the keys; the numbers are the same."""
    adapter, folder = written("miss", tmp_path, rank=rank, mode=mode)
    changed(folder, lambda values: {key.replace("miss_block", "bone_block"): value for key, value in values.items()})
    config = json.loads((folder / CONFIG).read_text())
    config = {key: value for key, value in config.items() if key not in ("miss_dropout", "mini_r")}
    (folder / CONFIG).write_text(json.dumps(config | {"peft_type": "BONE"}))
    (again,) = read(folder)
    assert (again.method.name, again.method.mode) == ("miss", mode)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, adapter.trainable)
    edit(folder, init_weights="mini")
    with pytest.raises(AdapterFileError, match="init_weights"):
        read(folder)


def test_randlora_s_bases_may_be_repeated_under_every_module_but_not_differ(tmp_path):
    """As PEFT writes them up to 0.21; we write one copy."""
    adapter, folder = written("randlora", tmp_path)
    bases = {key: value for key, value in read_tensors(folder / TENSORS)[0].items() if "model.model" not in key}
    modules = [f"base_model.model.model.layers.{n}.self_attn.{m}_proj" for n in range(3) for m in "qv"]
    copies = {f"{module}.{key.rpartition('.')[2]}": value for module in modules for key, value in bases.items()}
    assert len(copies) == 12
    changed(folder, lambda values: {key: value for key, value in (values | copies).items() if key not in bases})
    (again,) = read(folder)
    jax.tree.map(np.testing.assert_array_equal, again.shared, adapter.shared)
    other = f"{modules[3]}.randlora_B"
    changed(folder, lambda values: values | {other: 2 * values[other]})
    with pytest.raises(AdapterFileError, match=r"randlora_B differs from .*; PEFT has one randlora_B for all modules"):
        read(folder)


def test_randlora_without_bases_or_in_the_paper_s_pairing_is_refused(tmp_path):
    _, base, names = model()
    _, folder = written("randlora", tmp_path)
    edit(folder, save_projection=False)
    with pytest.raises(AdapterFileError, match="save_projection is false: the bases are not in the file"):
        read(folder)
    for options in ({"pairing": "paper"}, {"root_scale": True}):
        with pytest.raises(ConversionError, match="PEFT has pairing peft without root_scale only"):
            write_peft(tmp_path / "other", new("randlora", **options), base, names)


def test_fourierft_s_layers_of_one_kind_have_one_number_of_coefficients(tmp_path):
    adapter, folder = written("fourierft", tmp_path, frequencies_pattern={"v": 3})
    (again,) = read(folder)
    jax.tree.map(np.testing.assert_array_equal, again.trainable, adapter.trainable)
    edit(folder, n_frequency_pattern={"k_proj": 3})
    with pytest.raises(AdapterFileError, match="n_frequency_pattern 'k_proj' matches no module"):
        read(folder)
    edit(folder, n_frequency_pattern={"0.self_attn.v_proj": 3, "mlp.down_proj": 5})
    with pytest.raises(AdapterFileError, match=r"n_frequency is 3 for model.layers.0.* and 5 for model.layers.1.*"):
        read(folder)


def chosen_only(values, topk=2):
    """A VB-LoRA file's tensors as PEFT writes them with `save_only_topk_weights`."""
    made = {}
    for key, value in values.items():
        if "logits" not in key:
            made[key] = value
            continue
        chosen = np.argsort(-value, axis=-1)[..., :topk].astype(np.uint8)
        weights = np.asarray(jax.nn.softmax(np.take_along_axis(value, chosen.astype(int), -1), axis=-1))
        made |= {f"{key}_topk_indices": chosen, f"{key}_topk_weights": weights[..., :-1]}
    return made


def test_vblora_s_chosen_weights_give_the_same_change_and_are_not_forgotten(tmp_path):
    """The other logits are lost: what is read has them far below, and training leaves them there."""
    graphdef, base, names = model()
    adapter, folder = written("vblora", tmp_path)
    changed(folder, chosen_only)
    edit(folder, save_only_topk_weights=True)
    (again,) = read(folder)
    call = jax.jit(functools.partial(vj.apply, graphdef))
    close(call(base, again, IDS), call(base, adapter, IDS), 1e-5)
    logits = np.asarray(again.factors(again.sites[0].path)["logits_a"])
    assert (np.sort(logits, -1)[..., :-2] == -1e4).all()
    write_peft(tmp_path / "again", again, base, names)  # as logits, all finite
    (third,) = read(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, third.trainable, again.trainable)


TOPK = {
    "an index too high": (lambda i, w: (np.full_like(i, 6), w), "indices must be whole numbers below num_vectors 6"),
    "no whole numbers": (lambda i, w: (i.astype(np.float32), w), "indices must be whole numbers"),
    "a weight above one": (lambda i, w: (i, w + 1), "weights of a mixture must be between 0 and 1"),
    "another topk": (lambda i, w: (i[..., :1], w), "are not of topk 2"),
}


@pytest.mark.parametrize(("change", "message"), TOPK.values(), ids=TOPK)
def test_weights_that_no_mixture_has_are_refused(change, message, tmp_path):
    _, folder = written("vblora", tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A"
    names = [f"{key}_topk_indices", f"{key}_topk_weights"]

    def spoilt(values):
        values = chosen_only(values)
        return values | dict(zip(names, change(*(values[name] for name in names)), strict=True))

    changed(folder, spoilt)
    edit(folder, save_only_topk_weights=True)
    with pytest.raises(AdapterFileError, match=f"vblora_logits_A: .*{message}"):
        read(folder)
    changed(folder, lambda values: {name: value for name, value in values.items() if name != names[1]})
    with pytest.raises(AdapterFileError, match=r"1 of .* missing|unexpected"):
        read(folder)


def test_norms_are_told_from_what_is_trained_whole_beside_them(tmp_path):
    _, base, names = model()
    adapter = new("ln_tuning", full=["head"])
    write_peft(tmp_path / "out", adapter, base, names)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["target_modules"], config["modules_to_save"]) == (["input_layernorm", "norm"], ["lm_head"])
    keys = set(read_tensors(tmp_path / "out" / TENSORS)[0])
    layers = {f"base_model.model.model.layers.{n}.input_layernorm.ln_tuning_layers.weight" for n in range(3)}
    assert keys == layers | {"base_model.model.model.norm.ln_tuning_layers.weight", "base_model.model.lm_head.weight"}
    (again,) = read(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, again.trainable["full"], adapter.trainable["full"])
    (small,) = read(tmp_path / "out", fresh=True)
    assert vj.init(small.method, jax.random.key(0), base).trainable["full"].keys() == adapter.trainable["full"].keys()
    edit(tmp_path / "out", target_modules=["input_layernorm", "norm", "q_proj"])
    with pytest.raises(
        AdapterFileError, match=r"selects model.layers.0.self_attn.q_proj, which is not what this method"
    ):
        read(tmp_path / "out")


PRODUCTS = {
    "ranks that differ in a stack": (
        "loha", {"rank_pattern": {"layers.0.self_attn.q_proj": 1}}, "the rank is 1 for model.layers.0.self_attn.q_proj"
    ),
    "a rank for nothing": ("loha", {"rank_pattern": {"o_proj": 1}}, "rank_pattern 'o_proj' matches no module"),
    "a rank of zero": ("delora", {"rank_pattern": {"q_proj": 0}}, "is 0; it must be at least 1"),
    "an alpha of zero": ("lokr", {"alpha": 0}, "alpha is 0.0; it must be finite and not 0"),
    "another form": ("lokr", {"r": 1}, "tensors are missing"),
    "another split": ("lokr", {"decompose_factor": 4}, r"lokr_w1 is \[2, 2\], expected \[4, 4\]"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "config", "message"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_must_have_the_factors_that_their_config_says(name, config, message, tmp_path):
    _, folder = written(name, tmp_path)
    edit(folder, **config)
    with pytest.raises(AdapterFileError, match=message):
        read(folder)


def test_ranks_that_differ_are_none_of_peft_s_hira(tmp_path):
    _, base, names = model()
    with pytest.raises(ConversionError, match=r"hira: ranks are \[1, 2\]; PEFT has one for all modules"):
        write_peft(tmp_path / "out", new("hira", rank_pattern={"q": 1}), base, names)


@pytest.mark.parametrize("name", ["loha", "lokr", "delora"])
def test_tables_go_by_module_names(name, tmp_path):
    tables = {"rank_pattern": {"q": 1}} | ({"alpha_pattern": {"v": 3.0}} if name in ("loha", "lokr") else {})
    adapter, folder = written(name, tmp_path, **tables)
    config = json.loads((folder / CONFIG).read_text())
    assert config["rank_pattern"] == {f"model.layers.{n}.self_attn.q_proj": 1 for n in range(3)}
    if "alpha_pattern" in tables:
        assert config["alpha_pattern"] == {f"model.layers.{n}.self_attn.v_proj": 3 for n in range(3)}
    (again,) = read(folder)
    assert dict(again.method.rank_pattern) == {"layers/block/attn/q": 1}
    jax.tree.map(np.testing.assert_array_equal, again.trainable, adapter.trainable)


def test_a_residual_start_has_no_place_in_peft_s_files_but_can_be_converted(tmp_path):
    _, base, names = model()
    adapter = new("delora", start="residual")
    with pytest.raises(ConversionError, match="delora: with start=residual the first change is subtracted"):
        write_peft(tmp_path / "out", adapter, base, names)
    lora, residuals = vj.as_lora(base, adapter, 4)
    assert max(values.max() for values in residuals.values()) == 0
    write_peft(tmp_path / "out", lora, base, names)
