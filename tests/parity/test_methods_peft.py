"""Every method that PEFT has, against PEFT itself: a random adapter of it, its file, our reader, and back.

A method is covered by a line in CASES: the family of `peft_models.model_of`, PEFT's config class, and its options.
Every number that PEFT trains gets noise of the size NOISE, unless NOISES gives the line another. Checked of each are
logits (bound and merged), merged weights, gradients of all that trains and a step of AdamW, that PEFT loads what we
write with no key missing or unexpected, and that its tensors come back byte for byte. A change of the logits below 1e-2
fails, so that nothing passes by doing nothing.
"""

import copy
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from helpers import mostly_slow
from peft_models import (
    decoded,
    error,
    inputs,
    load_peft_weights,
    logits,
    model_of,
    our_input,
    peft,
    stored,
    their_logits,
    torch,
)

import vlora_jax as vj
from vlora_jax.adapters.registry import METHODS
from vlora_jax.hub.peft import read_peft, write_peft
from vlora_jax.hub.peft_file import CONFIG, TENSORS, read_json, read_tensors
from vlora_jax.hub.peft_forms import FORMS, read_config
from vlora_jax.hub.peft_modules import Modules
from vlora_jax.hub.peft_write import contents

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and PEFT's own

NOISE = 0.2
Q, MLP = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
ALL = [*Q, "k_proj", "o_proj", *MLP]
QV = {"target_modules": Q}
GPT2 = ["c_attn", "attn.c_proj", "mlp.c_proj"]
BERT = {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]}
EMBEDDINGS = {"target_modules": ["word_embeddings", "position_embeddings"]}
ADA = {"init_r": 3, "target_r": 2, "total_step": 9}
CASES = {
    "LoRA": ("llama", "LoraConfig", {"r": 3, "lora_alpha": 4, "target_modules": ALL}),
    "LoRA, patterns": ("llama", "LoraConfig", {"r": 3, "target_modules": Q, "rank_pattern": {"1.self_attn.q_proj": 5}}),
    "DoRA": ("gpt2", "LoraConfig", {"r": 3, "target_modules": GPT2, "use_dora": True}),
    "AdaLoRA": ("llama", "AdaLoraConfig", {"init_r": 9, "target_r": 2, "total_step": 9, "target_modules": ALL}),
    "AdaLoRA, GPT-2, biases": ("gpt2", "AdaLoraConfig", ADA | {"target_modules": GPT2, "bias": "lora_only"}),
    "AdaLoRA, ViT": ("vit", "AdaLoraConfig", ADA | {"target_modules": ["q_proj", "projection"], "lora_alpha": 3}),
    "VeRA": ("llama", "VeraConfig", {"r": 6, "target_modules": ALL}),
    "VeRA by key": ("llama", "VeraConfig", {"r": 20, "save_projection": False, "projection_prng_key": 42} | QV),
    "VeRA, some layers": ("llama", "VeraConfig", {"r": 6, "layers_to_transform": [0, 2]} | QV),
    "VeRA, GPT-2, biases": ("gpt2", "VeraConfig", {"r": 6, "target_modules": GPT2, "bias": "vera_only"}),
    "IA3": ("llama", "IA3Config", {"target_modules": [*Q, "down_proj"], "feedforward_modules": ["down_proj"]}),
    "IA3, GPT-2": ("gpt2", "IA3Config", {"target_modules": GPT2, "feedforward_modules": ["mlp.c_proj"]}),
    "tokens": ("llama", "TrainableTokensConfig", {"token_indices": [60, 3, 17]}),
    "tokens, tied": ("gpt2", "TrainableTokensConfig", {"token_indices": [60, 3, 17]}),
    "tokens, two tables": (
        "bert",
        "TrainableTokensConfig",
        EMBEDDINGS | {"token_indices": [3, 5], "task_type": "SEQ_CLS"},
    ),
    "LoHa": ("llama", "LoHaConfig", {"r": 2, "alpha": 3, "target_modules": ALL}),
    "LoHa, built": (
        "llama",
        "LoHaConfig",
        {"r": 4, "alpha_pattern": {"v_proj": 3}, "rank_pattern": {"q_proj": 3}} | QV,
    ),
    "LoHa, BERT": ("bert", "LoHaConfig", BERT | {"r": 2, "task_type": "SEQ_CLS"}),
    "LoKr": ("llama", "LoKrConfig", {"r": 2, "alpha": 3, "target_modules": ALL}),
    "LoKr, whole": ("llama", "LoKrConfig", {"r": 5, "target_modules": ALL}),
    "LoKr, both products": ("llama", "LoKrConfig", {"r": 1, "decompose_both": True, "target_modules": ALL}),
    "LoKr, a factor": ("llama", "LoKrConfig", {"r": 2, "decompose_factor": 8, "decompose_both": True} | QV),
    "LoKr, BERT": ("bert", "LoKrConfig", BERT | {"r": 2, "rank_pattern": {"query": 3}, "task_type": "SEQ_CLS"}),
    "HiRA": ("llama", "HiraConfig", {"r": 3, "target_modules": ALL}),
    "HiRA, GPT-2": ("gpt2", "HiraConfig", {"r": 3, "target_modules": GPT2}),
    "DeLoRA": (
        "llama",
        "DeloraConfig",
        {"r": 3, "target_modules": ALL, "rank_pattern": {"q_proj": 5}},
    ),
    "DeLoRA, BERT": ("bert", "DeloraConfig", BERT | {"r": 3, "delora_lambda": 2, "bias": "delora_only"}),
    "LN tuning": ("llama", "LNTuningConfig", {}),
    "LN tuning, BERT": ("bert", "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "IA3, BERT": ("bert", "IA3Config", BERT | {"feedforward_modules": r".*\d\.output\.dense", "task_type": "SEQ_CLS"}),
    "MiSS": ("llama", "MissConfig", {"r": 5, "target_modules": ALL}),
    "MiSS, mini": ("llama", "MissConfig", {"r": 4, "init_weights": "mini", "mini_r": 4} | QV),
    "MiSS, bat": ("llama", "MissConfig", {"r": 4, "init_weights": "bat", "layers_to_transform": [1]} | QV),
    "RandLoRA": ("llama", "RandLoraConfig", {"r": 3, "randlora_alpha": 3, "target_modules": ALL}),
    "RandLoRA, sparse": (
        "gpt2",
        "RandLoraConfig",
        {"r": 5, "randlora_alpha": 5, "sparse": True, "target_modules": GPT2},
    ),
    "FourierFT": (
        "llama",
        "FourierFTConfig",
        {"n_frequency": 9, "scaling": 40.0, "n_frequency_pattern": {"v_proj": 4}} | QV,
    ),
    "FourierFT, GPT-2": ("gpt2", "FourierFTConfig", {"n_frequency": 40, "scaling": 20.0, "target_modules": GPT2}),
    "VB-LoRA": ("llama", "VBLoRAConfig", {"r": 2, "num_vectors": 6, "vector_length": 8, "target_modules": ALL}),
    "DoRA, 4 bits": ("llama_nf4", "LoraConfig", {"r": 3, "target_modules": ALL, "use_dora": True}),
}
# On QLoRA's base. PEFT's LoHa, LoKr and DeLoRA take the packed codes for the weight, and fail.
IN_4_BITS = ("LoRA", "AdaLoRA", "VeRA", "IA3", "HiRA", "MiSS", "RandLoRA", "FourierFT", "VB-LoRA")
CASES |= {f"{name}, 4 bits": ("llama_nf4", *CASES[name][1:]) for name in IN_4_BITS}
ALSO_IN_4_BITS = [f"{name}, 4 bits" for name in IN_4_BITS if name not in ("LoRA", "IA3")]
SMALLER = ("DoRA, 4 bits", "RandLoRA, 4 bits", "VB-LoRA, 4 bits")  # with more, float32 itself is 1e-5 off
NOISES = dict.fromkeys(SMALLER, 0.1)


def adapted(name):
    """PEFT's model of a case, with noise on all that it trains."""
    family, kind, options = CASES[name]
    torch.manual_seed(3)
    model = peft.get_peft_model(model_of(family), getattr(peft, kind)(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * NOISES.get(name, NOISE))
    return model.eval()


@pytest.fixture(scope="module", params=mostly_slow(CASES, [case for case in CASES if case not in ALSO_IN_4_BITS]))
def case(request, tmp_path_factory):
    """PEFT's model, its directory, our model and adapter, and the directory that we write."""
    folder = tmp_path_factory.mktemp("case")
    theirs = adapted(request.param)
    theirs.save_pretrained(folder / "theirs")
    family = CASES[request.param][0]
    base = stored(family)[1]
    (adapter,) = read_peft(folder / "theirs", base.base, base.names)
    write_peft(folder / "ours", adapter, base.base, base.names)
    return SimpleNamespace(
        name=request.param, family=family, theirs=theirs, base=base.base, names=base.names, graphdef=base.graphdef,
        adapter=adapter, folder=folder, expected=their_logits(family, theirs),
    )  # fmt: skip


def tidied(case, tensors):
    """A file's tensors in the layout that we write, where PEFT reads several."""
    form, config = read_config(read_json(case.folder / "ours" / CONFIG), case.folder)
    return form.tidy(config, tensors)


def test_every_form_has_a_case():
    tested = {getattr(peft, kind)(**options).peft_type.value for _, kind, options in CASES.values()}
    assert {form.peft_type for form in FORMS} - {"BONE"} <= tested  # PEFT has no class for BONE any more
    assert all(METHODS[form.method.name] is form.method for form in FORMS)


def test_logits_agree(case):
    out = lambda base, adapter: logits(case.family, case.graphdef, base, adapter)
    assert error(out(case.base, case.adapter), case.expected) < 1e-5 * max(1, np.abs(case.expected).max())
    assert error(out(case.base, None), case.expected) > 1e-2
    if case.adapter.method.mergeable:
        merged = out(vj.merge(case.base, case.adapter), None)
        assert error(merged, case.expected) < 1e-5 * max(1, np.abs(case.expected).max())


def test_merged_weights_agree(case):
    """Every parameter of the model, against PEFT's own merge.

    Into a base in 4 bits PEFT merges by rounding the sum to 4 bits again, where we give ordinary parameters; there,
    against its merge into the whole model that bitsandbytes decodes.
    """
    if not case.adapter.method.mergeable:
        pytest.skip("no ΔW")
    modules = Modules.of(vj.merge(case.base, case.adapter), case.names)
    if case.family == "llama_nf4":
        theirs = peft.PeftModel.from_pretrained(decoded(model_of(case.family)), case.folder / "theirs")
    else:
        theirs = copy.deepcopy(case.theirs)
    state = theirs.merge_and_unload().state_dict()
    changed = 0
    before = Modules.of(case.base, case.names)
    for module in modules.table.values():
        for leaf, path in module.leaves.items():
            expected, ours = state[f"{module.name}.{leaf}"].numpy(), modules.tensor(path, module.layer)
            assert error(ours, expected) < 1e-6 * max(1, np.abs(expected).max()), path
            changed += error(before.tensor(path, module.layer), expected) > 1e-4
    assert changed >= len(case.adapter.sites)


def test_gradients_and_a_step_of_adamw_agree(case, tmp_path):
    """Of the logits against a random cotangent, to all that trains; the step also decays the weights."""
    theirs, modules = copy.deepcopy(case.theirs), Modules.of(case.base, case.names)
    cotangent = np.random.default_rng(2).normal(size=case.expected.shape).astype(np.float32)
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    (theirs(**inputs(case.family)).logits * torch.from_numpy(cotangent)).sum().backward()
    slopes = [parameter.grad.clone() for parameter in trained]
    optimizer.step()
    theirs.save_pretrained(tmp_path / "stepped")
    with torch.no_grad():
        for parameter, slope in zip(trained, slopes, strict=True):
            parameter.copy_(slope)
    theirs.save_pretrained(tmp_path / "gradients")

    @jax.jit
    def run(trainable):
        out = lambda t: vj.apply(case.graphdef, case.base, case.adapter.with_trainable(t), our_input(case.family))
        ours = jax.grad(lambda t: (out(t) * cotangent).sum())(trainable)
        adamw = optax.adamw(0.01, weight_decay=0.1)
        return ours, optax.apply_updates(trainable, adamw.update(ours, adamw.init(trainable), trainable)[0])

    ours, stepped = run(case.adapter.trainable)
    of = lambda trainable: contents(modules, case.adapter.with_trainable(trainable), [])[1]
    gradients, after = (tidied(case, read_tensors(tmp_path / part / TENSORS)[0]) for part in ("gradients", "stepped"))
    our_gradients, our_step = of(ours), of(stepped)
    single = max((np.abs(value).max() for value in gradients.values() if value.size == 1), default=0)
    for key, expected in gradients.items():
        largest = np.abs(expected).max() if expected.size > 1 else single  # one number may be small by chance
        assert error(our_gradients[key], expected) < 1e-5 * largest, key
        told = np.abs(expected) > 1e-5 * np.abs(expected).max()  # AdamW's first step is a sign: of noise, where g is 0
        assert error(our_step[key][told], after[key][told]) < 1e-6 * max(1, np.abs(after[key]).max()), key


def test_peft_reads_what_we_wrote(case):
    config = peft.PeftConfig.from_pretrained(case.folder / "ours")
    model = peft.get_peft_model(model_of(case.family), config)
    result = peft.set_peft_model_state_dict(model, load_peft_weights(str(case.folder / "ours")))
    own = set(tidied(case, {key: value.numpy() for key, value in peft.get_peft_model_state_dict(model).items()}))
    written = set(read_tensors(case.folder / "ours" / TENSORS)[0])
    assert not result.unexpected_keys
    assert own == written
    assert error(their_logits(case.family, model.eval()), case.expected) < 1e-5 * max(1, np.abs(case.expected).max())


def test_tensors_come_back_byte_for_byte(case):
    before, after = (tidied(case, read_tensors(case.folder / side / TENSORS)[0]) for side in ("theirs", "ours"))
    assert set(before) == set(after)
    for key, value in after.items():
        assert value.dtype == before[key].dtype
        assert value.tobytes() == before[key].tobytes(), key


def test_a_second_export_is_the_same(case, tmp_path):
    (again,) = read_peft(case.folder / "ours", case.base, case.names)
    assert again.method == case.adapter.method
    write_peft(tmp_path / "again", again, case.base, case.names)
    for path in (case.folder / "ours").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("topk", [1, 3])
def test_vblora_files_of_chosen_weights_mean_the_same(topk, tmp_path):
    """They are only read: what we write has logits."""
    options = {"r": 2, "num_vectors": 6, "vector_length": 8, "topk": topk, "save_only_topk_weights": True}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model_of("llama"), peft.VBLoRAConfig(**options | QV))
    with torch.no_grad():
        for parameter in (each for each in theirs.parameters() if each.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.5)
    theirs.eval().save_pretrained(tmp_path)
    assert any(key.endswith("_topk_indices") for key in read_tensors(tmp_path / TENSORS)[0])
    base = stored("llama")[1]
    (adapter,) = read_peft(tmp_path, base.base, base.names)
    expected = their_logits("llama", theirs)
    assert error(logits("llama", base.graphdef, base.base, adapter), expected) < 1e-5 * np.abs(expected).max()
    assert error(logits("llama", base.graphdef, base.base, None), expected) > 1e-2
