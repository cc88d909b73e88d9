"""From a config to batches: splits, lengths, masks, reports, and a run that goes on exactly."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from vlora_jax import checkpoint
from vlora_jax.data import text
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.pipeline import TrainBatches
from vlora_jax.data.tokens import decode, load_tokenizer
from vlora_jax.errors import ConfigError, DataError
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.encoder import EncoderConfig
from vlora_jax.models.seq2seq import Seq2SeqConfig
from vlora_jax.training import screens
from vlora_jax.training.config import load_config
from vlora_jax.training.loop import train
from vlora_jax.training.results import read_run, write_ordinary
from vlora_jax.training.runs import CHECKPOINTS, read_metrics

SHARED = Path(__file__).parents[3] / "shared" / "data"
QA = [
    {"question": f"how many is {n}?", "answer": f"there are {n * n} " + "of them " * (n % 7), "id": n}
    for n in range(60)
]
SENTIMENT = [{"text": f"hello {'world' * (n % 3)} {n}", "label": ("bad", "good", "fair")[n % 3]} for n in range(30)]


def loaded(path, source, model=None, **options):
    return text.load(DatasetConfig(path=path, **{"format": "completion", **options}), source, model)


def refused(match, *args, error=DataError, **options):
    with pytest.raises(error, match=match) as caught:
        loaded(*args, **options)
    assert "\n" not in str(caught.value)


def rows(source):
    return [source[index] for index in range(len(source))]


@pytest.fixture
def qa(write):
    return write("qa.jsonl", QA)


def test_a_padded_row_is_the_document_its_mask_and_padding(qa, tokenizer):
    """The pad token is the eos: the one eos that ends the completion is learnt, the padding is not."""
    data = loaded(qa, tokenizer, held_out=0.2)
    read = load_tokenizer(tokenizer)
    assert read.pad_token_id == read.eos_token_id
    assert (data.task, data.facts["vocabulary"]) == ("next_token", len(read))
    questions = {row["question"]: row["answer"] for row in QA}
    for row in rows(data.train):
        mask = row["mask"]
        completion = decode(read, row["targets"][mask])
        assert completion.count("</s>") == 1
        assert completion.endswith("</s>")
        asked = decode(read, row["tokens"][: mask.argmax() + 1])
        assert questions[asked] == completion.removesuffix("</s>")
        assert row["tokens"].shape == (data.summary.length,) == (64,)
        assert (row["tokens"][mask.nonzero()[0].max() + 1 :] == read.pad_token_id).all()
    assert data.summary.train.ends == len(data.train)


@pytest.mark.parametrize("packing", [False, True])
def test_counts_are_those_of_the_masks(qa, tokenizer, packing):
    data = loaded(qa, tokenizer, packing=packing, held_out=0.3)
    for source, part in ((data.train, data.summary.train), (data.held_out, data.summary.held_out)):
        assert part.supervised == sum(row["mask"].sum() for row in rows(source))
        assert part.rows == len(source)
    assert data.summary.train.documents + data.summary.held_out.documents == len(QA)
    if packing:
        assert part.tokens == sum((row["segments"] > 0).sum() for row in rows(source))
        full = data.summary.train.tokens / len(data.train) / data.summary.length
        assert (
            f"packed {data.summary.train.documents} documents into {len(data.train)} rows, {full:.1%} full"
            in "; ".join(data.summary.notes)
        )


def test_a_share_is_held_out_by_what_is_in_a_row(write, tokenizer):
    """Equal rows are on one side, whatever their place, and more rows change no row's side."""
    sides = {}
    for name, many in (("a.jsonl", QA), ("b.jsonl", QA[::-1] + QA[:7]), ("c.jsonl", QA[:40])):
        data = loaded(write(name, many), tokenizer, held_out=0.3)
        answers = lambda source: {
            decode(load_tokenizer(tokenizer), row["targets"][row["mask"]]) for row in rows(source)
        }
        train, held_out = answers(data.train), answers(data.held_out)
        assert not train & held_out
        for side, members in (("train", train), ("held out", held_out)):
            for each in members:
                assert sides.setdefault(each, side) == side
    assert 8 <= list(sides.values()).count("held out") <= 28


