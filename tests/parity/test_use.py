"""Every family in use: greedy generation token for token, and the gradients that LoRA's A and B get in PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_transformers import CAUSAL, CLASSIFIERS, ENCODERS, SEQ2SEQ, VIT, VOCABULARY, build, text

import vlora_jax as vj
from vlora_jax.hub.load import load_model
from vlora_jax.hub.peft import read_peft, write_peft
from vlora_jax.hub.peft_file import TENSORS, read_tensors
from vlora_jax.training.loss import LOSSES

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own

NEW, PROMPTS = 10, [[5, 9, 3, 7, 2, 8, 30, 11], [4, 6], [12, 7, 20]]
IMAGES = {"vit": ("ViTForImageClassification", "ViTConfig", VIT)}
TRAINED = (
    CAUSAL
    | SEQ2SEQ
    | IMAGES
    | {name: CLASSIFIERS[name] for name in ("bert-sequence", "roberta-sequence", "qwen3-sequence", "gpt2-sequence")}
    | {name: ENCODERS[name] for name in ("bert-masked", "roberta-masked")}
)


@pytest.mark.parametrize("name", CAUSAL | SEQ2SEQ)
def test_greedy_generation_is_that_of_transformers_token_for_token(name, tmp_path):
    """Prompts of different length; an end for some of them, chosen from what comes without."""
    architecture, config, options = (CAUSAL | SEQ2SEQ)[name]
    if name in SEQ2SEQ:  # transformers' cache has as many layers as the encoder
        options = options | {"num_decoder_layers": options["num_layers"]}
    model = build((architecture, config, options))
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, notify=pytest.fail)
    length = max(map(len, PROMPTS))
    left = name not in SEQ2SEQ

    def row(prompt, fill):
        rest = [fill] * (length - len(prompt))
        return rest + prompt if left else prompt + rest

    ids = torch.tensor([row(prompt, 0) for prompt in PROMPTS])
    mask = torch.tensor([row([1] * len(prompt), 0) for prompt in PROMPTS])

    def theirs(eos):
        model.generation_config.eos_token_id = eos
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, **options)[:, length if left else 1 :].tolist()
        return [each[: each.index(eos) + 1] if eos in each else each for each in out]

    free = theirs(None)
    assert vj.generate(loaded.graphdef, loaded.base, PROMPTS, most=NEW).tokens == free
    eos = free[0][4]
    assert vj.generate(loaded.graphdef, loaded.base, PROMPTS, most=NEW, eos=[eos]).tokens == theirs(eos)


def batch_of(name):
    """Random inputs and answers, some of the tokens not counted; what both sides compute their loss from."""
    tokens, segments = text()
    rng = np.random.default_rng(3)
    if name in IMAGES:
        return {"image": rng.normal(size=(3, 12, 12, 3)).astype(np.float32), "label": np.array([1, 0, 4])}
    if name.endswith("sequence"):
        tokens = tokens * segments  # transformers tells the last token by its padding id, which is 0 here
        return {"tokens": tokens, "segments": segments, "label": np.array([1, 0, 4])}
    targets = rng.integers(0, VOCABULARY, tokens.shape).astype(np.int32)
    mask = segments * (rng.random(tokens.shape) < 0.7)
    if name in SEQ2SEQ:
        own = text(1, padded=False)
        return {"tokens": tokens, "segments": segments, "decoder_tokens": own[0], "decoder_segments": own[1],
                "targets": targets, "mask": mask}  # fmt: skip
    return {"tokens": tokens, "segments": segments, "targets": targets, "mask": mask}


def their_loss(model, name, batch):
    """The mean of what counts, by torch."""
    long = {key: torch.tensor(value).long() for key, value in batch.items() if key != "image"}
    if name in IMAGES:
        scores = model(pixel_values=torch.tensor(batch["image"].transpose(0, 3, 1, 2))).logits
        return torch.nn.functional.cross_entropy(scores, long["label"])
    inputs = {"input_ids": long["tokens"], "attention_mask": long["segments"]}
    if name in SEQ2SEQ:
        inputs |= {"decoder_input_ids": long["decoder_tokens"]}
    scores = model(**inputs).logits
    if "label" in batch:
        return torch.nn.functional.cross_entropy(scores, long["label"])
    losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), long["targets"].flatten(), reduction="none")
    return (losses * long["mask"].flatten()).sum() / long["mask"].sum()


def our_loss(model, name, batch):
    """The same by our losses; a masked language model's is the next token's without the shift, so the same sums."""
    if name in IMAGES:
        sums = LOSSES["classification"](model, batch, True)
    elif "label" in batch:
        sums = LOSSES["text_classification"](model, batch, True)
    elif name in ENCODERS:
        scores = jax.nn.log_softmax(model(batch["tokens"], batch["segments"]))
        chosen = jnp.take_along_axis(scores, batch["targets"][..., None], axis=-1)[..., 0]
        sums = {"loss": -(chosen * batch["mask"]).sum(), "weight": batch["mask"].sum()}
    else:
        sums = LOSSES["seq2seq" if name in SEQ2SEQ else "next_token"](model, batch, True)
    return sums["loss"] / sums["weight"]


@pytest.mark.parametrize("name", TRAINED)
def test_a_and_b_get_the_gradients_that_they_get_in_peft(name, tmp_path):
    """All linear kernels, through our losses. Gradients travel as an adapter, so that names are compared too."""
    model = build(TRAINED[name])
    if name in SEQ2SEQ:  # its scores have no scale: numbers this large leave less than five digits of float32
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.6)
    if name.endswith("sequence") and model.config.pad_token_id is None:
        model.config.pad_token_id = 0
    model.save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc"] if name.startswith("gpt2") else "all-linear"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
    adapted.save_pretrained(tmp_path / "peft")
    loaded = load_model(tmp_path / "base", notify=pytest.fail)
    (adapter,) = read_peft(tmp_path / "peft", loaded.base, loaded.names)
    batch = batch_of(name)
    loss = their_loss(adapted, name, batch)
    loss.backward()

    @jax.jit
    def gradient(trainable, batch):
        run = lambda trainable: our_loss(
            vj.bind(loaded.graphdef, loaded.base, adapter.with_trainable(trainable)), name, batch
        )
        return jax.value_and_grad(run)(trainable)

    value, slopes = gradient(adapter.trainable, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    write_peft(tmp_path / "slopes", adapter.with_trainable(slopes), loaded.base, loaded.names)
    found = read_tensors(tmp_path / "slopes" / TENSORS)[0]
    expected = {key.replace(".default", ""): p.grad.numpy() for key, p in adapted.named_parameters() if p.requires_grad}
    assert set(found) == set(expected)
    scale = max(np.abs(each).max() for each in expected.values())
    for key, each in expected.items():
        np.testing.assert_allclose(found[key], each, atol=1e-5 * max(1.0, scale), err_msg=key)
