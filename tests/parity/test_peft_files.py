"""Adapter directories of real PEFT in and out: every shape a LoRA's files can have, on four families."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from peft_models import (
    FOLDER,
    IDS,
    error,
    inputs,
    load_peft_weights,
    loaded,
    logits,
    model_of,
    peft,
    stored,
    their_logits,
    torch,
)

import vlora_jax as vj
from vlora_jax.errors import AdapterFileError
from vlora_jax.hub.peft import read_peft, write_peft
from vlora_jax.hub.peft_file import CONFIG, TENSORS, read_tensors, write_tensors
from vlora_jax.hub.peft_modules import Modules
from vlora_jax.hub.peft_plan import ROWS
from vlora_jax.hub.peft_write import contents

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own

Q, ALL = ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": ("llama", {"target_modules": Q}),
    "on a tied model": ("llama_tied", {"target_modules": Q}),
    "float alpha": ("llama", {"target_modules": Q, "lora_alpha": 5.3}),
    "rsLoRA": ("llama", {"target_modules": ALL, "use_rslora": True}),
    "all-linear": ("llama", {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "a regular expression": ("llama", {"target_modules": r".*\.(1|2)\.mlp\.(up|down)_proj"}),
    "lora_bias without biases": ("llama", {"target_modules": Q, "lora_bias": True}),
    "DoRA": ("llama", {"target_modules": ALL, "use_dora": True}),
    "DoRA, rsLoRA, some layers": (
        "llama",
        {"target_modules": Q, "use_dora": True, "use_rslora": True, "layers_to_transform": [0, 2]},
    ),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "DoRA of the embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": Q,
            "rank_pattern": {"v_proj": 2, r"model.layers.1.self_attn.q_proj": 5},
            "alpha_pattern": {r"layers\.[02]\.self_attn\.q_proj": 3, "v_proj": 7},
        },
    ),
    "patterns, rsLoRA": ("llama", {"target_modules": Q, "rank_pattern": {"v_proj": 2}, "use_rslora": True}),
    "patterns, DoRA": (
        "llama",
        {"target_modules": Q, "rank_pattern": {r"layers.1.self_attn.q_proj": 2}, "use_dora": True},
    ),
    "one layer": ("llama", {"target_modules": Q, "layers_to_transform": 1}),
    "some layers": ("llama", {"target_modules": ALL, "layers_to_transform": [0, 2], "layers_pattern": "layers"}),
    "exclude": ("llama", {"target_modules": ALL, "exclude_modules": ["layers.0.self_attn.q_proj", "down_proj"]}),
    "exclude by expression": ("llama", {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"}),
    "modules_to_save": ("llama", {"target_modules": Q, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "norms whole": ("llama", {"target_modules": Q, "modules_to_save": ["input_layernorm", "model.norm"]}),
    "token rows": ("llama", {"target_modules": Q, "trainable_token_indices": [60, 3, 17]}),
    "token rows on a tied model": ("llama_tied", {"target_modules": Q, "trainable_token_indices": [60, 3, 17]}),
    "token rows by name": ("llama", {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [4]}}),
    "a decoder's classifier": ("llama_classes", {"target_modules": Q, "task_type": "SEQ_CLS"}),
    "GPT-2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "GPT-2, DoRA": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "use_dora": True}),
    "GPT-2, biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True}),
    "GPT-2, all-linear": ("gpt2", {"target_modules": "all-linear"}),
    "BERT": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "BERT, bias all": ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "bias": "all"}),
    "BERT, bias lora_only": ("bert", {"target_modules": ["query", "dense"], "bias": "lora_only"}),
    "BERT, bias of some layers": (
        "bert",
        {"target_modules": ["query"], "bias": "lora_only", "layers_to_transform": [1], "lora_bias": True},
    ),
    "BERT, lora_bias": ("bert", {"target_modules": ["query", "key"], "lora_bias": True, "use_rslora": True}),
    "BERT, embeddings": ("bert", {"target_modules": ["word_embeddings", "position_embeddings", "query"]}),
    "BERT, all-linear": ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "RoBERTa": ("roberta", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "ViT": ("vit", {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}),
    "ViT, patches": ("vit", {"target_modules": ["projection", "q_proj"]}),
    "ViT, patches, DoRA": ("vit", {"target_modules": ["projection", "fc1"], "use_dora": True}),
}
STARTS = {
    "PiSSA": ("llama", {"target_modules": Q, "init_lora_weights": "pissa"}),
    "PiSSA, rsLoRA, patterns": (
        "llama",
        {"target_modules": Q, "init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"v_proj": 2}},
    ),
    "PiSSA, DoRA": ("llama", {"target_modules": Q, "init_lora_weights": "pissa", "use_dora": True}),
    "PiSSA, GPT-2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": "pissa"}),
    "OLoRA": ("llama", {"target_modules": ALL, "init_lora_weights": "olora", "use_rslora": True}),
    "OLoRA, one layer": ("llama", {"target_modules": Q, "init_lora_weights": "olora", "layers_to_transform": 2}),
}
MADE = ("lora_", "trainable_tokens_delta", "modules_to_save")


def randomise(model):
    """Random values in all that a PEFT model trains; DoRA's magnitudes and whole tensors around where they start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                parameter.normal_(0, 0.2)  # of more, float32 would lose the digits that are compared
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def adapted(family, options):
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 4} | options)
    model = peft.get_peft_model(model_of(family), config)
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module", params=(CASES | STARTS).items(), ids=lambda item: item[0])
def case(request, tmp_path_factory):
    """One PEFT model, its directory, ours, and the directory that we write."""
    name, (family, options) = request.param
    folder = tmp_path_factory.mktemp("case")
    theirs = adapted(family, options)
    theirs.save_pretrained(folder / "theirs")
    directory, base = stored(family)
    adapters = read_peft(folder / "theirs", base.base, base.names)
    like = json.loads((folder / "theirs" / "adapter_config.json").read_text())
    write_peft(folder / "ours", adapters, base.base, base.names, like=like)
    return SimpleNamespace(
        name=name, family=family, theirs=theirs, base=base, adapters=adapters, folder=folder, model=directory
    )