def test_held_out_rows_come_from_a_file_or_a_split(write, tokenizer, tmp_path):
    path, other = write("train.jsonl", QA[:20]), write("test.jsonl", QA[20:23])
    for options in (
        {"path": path, "held_out": other},
        {"path": path, "held_out": [other]},
        {"path": str(tmp_path), "held_out": "test"},
    ):
        data = loaded(options.pop("path"), tokenizer, **options)
        assert (len(data.train), len(data.held_out)) == (20, 3)
    refused("'test': a file has no splits; give a file or a share", path, tokenizer, held_out="test")
    refused("a share of 0.0001 of 20 rows leaves one side empty", path, tokenizer, held_out=0.0001)
    data = loaded(path, tokenizer, held_out=other, limit=5, held_out_limit=2)
    assert (len(data.train), len(data.held_out)) == (5, 2)


def test_the_fingerprint_is_of_rows_tokens_and_format(write, make_tokenizer, tokenizer):
    path = write("qa.jsonl", QA)
    of = lambda path=path, source=tokenizer, **options: loaded(path, source, **options).fingerprint
    first = of()
    assert of() == first
    others = [
        of(write("changed.jsonl", [QA[0] | {"answer": "else"}, *QA[1:]])),
        of(source=make_tokenizer(bos="<s>")),
        of(loss="all"),
        of(packing=True),
        of(length=128),
        of(eos="<|end|>"),
    ]
    assert len({first, *others}) == 7
    write("qa.jsonl", QA[:-1])
    assert of() != first, "a changed file is read anew"


def test_long_rows_are_cut_left_out_or_refused(write, tokenizer):
    many = [{"prompt": "a b c", "completion": "d " * n} for n in (2, 3, 30)]
    path, held = write("qa.jsonl", many), write("held.jsonl", many[:1])
    sizes = [len(load_tokenizer(tokenizer)(row["prompt"] + row["completion"])["input_ids"]) for row in many]
    data = loaded(path, tokenizer, held_out=held, length=16)
    assert [len(row["tokens"]) for row in rows(data.train)] == [16] * 3
    assert data.summary.train.ends == 2
    assert any(
        f"1 of 3 rows have more than 16 tokens (longest {sizes[2]}): cut off" in note for note in data.summary.notes
    )
    left = loaded(path, tokenizer, held_out=held, length=16, overlong="drop")
    assert len(left.train) == left.summary.train.ends == 2
    refused(
        "1 of 3 rows.*the first is .*row 3; raise data.length",
        path,
        tokenizer,
        held_out=held,
        length=16,
        overlong="error",
    )
    refused("so that none is left", path, tokenizer, held_out=held, length=2, overlong="drop")


def test_a_completion_that_is_cut_off_is_refused(write, tokenizer):
    """Such a row would teach nothing, silently."""
    many = [{"prompt": "a", "completion": "b"}, {"prompt": "a " * 40, "completion": "b"}]
    path = write("qa.jsonl", many)
    refused(r"row 2: all of its \d+ supervised tokens stand behind the first 16, as in 1 of 2 rows; raise data.length",
            path, tokenizer, held_out=path, length=16)  # fmt: skip
    assert len(loaded(path, tokenizer, held_out=path, length=16, overlong="drop").train) == 1


def test_long_texts_are_split_with_every_token_predicted_once(write, tokenizer):
    words = "".join(chr(97 + n % 26) for n in range(100))
    path = write("text.jsonl", [{"text": words}])
    data = loaded(path, tokenizer, format="text", held_out=path, length=8, overlong="split")
    read = load_tokenizer(tokenizer)
    ids = read(words)["input_ids"]
    targets = np.concatenate([row["targets"][row["mask"]] for row in rows(data.train)])
    assert targets.tolist() == [*ids[1:], read.eos_token_id]
    assert data.train[1]["tokens"][0] == data.train[0]["targets"][-1]


def test_nothing_to_learn_from_is_refused_and_little_is_warned_of(write, tokenizer):
    asked = [{"messages": [{"role": "user", "content": "hello"}]}]
    path = write("chat.jsonl", asked)
    refused(r"0 of \d+ tokens are supervised.*role assistant", path, tokenizer, format="chat", held_out=path)
    answered = [{"messages": [{"role": "user", "content": "hello " * 400}, {"role": "assistant", "content": "a"}]}]
    mixed = write("mixed.jsonl", asked + answered)
    data = loaded(mixed, tokenizer, format="chat", held_out=mixed)
    assert len(data.train) == 1
    assert "1 rows without a supervised token left out" in data.summary.notes
    assert data.summary.warnings[0].startswith("only 0.")
    blank = write("blank.jsonl", [{"text": " "}])
    refused("0 of 0 tokens are supervised", blank, tokenizer, format="text", held_out=blank)


