"""Configs of transformers against our reading of them, and name tables against the models."""

import json

import jax
import numpy as np
import pytest
import transformers

from vlora_jax.adapters.trees import flatten
from vlora_jax.errors import ConfigError, ConversionError
from vlora_jax.hub.configs import differing, model_type_of, read_config, write_config
from vlora_jax.hub.families import FAMILIES
from vlora_jax.hub.names import CLASSES, names_of
from vlora_jax.hub.reader import WITHOUT_EFFECT
from vlora_jax.models.build import abstract_model
from vlora_jax.models.decoder import DecoderConfig

THEIRS = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gpt2": transformers.GPT2Config,
    "bert": transformers.BertConfig,
    "roberta": transformers.RobertaConfig,
    "vit": transformers.ViTConfig,
    "t5": transformers.T5Config,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
HEADS = [(model_type, head) for model_type, heads in CLASSES.items() for head in heads]


def dumped(config):
    return json.loads(config.to_json_string(use_diff=False))


def test_every_family_is_compared():
    assert set(THEIRS) == set(FAMILIES) == set(CLASSES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_keys_mean_what_transformers_fills_in(model_type):
    head = next(iter(CLASSES[model_type]))
    whole = read_config(dumped(THEIRS[model_type]()), head)
    assert differing(whole, read_config({"model_type": model_type}, head)) == []


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_written_means_the_same_to_us_and_is_accepted_by_transformers(model_type, caplog):
    head = next(iter(CLASSES[model_type]))
    config = read_config({"model_type": model_type}, head, **({} if model_type == "vit" else {"vocabulary": 77}))
    assert model_type_of(config) == model_type
    written = json.loads(json.dumps(write_config(config, model_type)))
    again = dumped(THEIRS[model_type](**written))
    assert differing(config, read_config(again, head)) == []
    assert caplog.text == ""


@pytest.mark.parametrize(("model_type", "head"), HEADS)
def test_names_cover_every_parameter_once_and_turn_back(model_type, head):
    small = {"model_type": model_type}
    shrink = {"width": 8, "heads": 2, "kv_heads": None, "head_dim": 4, "mlp_width": 6, "layers": 2}
    shrink |= {"image": 8, "patch": 4} if model_type == "vit" else {"vocabulary": 11}
    shrink |= {"decoder_layers": 3} if model_type == "t5" else {}
    flags = {"window_layers": (True, False)} if model_type in ("gemma2", "gemma3_text") else {}
    config = read_config(small, head, **shrink, **flags)
    names = names_of(config, CLASSES[model_type][head])
    tensors = []
    for path, leaf in flatten(abstract_model(config)[1]).items():
        layers = names.layers(path)
        tensors += [names.tensor(path, layer) for layer in range(layers or 1)]
        one = np.arange(np.prod(leaf.shape[layers is not None :]), dtype=np.float32)
        one = one.reshape(leaf.shape[layers is not None :])
        np.testing.assert_array_equal(names.from_file(path, names.to_file(path, one)), one)
        assert names.changes(path) == (names.to_file(path, one) is not one)
        assert names.full(names.tensor(path, 0)) == names.tensor(path, 0)
        bare = names.tensor(path, 0).removeprefix(names.prefix)
        if path not in names.head and path.rpartition("/")[0] not in names.head:
            assert names.full(bare) == names.tensor(path, 0)
    assert len(set(tensors)) == len(tensors)


def test_an_old_form_means_the_same_as_the_new_one():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}, "torch_dtype": "bfloat16"}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}, "dtype": "bfloat16"}
    config = read_config(new)
    assert (config.rotary_theta, config.rotary_scaling.factor, config.rotary_scaling.original) == (5e5, 8.0, 512)
    assert differing(read_config(old), config) == []
    assert differing(read_config(dumped(transformers.LlamaConfig(**old)), "lm"), config) == []
    linear = read_config(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert (linear.rotary_scaling.kind, linear.rotary_scaling.factor) == ("linear", 2.0)


@pytest.mark.parametrize(
    ("model_type", "old"),
    [
        ("gemma3_text", {"sliding_window_pattern": 3, "rope_theta": 2e6, "rope_local_base_freq": 5e3}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_hidden_layers": 7}),
        ("gemma2", {"num_hidden_layers": 5, "sliding_window": 9, "hidden_act": "gelu_pytorch_tanh"}),
        ("gemma", {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None, "rope_theta": 7.0}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 20, "use_mrope": False}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 16, "attention_bias": True}),
        ("mistral", {"sliding_window": None, "rope_theta": 1e6, "head_dim": 160}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "rope_scaling": {"type": "yarn", "factor": 4.0}}),
        ("gpt2", {"n_inner": None, "n_ctx": 1024, "scale_attn_weights": False}),
        ("t5", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 3}),
        ("t5", {"feed_forward_proj": "gated-silu", "n_positions": 512, "output_past": True}),
    ],
)  # fmt: skip
def test_older_configs_are_read_as_transformers_reads_them(model_type, old):
    head = next(iter(CLASSES[model_type]))
    given = {"model_type": model_type} | old
    theirs = read_config(dumped(THEIRS[model_type](**old)), head)
    assert differing(read_config(given, head), theirs) == []


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type = 'dynamic'"),
        (LLAMA | {"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type = 'longrope'"),
        (LLAMA | {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "fctor": 1}}, "fctor"),
        (LLAMA | {"partial_rotary_factor": 0.25}, "partial_rotary_factor = 0.25"),
        (LLAMA | {"hidden_act": "relu2"}, "hidden_act = 'relu2'"),
        (LLAMA | {"sliding_window": 4}, "sliding_window = 4"),
        (LLAMA | {"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        (LLAMA | {"is_decoder": True}, "is_decoder = True"),
        (LLAMA | {"hidden_size": "64"}, "hidden_size must be a whole number, not '64'"),
        (LLAMA | {"hidden_size": -64}, "width: Input should be greater than 0, got -64"),
        (LLAMA | {"num_attention_heads": 3}, "multiple"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"model_type": "gemma2", "layer_types": ["chunked_attention"] * 26}, "layer_types = 'chunked_attention'"),
        ({"model_type": "gemma3"}, "gemma3_text"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"model_type": "bert", "is_decoder": True}, "is_decoder"),
        ({"model_type": "bert", "add_cross_attention": True}, "add_cross_attention"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"model_type": "vit", "image_size": [8, 16]}, "image_size"),
        ({"model_type": "t5", "feed_forward_proj": "gated-swiglu"}, "feed_forward_proj"),
        ({"model_type": "t5", "feed_forward_proj": "relu", "dense_act_fn": "gelu"}, "dense_act_fn"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "sliding_window"),
        ({"model_type": "mamba"}, "mamba"),
        ({}, "model_type None"),
    ],
)  # fmt: skip
def test_what_our_models_have_not_is_refused_by_name(given, named):
    head = next(iter(CLASSES.get(given.get("model_type"), {"lm": ""})))
    with pytest.raises(ConfigError, match="config") as caught:
        read_config(given, head)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