def test_logits_agree(case):
    expected = their_logits(case.family, case.theirs)
    bare = logits(case.family, case.base.graphdef, case.base.base, None)
    assert error(logits(case.family, case.base.graphdef, case.base.base, case.adapters), expected) < 1e-5
    assert error(bare, expected) > 1e-2


def test_merged_logits_agree(case):
    if case.name == "lora_bias without biases":
        pytest.skip("PEFT cannot merge it, and neither can we")
    merged = vj.merge(case.base.base, *case.adapters)
    expected = their_logits(case.family, case.theirs)
    assert error(logits(case.family, case.base.graphdef, merged, None), expected) < 1e-5


def test_peft_reads_what_we_wrote(case):
    fresh = model_of(case.family)
    config = peft.PeftConfig.from_pretrained(case.folder / "ours")
    model = peft.get_peft_model(fresh, config)
    result = peft.set_peft_model_state_dict(model, load_peft_weights(str(case.folder / "ours")))
    assert not result.unexpected_keys
    missing = {key for key in result.missing_keys if any(part in key for part in MADE)}
    # A tied head follows the embedding's rows; PEFT counts it as missing from its own files too.
    assert missing == (
        {f"base_model.model.lm_head.{ROWS}.default"} if case.name == "token rows on a tied model" else set()
    )
    assert error(their_logits(case.family, model.eval()), their_logits(case.family, case.theirs)) < 1e-5


def test_tensors_come_back_byte_for_byte(case):
    before = read_tensors(case.folder / "theirs" / "adapter_model.safetensors")[0]
    after = read_tensors(case.folder / "ours" / "adapter_model.safetensors")[0]
    if case.name in STARTS:
        again = case.folder / "again"
        if not again.exists():
            write_peft(
                again, read_peft(case.folder / "ours", case.base.base, case.base.names), case.base.base, case.base.names
            )
        before = read_tensors(again / "adapter_model.safetensors")[0]
    copies = ("base_layer.weight", "original_module.bias", "modules_to_save.bias")
    assert {key for key in before if not key.endswith(copies)} == set(after)
    for key, value in after.items():
        assert value.dtype == before[key].dtype
        assert value.tobytes() == before[key].tobytes(), key


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}}])
def test_gradients_and_a_step_of_adamw_agree(options, tmp_path):
    """Of the logits against a random cotangent, to A, B and DoRA's m; the step also decays the weights."""
    config = {"target_modules": [*Q, "down_proj"], "layers_to_transform": [0, 2]} | options
    theirs = adapted("llama", config)
    theirs.save_pretrained(tmp_path / "before")
    base = stored("llama")[1]
    (adapter,) = read_peft(tmp_path / "before", base.base, base.names)
    cotangent = np.random.default_rng(2).normal(size=(*IDS.shape, 64)).astype(np.float32)
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    (theirs(**inputs("llama")).logits * torch.from_numpy(cotangent)).sum().backward()
    gradients = {name: p.grad.numpy().copy() for name, p in theirs.named_parameters() if p.requires_grad}
    optimizer.step()
    theirs.save_pretrained(tmp_path / "stepped")

    @jax.jit
    def run(trainable):
        out = lambda t: vj.apply(base.graphdef, base.base, adapter.with_trainable(t), jnp.asarray(IDS))
        ours = jax.grad(lambda t: (out(t) * cotangent).sum())(trainable)
        adamw = optax.adamw(0.01, weight_decay=0.1)
        return ours, optax.apply_updates(trainable, adamw.update(ours, adamw.init(trainable), trainable)[0])

    ours, stepped = run(adapter.trainable)
    shapes = {name: value.shape for name, value in gradients.items()}
    found = contents(Modules.of(base.base, base.names), adapter.with_trainable(ours), [])[1]
    assert len(found) == len(shapes)
    for name, expected in gradients.items():
        key = name.replace(".default", "").removesuffix(".weight" if "magnitude" in name else "")
        assert error(found[key], expected) < 1e-5 * np.abs(expected).max(), name
    after = read_tensors(tmp_path / "stepped" / TENSORS)[0]
    for key, value in contents(Modules.of(base.base, base.names), adapter.with_trainable(stepped), [])[1].items():
        assert error(value, after[key]) < 1e-6, key


