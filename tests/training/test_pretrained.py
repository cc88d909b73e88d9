"""The config for GSM8K on a tiny model of its family, through the command line: train, go on, mark, answer, export."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import call
from helpers import filled

from vlora_jax.cli.main import run
from vlora_jax.generation.text import Bytes
from vlora_jax.hub.save import save
from vlora_jax.models.build import abstract_model
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.training.config import load_config
from vlora_jax.training.job import load_data
from vlora_jax.training.runs import read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "llama_gsm8k_lora.yaml")
PROBLEMS = [
    {"question": f"Tom has {a} apples and buys {b} more. How many?", "answer": f"He has {a} + {b}.\n#### {a + b}"}
    for a in range(1, 9)
    for b in range(1, 9)
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A directory with a tiny Llama and a tokenizer made from the problems, and the problems beside it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<s>", "</s>"]}
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, **alphabet)
    tokenizer.train_from_iterator([text for row in PROBLEMS for text in row.values()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    sizes = {"width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "layers": 2}
    graphdef, shapes = abstract_model(DecoderConfig(vocabulary=len(fast), **sizes, tied_head=False))
    save(place / "model", graphdef, filled(shapes, 0, 0.3))
    fast.save_pretrained(place / "model")
    for name, rows in (("train", PROBLEMS[::2]), ("test", PROBLEMS[1::8])):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def arguments(llama, out, steps=8):
    return [
        "train", "--config", CONFIG, f"run_dir={out}", f"model.source={llama / 'model'}", "model.dtype=float32",
        f"data.path={llama / 'train.jsonl'}", f"data.held_out={llama / 'test.jsonl'}", "data.subset=null",
        "data.length=128", "adapter.rank=4", f"steps={steps}", "optimizer.rate=3e-2", "optimizer.warmup=2",
        "optimizer.schedule=constant", "evaluate.every=4", "checkpoint.every=2", "log.every=1", "log.tensorboard=false",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """A run, stopped in the middle and continued."""
    out = tmp_path_factory.mktemp("runs") / "gsm8k"
    for steps in (5, 8):
        with pytest.raises(SystemExit) as ended:
            run(arguments(llama, out, steps))
        assert not ended.value.code
    return out


def test_the_config_trains_and_a_continued_run_is_the_same(llama, trained, tmp_path, capsys):
    code, out, error = call(capsys, *arguments(llama, tmp_path / "whole"))
    assert (code, error) == (0, "")
    assert "⟦He has" in out  # the mask, in the examples
    assert "packed 32 documents" in out
    told = lambda place: [
        (record["step"], record["loss"], record["batch"]) for record in read_metrics(place) if record["kind"] == "train"
    ]
    assert told(tmp_path / "whole") == told(trained)
    losses = [loss for _, loss, _ in told(trained)]
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.slow
def test_rows_longer_than_the_model_was_trained_on_are_warned_of(llama, tmp_path):
    shutil.copytree(llama / "model", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 100}))
    train, *overrides = arguments(llama, tmp_path / "run")[2:]
    warnings = lambda *more: load_data(load_config(Path(train), [*overrides, *more])).summary.warnings
    assert "trained on at most 100 (max_position_embeddings)" in warnings(f"model.source={tmp_path / 'model'}")[-1]
    assert not any("max_position" in each for each in warnings())


def test_marks_with_and_without_the_adapter(trained, capsys):
    code, out, _ = call(capsys, "eval", trained, "--base", "--answers", "3", "--after", "####", "--new", "12", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["adapted"]["loss"] < found["base"]["loss"] - 0.3
    answer = found["adapted"]["answers"][0]
    assert answer["prompt"].startswith("Question: Tom has")
    assert answer["expected"].endswith("#### 3")
    assert not answer["right"]
    logged = [record for record in read_metrics(trained) if record["kind"] == "held_out"]
    np.testing.assert_allclose(found["adapted"]["loss"], min(record["loss"] for record in logged), rtol=1e-5)


@pytest.mark.slow
def test_a_run_answers_prompts_each_with_its_own_adapter(trained, tmp_path, capsys):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Question: Tom", "adapter": -1}\n{"prompt": "Question: Tom"}')
    code, out, error = call(capsys, "generate", trained, "Question: Tom", "--new", "4", "--json")
    alone = json.loads(out)
    assert (code, alone["tokens"]) == (0, 4)
    assert "4 new tokens" in error
    both = call(capsys, "generate", trained, "--file", tmp_path / "asked.jsonl", "--new", "4", "--json")[1]
    assert json.loads(both.splitlines()[0])["answer"] != alone["answer"]
    rows = call(capsys, "generate", trained, "Question: Tom", "Tom has", "--rows", "0,-1", "--new", "4", "--json")[1]
    assert json.loads(rows.splitlines()[0])["answer"] == alone["answer"]


@pytest.mark.slow
def test_an_exported_adapter_answers_like_the_run(llama, trained, tmp_path, capsys):
    assert call(capsys, "export", trained, "--out", tmp_path / "peft")[0] == 0
    said = [
        json.loads(call(capsys, "generate", *model, "Question: Tom has 2", "--new", "6", "--json")[1])["answer"]
        for model in ([trained], [llama / "model", "--adapter", tmp_path / "peft"])
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["generate", "{run}"], "no prompt: give some after the model"),
        (["generate", "{run}", "a", "--rows", "x"], "--rows 'x' must be numbers"),
        (["generate", "{run}", "a", "--rows", "1"], "name adapter 1, and there are 1"),
        (["generate", "{run}", "a", "--top-k", "3"], "give a temperature above 0"),
        (["generate", "{run}", "a", "--chat"], "no chat template"),
        (["generate", "{run}x", "a"], "gsm8kx does not exist; nearest run: "),
        (["eval", "{run}", "optimizer.rate=1"], "optimizer.rate belongs to the run"),
        (["eval"], "give a run, or --config"),
        (["train", "--config", CONFIG, "model.source=nowhere/at-all", "model.dtype=float32"], "nowhere/at-all"),
        (["train", "--config", CONFIG, "init_from={run}"], "a run starts from one of them"),
    ],
)
def test_what_cannot_be_asked_is_one_line(llama, trained, extra, message, capsys, tmp_path):
    places = {"run": trained, "model": llama / "model"}
    more = [f"run_dir={tmp_path / 'x'}"] if extra[0] == "train" else []
    code, _, error = call(capsys, *[each.format(**places) for each in extra], *more)
    assert code == 2
    assert message in error
    assert len(error.splitlines()) == 1


def test_bytes_are_text():
    codec = Bytes()
    assert codec.decode([*codec.encode("π = 3"), 0]) == "π = 3"
