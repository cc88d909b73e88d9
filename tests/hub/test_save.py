"""Saving: files that are what they should be, config.json, and what is refused."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import LLAMA, TIED, edit_config, model_of, write
from safetensors import safe_open
from safetensors.numpy import load_file

import vlora_jax as vj
from vlora_jax.adapters.sites import split
from vlora_jax.adapters.trees import flatten
from vlora_jax.distributed.mesh import make_mesh
from vlora_jax.errors import ConfigError, ConversionError, ResourceError
from vlora_jax.hub import save as save_module
from vlora_jax.hub.load import load_model
from vlora_jax.hub.save import save
from vlora_jax.models.build import build
from vlora_jax.models.decoder import DecoderConfig

BASE = "model.layers.{}.self_attn.{}_proj.weight"


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def test_kernels_are_written_transposed_and_embeddings_as_they_are(tmp_path):
    _, base = write(tmp_path / "model")
    tensors, ours = load_file(tmp_path / "model" / "model.safetensors"), flatten(base)
    for layer in range(LLAMA.layers):
        for name in "qkvo":
            expected = np.asarray(ours[f"layers/block/attn/{name}/kernel"][layer]).T
            np.testing.assert_array_equal(tensors[BASE.format(layer, name)], expected)
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], ours["embed/embedding"])
    np.testing.assert_array_equal(tensors["lm_head.weight"], np.asarray(ours["head/kernel"]).T)
    assert len(tensors) == 3 + 9 * LLAMA.layers
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("limit", [1, 3000, "8KB", 10**9])
def test_shards_keep_to_their_size_and_the_index_names_every_tensor_once(limit, tmp_path):
    _, base = write(tmp_path / "model", max_shard=limit)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    whole = {}
    for name in files:
        tensors = load_file(tmp_path / "model" / name)
        assert len(tensors) == 1 or sum(a.nbytes for a in tensors.values()) <= save_module.bytes_of(limit)
        assert not whole.keys() & tensors.keys()
        whole |= dict.fromkeys(tensors, name)
    if len(files) == 1:
        assert files == ["model.safetensors"]
        assert not (tmp_path / "model" / "model.safetensors.index.json").exists()
    else:
        index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == whole
        assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(base))
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"


def test_a_tied_embedding_is_written_once_and_the_config_says_so(tmp_path):
    write(tmp_path / "tied", TIED)
    write(tmp_path / "own", LLAMA)
    for name, tied in (("tied", True), ("own", False)):
        assert config_of(tmp_path / name)["tie_word_embeddings"] is tied
        assert ("lm_head.weight" in load_file(tmp_path / name / "model.safetensors")) is not tied


def test_classes_have_their_names_in_the_config(tmp_path):
    graphdef, base = write(tmp_path / "unnamed", LLAMA.model_copy(update={"head": "sequence", "classes": 3}))
    save(tmp_path / "named", graphdef, base, class_names=("bad", "so so", "good"))
    about = config_of(tmp_path / "named")
    assert about["id2label"] == {"0": "bad", "1": "so so", "2": "good"}
    assert about["label2id"] == {"bad": 0, "so so": 1, "good": 2}
    assert config_of(tmp_path / "unnamed")["id2label"]["2"] == "LABEL_2"
    with pytest.raises(ConfigError, match="2 names of classes for a model of 3"):
        save(tmp_path / "wrong", graphdef, base, class_names=("bad", "good"))
    assert not (tmp_path / "wrong").exists()


def test_bfloat16_is_written_bit_for_bit(tmp_path):
    config = LLAMA.model_copy(update={"dtype": "bfloat16", "param_dtype": "bfloat16"})
    _, base = write(tmp_path / "model", config)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    kernel = np.asarray(flatten(base)["layers/block/mlp/down/kernel"][1]).T
    assert tensors["model.layers.1.mlp.down_proj.weight"].tobytes() == np.ascontiguousarray(kernel).tobytes()
    assert config_of(tmp_path / "model")["dtype"] == "bfloat16"


def test_of_a_quantised_base_the_values_are_written(tmp_path):
    graphdef, base = write(tmp_path / "model")
    held = vj.quantize(base, "nf4")
    save(tmp_path / "held", graphdef, held)
    read = flatten(load_model(tmp_path / "held").base)
    for path, leaf in flatten(vj.merge(held)).items():
        np.testing.assert_array_equal(read[path], leaf, path)


def test_a_model_on_a_mesh_is_written_like_one_on_a_device(tmp_path):
    write(tmp_path / "one", max_shard="8KB")
    many = load_model(tmp_path / "one", make_mesh(data=2, fsdp=2, tensor=2))
    save(tmp_path / "many", many.graphdef, many.base, like=tmp_path / "one", max_shard="8KB")
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "many" / path.name).read_bytes() == path.read_bytes()


def test_what_is_beside_the_model_goes_along_and_nothing_else(tmp_path):
    write(tmp_path / "model")
    beside = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
    for name in (*beside, "optimizer.pt", "trainer_state.json"):
        (tmp_path / "model" / name).write_text(f'"{name}"')
    loaded = load_model(tmp_path / "model")
    written = save(tmp_path / "again", loaded.graphdef, loaded.base, like=tmp_path / "model")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"config.json", "model.safetensors", *beside}
    assert (tmp_path / "again" / "tokenizer.json").read_text() == '"tokenizer.json"'
    assert written.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.base))
    assert (written.files, written.tensors) == (("model.safetensors",), 30)


def test_an_original_config_is_kept_but_for_what_has_changed(tmp_path):
    write(tmp_path / "model")
    extra = {"eos_token_id": [1, 7], "torch_dtype": "float16", "rope_theta": 10000.0, "rope_parameters": None}
    edit_config(tmp_path / "model", **extra, task_specific_params={"a": 1})
    before = config_of(tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    save(tmp_path / "same", loaded.graphdef, loaded.base, like=tmp_path / "model", dtype="bfloat16")
    expected = before | {"dtype": "bfloat16"}
    del expected["torch_dtype"]
    assert config_of(tmp_path / "same") == expected
    headed = load_model(tmp_path / "model", head="sequence", classes=4, notify=lambda line: None)
    save(tmp_path / "headed", headed.graphdef, headed.base, like=tmp_path / "model")
    after = config_of(tmp_path / "headed")
    assert after["architectures"] == ["LlamaForSequenceClassification"]
    assert len(after["id2label"]) == len(after["label2id"]) == 4
    assert after["eos_token_id"] == [1, 7]


def test_a_vocabulary_that_grew_is_in_the_config(tmp_path):
    write(tmp_path / "model", TIED)
    edit_config(tmp_path / "model", eos_token_id=3)
    grown = model_of(TIED.model_copy(update={"vocabulary": 28}))
    save(tmp_path / "grown", *grown, like=tmp_path / "model")
    assert (config_of(tmp_path / "grown")["vocab_size"], config_of(tmp_path / "grown")["eos_token_id"]) == (28, 3)
    assert load_model(tmp_path / "grown").config.vocabulary == 28


def test_a_model_that_differs_from_its_original_s_family_is_refused(tmp_path):
    write(tmp_path / "model", TIED)
    with pytest.raises(ConversionError, match="transformers' llama has no way to say this model's window"):
        save(tmp_path / "out", *model_of(TIED.model_copy(update={"window": 4})), like=tmp_path / "model")
    assert not (tmp_path / "out").exists()


def test_a_vertical_model_is_refused_with_the_way_out(tmp_path):
    config = DecoderConfig(width=16, mlp_width=32, layers=4, vertical=vj.Vertical(size=2))
    with pytest.raises(ConversionError, match=r"vlora_jax.expand"):
        save(tmp_path / "out", *split(build(config, jax.random.key(0))))


def test_a_directory_that_holds_anything_is_never_written(tmp_path):
    model = model_of(TIED)
    (tmp_path / "out").mkdir()
    save(tmp_path / "out", *model)  # empty: fine
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ResourceError, match="is there already and not empty"):
        save(tmp_path / "out", *model)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ResourceError, match="is there already and not empty"):
        save(tmp_path / "out" / "config.json", *model)


def test_values_that_the_file_cannot_hold_are_refused_and_nothing_is_left(tmp_path):
    graphdef, base = model_of(TIED)
    base["norm"]["scale"].set_value(base["norm"]["scale"].get_value().at[3].set(1e6))
    save(tmp_path / "wide", graphdef, base)
    with pytest.raises(ConversionError, match=r"model.norm.weight has values that are not finite in float16"):
        save(tmp_path / "half", graphdef, base, dtype="float16")
    base["norm"]["scale"].set_value(jnp.full(16, jnp.nan))
    with pytest.raises(ConversionError, match=r"model.norm.weight has values that are not finite in float32"):
        save(tmp_path / "nan", graphdef, base)
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]


def test_what_reads_back_otherwise_is_an_error_and_nothing_is_left(tmp_path, monkeypatch):
    original = save_module.write_shard

    def flip(path, shard, fetch, dtype):
        original(path, shard, fetch, dtype)
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(save_module, "write_shard", flip)
    with pytest.raises(ResourceError, match=r"model.norm.weight was read back with other values") as caught:
        save(tmp_path / "out", *model_of(TIED))
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_and_while_writing(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr(save_module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match=r"needs 0.00 GB, 0.00 GB are free"):
            save(tmp_path / "out", *model_of(TIED))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(ResourceError, match="No space left on device"):
        save(tmp_path / "out", *model_of(TIED))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["", "5 apples", "0", "-3", "GB", 0])
def test_a_shard_size_that_is_none_is_refused(size):
    with pytest.raises(ConfigError, match="max_shard"):
        save_module.bytes_of(size)