def test_merged_weights_agree():
    """All kinds of module at once, against PEFT's own merge."""
    options = {"target_modules": [*ALL, "embed_tokens"], "use_dora": True, "modules_to_save": ["norm"]}
    theirs = adapted("llama", options)
    folder = Path(FOLDER.name) / "merged"
    theirs.save_pretrained(folder)
    base = stored("llama")[1]
    merged = vj.merge(base.base, *read_peft(folder, base.base, base.names))
    state = theirs.merge_and_unload().state_dict()
    modules = Modules.of(merged, base.names)
    for module in modules.table.values():
        for leaf, path in module.leaves.items():
            expected = state[f"{module.name}.{leaf}"].numpy()
            assert error(modules.tensor(path, module.layer), expected) < 1e-6 * max(1, np.abs(expected).max()), path


def test_files_of_earlier_releases_name_vit_s_modules_otherwise(tmp_path):
    """transformers 4's attention.attention.query is transformers 5's attention.q_proj."""
    adapted("vit", {"target_modules": ["q_proj", "fc1"]}).save_pretrained(tmp_path)
    base = stored("vit")[1]
    new = read_peft(tmp_path, base.base, base.names)
    tensors, _ = read_tensors(tmp_path / TENSORS)
    old = lambda key: (
        key.replace("vit.layers", "vit.encoder.layer")
        .replace("attention.q_proj", "attention.attention.query")
        .replace("mlp.fc1", "intermediate.dense")
    )
    write_tensors(tmp_path / TENSORS, {old(key): value for key, value in tensors.items()}, {})
    config = json.loads((tmp_path / CONFIG).read_text()) | {"target_modules": ["query", "intermediate.dense"]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    jax.tree.map(np.testing.assert_array_equal, read_peft(tmp_path, base.base, base.names), new)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": Q, "modules_to_save": ["lm_head"]},
        {"target_modules": Q, "modules_to_save": ["embed_tokens"]},
    ],
)
def test_a_tied_head_must_be_untied_first(options, tmp_path):
    """PEFT changes one side while it is bound; on our untied model the logits are those."""
    theirs = adapted("llama_tied", options)
    theirs.save_pretrained(tmp_path)
    directory, base = stored("llama_tied")
    with pytest.raises(AdapterFileError, match=r"shares its values with lm_head: load the base untied.*untie=True"):
        read_peft(tmp_path, base.base, base.names)
    untied = loaded(directory, untie=True)
    adapters = read_peft(tmp_path, untied.base, untied.names)
    ours = logits("llama_tied", untied.graphdef, untied.base, adapters)
    expected = their_logits("llama_tied", theirs)
    merged = logits("llama_tied", untied.graphdef, vj.merge(untied.base, *adapters), None)
    assert error(ours, expected) < 1e-5
    assert error(merged, expected) < 1e-5


def test_a_second_export_is_the_same_byte_for_byte(case):
    again = case.folder / "second"
    adapters = read_peft(case.folder / "ours", case.base.base, case.base.names)
    like = json.loads((case.folder / "ours" / "adapter_config.json").read_text())
    write_peft(again, adapters, case.base.base, case.base.names, like=like)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (again / name).read_bytes() == (case.folder / "ours" / name).read_bytes()
