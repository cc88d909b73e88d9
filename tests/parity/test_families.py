"""Every family and head against transformers: its files in, equal scores; our files out, loaded without a word."""

import json
import logging

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_transformers import BERT, CAUSAL, GPT2, GROUPED, LENGTH, MATRIX, SEQ2SEQ, SMALL, VIT, build, numbers, text

from vlora_jax.hub.load import load_model
from vlora_jax.hub.save import save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's and transformers' own


def theirs(model, pad):
    """Scores of transformers on padded rows, and which rows or tokens to compare."""
    tokens, segments = text()
    ids, mask = torch.tensor(np.where(segments, tokens, pad)).long(), torch.tensor(segments).long()
    if model.config.model_type == "t5":
        targets = torch.tensor(text(1)[0][:, :5]).long()
        return numbers(model(input_ids=ids, attention_mask=mask, decoder_input_ids=targets).logits), None
    types = {}
    if model.config.model_type == "bert":
        types = {"token_type_ids": torch.arange(LENGTH).remainder(3).expand_as(ids)}
    elif model.config.model_type == "roberta":
        types = {"token_type_ids": torch.arange(LENGTH).remainder(2).expand_as(ids)}
    out = model(input_ids=ids, attention_mask=mask, **types)
    scores = numbers(out[0] if not hasattr(out, "logits") else out.logits)
    return scores, segments if scores.ndim == 3 else None


def ours(graphdef, base, pad):
    model = nnx.merge(graphdef, base)
    tokens, segments = text()
    tokens = np.where(segments, tokens, pad).astype(np.int32)
    if model.config.family == "seq2seq":
        return np.asarray(jax.jit(model)(tokens, text(1)[0][:, :5], segments))
    if model.config.family == "encoder":
        count = 3 if model.config.position_offset == 0 else 2
        types = np.broadcast_to(np.arange(LENGTH, dtype=np.int32) % count, tokens.shape)
        return np.asarray(jax.jit(model)(tokens, segments, types))
    return np.asarray(jax.jit(model)(tokens, None, segments))


def gap(one, other, where=None):
    difference = np.abs(one - other)
    return difference.max() if where is None else (difference * where[..., None]).max()