def test_one_row_is_enough_for_a_batch_of_one(write, tokenizer):
    path = write("one.jsonl", QA[:1])
    data = loaded(path, tokenizer, held_out=path)
    assert next(TrainBatches(data, 1, 1, 0))["tokens"].shape == (1, 1, 64)
    with pytest.raises(DataError, match="has 1 examples, fewer than one step of 8"):
        TrainBatches(data, 8, 1, 0)


def test_rows_are_no_longer_than_the_model_reads(write, tokenizer):
    path = write("qa.jsonl", [{"prompt": "a", "completion": "b " * 300}])
    length = lambda **fields: loaded(path, tokenizer, DecoderConfig(**fields), held_out=path).summary.length
    assert (length(), length(max_positions=100)) == (640, 100)


def test_the_screen_shows_the_mask_in_plain_text(write, tokenizer):
    path = write("qa.jsonl", QA)
    summary = loaded(path, tokenizer, packing=True).summary
    console = Console(file=io.StringIO(), width=200)
    console.print(screens.data_screen(summary))
    shown = console.file.getvalue()
    for number in range(3):
        asked, answer = (text for text, _ in summary.examples[number])
        assert f"{asked}⟦{answer}⟧" in shown
    assert f"supervised {summary.train.supervised:,} ({summary.train.share:.1%})" in shown
    assert "columns prompt ← question, completion ← answer; not read: id" in shown
    assert "packed" in shown


def test_classes_of_texts(write, make_tokenizer):
    path = write("rows.jsonl", SENTIMENT)
    source = make_tokenizer(bos="<s>")
    data = loaded(path, source, EncoderConfig(), format="classification", held_out=path)
    assert data.task == "text_classification"
    assert data.facts["labels"] == ("bad", "fair", "good")
    read = load_tokenizer(source)
    for row, expected in zip(rows(data.train), SENTIMENT, strict=True):
        real = row["segments"] == 1
        assert decode(read, row["tokens"][real]) == "<s>" + expected["text"]
        assert (row["segments"][~real] == 0).all()
        assert data.facts["labels"][row["label"]] == expected["label"]
        assert np.all(np.diff(row["segments"]) <= 0)
    assert data.summary.examples[0][-1] == ("bad", True)
    assert "3 classes: bad 10, fair 10, good 10" in data.summary.notes
    console = Console(file=io.StringIO(), width=200)
    console.print(screens.data_screen(data.summary))
    assert "⟦bad⟧" in console.file.getvalue()
    assert "supervised" not in console.file.getvalue(), "rows are learnt, not tokens"


def test_pairs_of_texts_have_types_where_the_model_knows_them(write, make_tokenizer):
    path = write("rows.csv", [{"premise": "hello", "hypothesis": "world how", "label": n % 2} for n in range(4)])
    source = make_tokenizer(bos="<s>")
    for types, keys in ((2, {"types"}), (1, set())):
        data = loaded(path, source, EncoderConfig(token_types=types), format="classification", held_out=path)
        row = data.train[0]
        assert row.keys() == {"tokens", "segments", "label", "id"} | keys
        assert decode(load_tokenizer(source), row["tokens"][row["segments"] == 1]) == "<s>hello<s>world how"
        if keys:
            first = len(load_tokenizer(source)("hello")["input_ids"])
            expected = (np.arange(64) >= first) & (row["segments"] == 1)
            np.testing.assert_array_equal(row["types"], expected)


def test_long_classified_texts_are_cut_by_the_tokenizer(write, make_tokenizer):
    path = write("rows.jsonl", [{"text": "a " * n, "label": n % 2} for n in (3, 4, 50)])
    source = make_tokenizer(bos="<s>")
    load = lambda **options: loaded(path, source, format="classification", held_out=path, length=12, **options)
    cut = load().train
    assert [int(row["segments"].sum()) for row in rows(cut)][2] == 12
    assert all(row["tokens"][0] == load_tokenizer(source).bos_token_id for row in rows(cut))
    assert len(load(overlong="drop").train) == 2
    with pytest.raises(DataError, match=r"1 of 3 rows have more than 12 tokens.*row 3"):
        load(overlong="error")