STRETCHED = {"factor": 2.0, "original_max_position_embeddings": 8}
NONSENSE = (
    *("x", "", -1, 0, 1.5, True, None, [], [1], ["x"], {}, {"a": 1}, float("nan")),
    *({"rope_type": kind} for kind in (3, [], "yarn", "llama3")),
    *({"rope_type": "yarn", "factor": value} for value in ("x", 0, None, -2.0)),
    {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0, **STRETCHED},
    {"full_attention": 3},
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_nonsense_in_any_key_is_an_error_of_one_line_or_without_effect(model_type):
    whole, head = dumped(THEIRS[model_type]()), next(iter(CLASSES[model_type]))
    plain, refusals = read_config(whole, head), []
    for key in (*whole, "rope_scaling", "rope_theta", "num_labels", "hidden_activation", "sliding_window_pattern"):
        for value in NONSENSE:
            try:
                config = read_config(whole | {key: value}, None if key == "architectures" else head)
            except ConfigError as error:
                refusals.append(str(error))
            else:
                if key in WITHOUT_EFFECT - {"id2label", "num_labels", "pad_token_id", "decoder_start_token_id"}:
                    assert differing(config, plain) == []
    assert len(refusals) > 100
    assert not [text for text in refusals if "\n" in text]


def test_an_unknown_key_is_refused_unless_it_is_ignored_by_name():
    given = LLAMA | {"residual_multiplier": 0.22}
    with pytest.raises(ConfigError, match=r"residual_multiplier = 0.22 .* ignore=\('residual_multiplier',\)"):
        read_config(given)
    assert differing(read_config(given, ignore=("residual_multiplier",)), read_config(LLAMA)) == []
    with pytest.raises(ConfigError, match=r"residual_multipler.*nearest: residual_multiplier"):
        read_config(given, ignore=("residual_multipler",))


def test_heads_come_from_the_architecture_and_can_be_exchanged():
    assert read_config(LLAMA).head == "lm"
    assert read_config({**LLAMA, "architectures": ["LlamaModel"]}).head == "none"
    labelled = {
        **LLAMA,
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "a", "1": "b", "2": "c"},
    }
    assert read_config(labelled).classes == 3
    assert read_config(LLAMA, "token").classes == 2  # as transformers, which writes two labels by leaving them out
    assert read_config(LLAMA, "token", 7).classes == 7
    with pytest.raises(ConfigError, match="llama has no head 'masked_lm' here, only 'lm'"):
        read_config(LLAMA, "masked_lm")
    with pytest.raises(ConfigError, match=r"LlamaForQuestionAnswering.*head='lm'"):
        read_config({**LLAMA, "architectures": ["LlamaForQuestionAnswering"]})


def test_a_model_that_transformers_cannot_compute_is_refused_with_the_difference():
    assert model_type_of(DecoderConfig()) == "llama"
    assert model_type_of(DecoderConfig(window=8)) == "mistral"
    with pytest.raises(ConversionError, match=r"the nearest, llama, differs in gated"):
        model_type_of(DecoderConfig(gated=False))


def test_a_typed_wrong_module_is_told_the_nearest():
    names = names_of(read_config(LLAMA), "LlamaForCausalLM")
    with pytest.raises(ConfigError, match=r"layers/block/attn/qq.*layers/block/attn/q"):
        names.module("layers/block/attn/qq", 0)
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        names_of(read_config(LLAMA), "LlamaForCausalML")


def test_names_are_those_of_transformers_modules_and_of_its_files():
    vit = names_of(read_config({"model_type": "vit"}, "image"), "ViTForImageClassification")
    assert vit.module("layers/block/attn/q", 3) == "vit.layers.3.attention.q_proj"
    assert vit.tensor("layers/block/attn/q/kernel", 3) == "vit.encoder.layer.3.attention.attention.query.weight"
    gpt2 = names_of(read_config({"model_type": "gpt2"}, "lm"), "GPT2LMHeadModel")
    kernel = jax.ShapeDtypeStruct((4, 12), "float32")
    turned = lambda path: jax.eval_shape(lambda a: gpt2.to_file(path, a), kernel).shape
    assert turned("layers/block/attn/qkv/kernel") == (4, 12)  # Conv1D keeps (in, out)
    assert turned("head/kernel") == (12, 4)