class Silence(logging.Handler):
    """Collects what transformers warns of."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def read_by_transformers(architecture, directory):
    """Load with transformers; nothing may be missing, unexpected or warned of."""
    heard = Silence()
    logger = logging.getLogger("transformers")
    logger.addHandler(heard)
    try:
        model, report = getattr(transformers, architecture).from_pretrained(
            directory, attn_implementation="eager", output_loading_info=True
        )
    finally:
        logger.removeHandler(heard)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    assert heard.lines == []
    return model.eval()


@pytest.mark.parametrize("name", MATRIX)
def test_their_checkpoint_gives_their_scores_and_ours_goes_back(name, tmp_path):
    case = MATRIX[name]
    model = build(case)
    pad = 1 if "Roberta" in case[0] else 0
    model.save_pretrained(tmp_path / "theirs")
    expected, where = theirs(model, pad)

    loaded = load_model(tmp_path / "theirs", notify=pytest.fail)
    assert not loaded.fresh
    assert not loaded.left_out
    assert gap(ours(loaded.graphdef, loaded.base, pad), expected, where) < 1e-4

    save(tmp_path / "ours", loaded.graphdef, loaded.base, like=tmp_path / "theirs")
    again = read_by_transformers(case[0], tmp_path / "ours")
    for key, tensor in model.state_dict().items():  # not a bit is lost on the way
        assert torch.equal(again.state_dict()[key], tensor), key
    assert gap(theirs(again, pad)[0], expected, where) < 1e-6


@pytest.mark.parametrize("name", MATRIX)
def test_a_model_without_an_original_gets_a_config_that_transformers_reads_the_same(name, tmp_path):
    model = build(MATRIX[name])
    pad = 1 if "Roberta" in MATRIX[name][0] else 0
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs", notify=pytest.fail)
    save(tmp_path / "ours", loaded.graphdef, loaded.base)
    architecture = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"][0]
    again = read_by_transformers(architecture, tmp_path / "ours")
    if again.config.pad_token_id is None:  # transformers asks for it to find the last token
        again.config.pad_token_id = 0
    expected, where = theirs(model, pad)
    assert gap(theirs(again, pad)[0], expected, where) < 1e-5


@pytest.mark.parametrize("name", ["llama3-rope", "gemma2", "gemma3", "gpt2"])
def test_packed_documents_give_the_scores_of_each_alone(name, tmp_path):
    model = build(CAUSAL[name])
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, notify=pytest.fail)
    tokens = text()[0][:1]
    cut = 7
    segments = (1 + (np.arange(LENGTH) >= cut))[None].astype(np.int32)
    positions = np.where(np.arange(LENGTH) < cut, np.arange(LENGTH), np.arange(LENGTH) - cut)[None].astype(np.int32)
    packed = np.asarray(jax.jit(nnx.merge(loaded.graphdef, loaded.base))(tokens, positions, segments))
    for part in (slice(0, cut), slice(cut, LENGTH)):
        alone = numbers(model(input_ids=torch.tensor(tokens[:, part]).long()).logits)
        assert gap(packed[:, part], alone) < 1e-4


def test_images_give_the_scores_of_transformers_and_go_back(tmp_path):
    model = build(("ViTForImageClassification", "ViTConfig", VIT))
    model.save_pretrained(tmp_path / "theirs")
    images = np.random.default_rng(0).normal(size=(2, 12, 12, 3)).astype(np.float32)
    expected = numbers(model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2))).logits)
    loaded = load_model(tmp_path / "theirs", notify=pytest.fail)
    assert gap(np.asarray(jax.jit(nnx.merge(loaded.graphdef, loaded.base))(images)), expected) < 1e-4
    for like in (tmp_path / "theirs", None):
        out = tmp_path / f"ours-{like is None}"
        save(out, loaded.graphdef, loaded.base, like=like)
        again = read_by_transformers("ViTForImageClassification", out)
        assert gap(numbers(again(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2))).logits), expected) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-masked", "t5-1.1"])
def test_shards_give_the_same_and_bfloat16_keeps_every_bit(name, tmp_path):
    case = MATRIX[name]
    model = build(case)
    model.save_pretrained(tmp_path / "shards", max_shard_size="4KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    loaded = load_model(tmp_path / "shards", notify=pytest.fail)
    expected, where = theirs(model, 0)
    assert gap(ours(loaded.graphdef, loaded.base, 0), expected, where) < 1e-4

    half = model.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    loaded = load_model(tmp_path / "half", notify=pytest.fail)
    assert loaded.config.dtype == loaded.config.param_dtype == "bfloat16"
    save(tmp_path / "ours", loaded.graphdef, loaded.base, like=tmp_path / "half", max_shard="4KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    again = read_by_transformers(case[0], tmp_path / "ours")
    assert again.dtype == torch.bfloat16
    for key, tensor in half.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    wide = load_model(tmp_path / "half", dtype="float32", notify=pytest.fail)
    widened = getattr(transformers, case[0]).from_pretrained(tmp_path / "half", dtype=torch.float32)
    expected, where = theirs(widened.eval(), 0)
    assert gap(ours(wide.graphdef, wide.base, 0), expected, where) < 1e-4


def test_a_t5_with_a_head_of_its_own_keeps_it(tmp_path):
    case = SEQ2SEQ["t5-1.1"]
    model = build(case)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1 * torch.randn(model.lm_head.weight.shape))
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs", notify=pytest.fail)
    assert not loaded.config.tied_head
    expected, _ = theirs(model, 0)
    assert gap(ours(loaded.graphdef, loaded.base, 0), expected) < 1e-4
    save(tmp_path / "ours", loaded.graphdef, loaded.base, like=tmp_path / "theirs")
    again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours")  # always warns of such a head
    assert gap(theirs(again.eval(), 0)[0], expected) < 1e-4


def test_a_tied_head_that_is_untied_is_written_as_a_kernel_of_its_own(tmp_path):
    model = build(CAUSAL["gemma2"])
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs", untie=True, notify=pytest.fail)
    expected, where = theirs(model, 0)
    assert gap(ours(loaded.graphdef, loaded.base, 0), expected, where) < 1e-4
    loaded.base["head"]["kernel"].set_value(loaded.base["head"]["kernel"].get_value() * 2)
    save(tmp_path / "ours", loaded.graphdef, loaded.base, like=tmp_path / "theirs")
    again = read_by_transformers("Gemma2ForCausalLM", tmp_path / "ours")
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.lm_head.weight, 2 * model.model.embed_tokens.weight)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("stored", "asked", "head"),
    [
        ("BertModel", "BertForSequenceClassification", "sequence"),
        ("BertForMaskedLM", "BertForTokenClassification", "token"),
        ("BertForPreTraining", "BertForMaskedLM", None),
        ("RobertaForSequenceClassification", "RobertaModel", "none"),
        ("LlamaModel", "LlamaForSequenceClassification", "sequence"),
        ("LlamaForCausalLM", "LlamaForTokenClassification", "token"),
        ("GPT2Model", "GPT2LMHeadModel", "lm"),
        ("GPT2LMHeadModel", "GPT2ForTokenClassification", "token"),
    ],
)
def test_a_base_takes_any_head_and_the_result_is_what_transformers_builds(stored, asked, head, tmp_path):
    """Headed and bare files, with and without the base's prefix; the new head goes out with the rest."""
    stem = next(stem for stem in ("Bert", "Roberta", "Llama", "GPT2") if stored.startswith(stem))
    options = {"Llama": SMALL | GROUPED, "GPT2": GPT2}.get(stem, BERT | {"pad_token_id": int(stem == "Roberta")})
    model = build((stored, f"{stem}Config", options))
    model.save_pretrained(tmp_path / "theirs")
    loaded = load_model(tmp_path / "theirs", head=head, notify=lambda line: None)
    save(tmp_path / "ours", loaded.graphdef, loaded.base, like=tmp_path / "theirs")
    if asked == "RobertaModel":  # a classifier's files have no pooler, so transformers draws one
        again = transformers.RobertaModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False)
    else:
        again = read_by_transformers(asked, tmp_path / "ours")
    pad = int(stem == "Roberta")
    expected, where = theirs(again.eval(), pad)
    assert gap(ours(loaded.graphdef, loaded.base, pad), expected, where) < 1e-4
    bare = lambda state: {key.removeprefix(f"{model.base_model_prefix}."): value for key, value in state.items()}
    before, after = bare(model.state_dict()), bare(again.state_dict())
    assert not [key for key in after if ".0." in key and not torch.equal(after[key], before[key])]
