"""Shapes told from a config alone are those of the rows themselves."""

import numpy as np
import pytest

from vlora_jax.data import text
from vlora_jax.data.config import DatasetConfig
from vlora_jax.data.shapes import example_shapes
from vlora_jax.errors import ConfigError
from vlora_jax.models.decoder import DecoderConfig
from vlora_jax.models.encoder import EncoderConfig
from vlora_jax.models.seq2seq import Seq2SeqConfig

QA = [{"prompt": f"how many is {n}?", "completion": f"there are {n * n}"} for n in range(60)]
SENTIMENT = [{"text": f"hello {'world' * (n % 3)} {n}", "label": ("bad", "good", "fair")[n % 3]} for n in range(30)]
CASES = {
    "padded": (QA, {"format": "completion", "length": 64}, DecoderConfig()),
    "packed": (QA, {"format": "completion", "length": 64, "packing": True}, DecoderConfig()),
    "classes": (SENTIMENT, {"format": "classification", "length": 32}, EncoderConfig(head="sequence", classes=3)),
    "two stacks": (QA, {"format": "completion", "length": 64, "target_length": 32}, Seq2SeqConfig()),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_the_rows(case, write, tokenizer):
    rows, options, model = CASES[case]
    config = DatasetConfig(path=write("rows.jsonl", rows), held_out=0.2, **options)
    data = text.load(config, tokenizer, model)
    task, shapes = example_shapes(config, model)
    canonical = lambda dtype: np.int32 if dtype == np.int64 else np.dtype(dtype)  # as JAX takes them
    real = {name: (np.shape(each), canonical(np.asarray(each).dtype)) for name, each in data.train[0].items()}
    assert task == data.task
    assert {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()} == real


def test_a_length_that_the_data_decides_cannot_be_planned():
    config = DatasetConfig(path="x.jsonl", format="text")
    with pytest.raises(ConfigError, match=r"data.length is null, .* data.length=1024"):
        example_shapes(config, DecoderConfig())