def test_few_shots_are_so_many_of_each_class(write, tokenizer):
    path = write("rows.jsonl", SENTIMENT)
    load = lambda **options: loaded(path, tokenizer, format="classification", held_out=path, **options)
    labels = [int(row["label"]) for row in rows(load(shots=4).train)]
    assert sorted(labels) == [0] * 4 + [1] * 4 + [2] * 4
    assert load(shots=4).fingerprint == load(shots=4).fingerprint != load(shots=4, shots_seed=1).fingerprint
    assert len(load(shots=4).held_out) == 30
    with pytest.raises(DataError, match="shots 11: class 'bad' has 10 rows"):
        load(shots=11)


@pytest.mark.parametrize(
    ("labels", "held_out", "match"),
    [
        (["a", "b"], ["c", "a"], "row 1: label 'c' is none of the classes a, b"),
        (["a", None], ["a", "b"], "row 2: label is None, no class"),
        ([0.5, 1.0], [0, 1], "row 1: label is 0.5, no class"),
        (["a", "a"], ["a", "a"], "label is 'a' in every row; two classes are needed"),
        (["a", 1], ["a", "a"], "both text and numbers"),
    ],
)
def test_what_is_no_class_is_refused(write, tokenizer, labels, held_out, match):
    one, two = (
        write(name, [{"text": "x", "label": label} for label in values])
        for name, values in (("train.jsonl", labels), ("held.jsonl", held_out))
    )
    refused(match, one, tokenizer, format="classification", held_out=two)


def test_numbers_are_classes_in_their_order(write, tokenizer):
    path = write("rows.csv", [{"text": "x", "label": n} for n in (10, 2, 1)])
    data = loaded(path, tokenizer, format="classification", held_out=path)
    assert data.facts["labels"] == ("1", "2", "10")
    assert [int(row["label"]) for row in rows(data.train)] == [2, 1, 0]


def test_an_encoder_decoder_reads_prompts_and_learns_answers(qa, tokenizer):
    model = Seq2SeqConfig(start_token=3)
    data = loaded(qa, tokenizer, model, held_out=qa, target_length=40)
    read = load_tokenizer(tokenizer)
    assert data.task == "seq2seq"
    for row, expected in zip(rows(data.train), QA, strict=True):
        assert decode(read, row["tokens"][row["segments"] == 1]) == expected["question"] + "</s>"
        mask = row["mask"]
        assert decode(read, row["targets"][mask]) == expected["answer"] + "</s>"
        np.testing.assert_array_equal(mask, row["decoder_segments"] == 1)
        assert row["decoder_tokens"][0] == 3
        np.testing.assert_array_equal(row["decoder_tokens"][1:][mask[1:]], row["targets"][:-1][mask[1:]])
        assert row["targets"].shape == (40,)
    assert data.summary.train.ends == 60
    short = loaded(qa, tokenizer, model, held_out=qa, length=6, target_length=5)
    assert (short.train[5]["tokens"][5], short.train[5]["mask"].sum()) == (read.eos_token_id, 5)
    assert 0 < len(loaded(qa, tokenizer, model, held_out=qa, target_length=12, overlong="drop").train) < 60
    refused("with data.packing false", qa, tokenizer, model, packing=True, error=ConfigError)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"columns": {"prompt": "questoin"}}, "no column 'questoin'; nearest: 'question'"),
        ({"format": "chat"}, r"no column for messages \(messages, conversations, conversation\); it has 'question'"),
        ({"eos": "<stop>"}, "'<stop>' is no token of the tokenizer"),
    ],
)
def test_what_is_missing_is_named(qa, tokenizer, options, match):
    refused(match, qa, tokenizer, **options)


def test_a_tokenizer_is_needed_and_the_model_must_be_of_the_kind(qa, tokenizer):
    refused("data.tokenizer is null and the model brings none", qa, None, error=ConfigError)
    refused("is for a decoder with a head over its vocabulary", qa, tokenizer, EncoderConfig(), error=ConfigError)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packing": True, "format": "classification"}, "packing is for format text, completion and chat"),
        ({"shots": 3}, "shots is for format classification and images"),
        ({"overlong": "split"}, "overlong split is for format text"),
        ({"held_out": 1.5}, "held_out 1.5 must be a share between 0 and 1"),
        ({"prompt_template": "{a}"}, "go together"),
        ({"columns": {"promt": "a"}}, "no role 'promt' in format completion; nearest: prompt"),
    ],
)
def test_options_that_have_no_meaning_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        DatasetConfig(path="x.csv", **{"format": "completion", **options})


def run_config(run, path, tokenizer, *overrides):
    values = {
        "name": "dataset", "path": path, "format": "completion", "tokenizer": tokenizer, "packing": True, "batch": 4,
        "length": 64,
    }  # fmt: skip
    tiny = ["model.family=decoder", "model.vocabulary=400", "model.layers=1", "model.width=8", "model.heads=1",
            "model.mlp_width=8", "steps=14", "evaluate.every=7", "evaluate.batch=4", "evaluate.metric=loss",
            "checkpoint.every=4", "log.every=1", "log.tensorboard=false", "optimizer.warmup=0",
            f"run_dir={run}"]  # fmt: skip
    return load_config(None, [*tiny, *(f"data.{key}={json.dumps(value)}" for key, value in values.items()), *overrides])


def quiet(config, stop_at=None):
    asked = iter(range(1, 10_000))
    console = Console(file=io.StringIO(), width=200)
    train(config, console, None if stop_at is None else lambda: next(asked) >= stop_at, jax.devices()[:1])
    return console.file.getvalue()


@pytest.mark.slow
def test_a_packed_run_goes_on_exactly_and_shows_its_rows(write, tokenizer, tmp_path):
    """Stopped in the first and in the second epoch; a changed file is another run."""
    path = write("qa.jsonl", QA)
    shown = quiet(run_config(tmp_path / "whole", path, tokenizer))
    assert "⟦there are" in shown
    for stop in (2, 7, None):
        quiet(run_config(tmp_path / "parts", path, tokenizer), stop)
    runs = [tmp_path / name for name in ("whole", "parts")]
    steps = [[(r["step"], r["batch"], r["loss"]) for r in read_metrics(run) if r["kind"] == "train"] for run in runs]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 14
    whole, parts = (checkpoint.read(run / CHECKPOINTS, 14).trees for run in runs)
    assert whole.keys() == parts.keys()
    for tree in whole:
        for name in whole[tree]:
            np.testing.assert_array_equal(np.asarray(whole[tree][name]), np.asarray(parts[tree][name]))
    write("qa.jsonl", QA[1:])
    with pytest.raises(Exception, match="is not the data that this run was started on"):
        quiet(run_config(tmp_path / "whole", path, tokenizer))


@pytest.mark.slow
def test_a_run_of_an_encoder_decoder_is_merged(write, tokenizer, tmp_path):
    own = ["model.family=seq2seq", "model.decoder_layers=2", "model.vertical.size=2", "model.layers=2"]
    own += ["model.vertical.increment.rank=2", "data.packing=false", "steps=1"]
    quiet(run_config(tmp_path / "run", write("qa.jsonl", QA), tokenizer, *own))
    written = write_ordinary(read_run(tmp_path / "run"), tmp_path / "dense")
    assert written.gap < 1e-5 < written.largest
    assert read_run(tmp_path / "dense").model.vertical is None


def test_a_model_with_too_few_tokens_is_refused(write, tokenizer, tmp_path):
    config = run_config(tmp_path / "run", write("qa.jsonl", QA), tokenizer, "model.vocabulary=100")
    with pytest.raises(ConfigError, match=r"model\.vocabulary 100, but the data has 3\d\d"):
        quiet(config)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_gsm8k_and_sst2_load(tokenizer):
    gsm = loaded(str(SHARED / "gsm8k"), tokenizer, held_out="test", packing=True, limit=300, held_out_limit=100)
    assert (gsm.summary.train.documents, gsm.summary.held_out.documents) == (300, 100)
    assert gsm.summary.train.ends == 300
    assert gsm.summary.train.tokens / (len(gsm.train) * gsm.summary.length) > 0.9
    options = {"format": "classification", "header": ["sentence", "label"], "held_out": "dev"}
    sst = loaded(str(SHARED / "sst2"), tokenizer, **options)
    assert (len(sst.train), len(sst.held_out), sst.facts["classes"]) == (6920, 872, 2)
    assert np.mean([row["label"] for row in rows(sst.held_out)]) == pytest.approx(444 / 872)
