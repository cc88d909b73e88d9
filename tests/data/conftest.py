"""Tokenizers made in the test, and rows written to files."""

import csv
import json

import pytest

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CORPUS = ["Question: how many are there? Answer: there are 48/2 = 24 of them.", "user assistant system hello world"]


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory):
    """Directory of a byte-level BPE tokenizer; `bos` puts one before each text, as Llama's does."""

    def make(eos="</s>", pad="</s>", bos=None, template=CHATML):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<pad>", "<s>", "</s>", "<|start|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(CORPUS * 8, trainer)
        if bos is not None:
            number = tokenizer.token_to_id(bos)
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, number)]
            )
        names = {key: value for key, value in (("eos_token", eos), ("pad_token", pad), ("bos_token", bos)) if value}
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
        wrapped.chat_template = template
        directory = tmp_path_factory.mktemp("tokenizer")
        wrapped.save_pretrained(directory)
        return str(directory)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    """Its pad is its eos, as in many checkpoints."""
    return make_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write rows to a file of the suffix's kind; returns its path."""

    def write(name, rows):
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows, indent=1))
        elif path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            tab = path.suffix == ".tsv"
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if tab else ",")
                writer.writeheader()
                writer.writerows(rows)
        return str(path)

    return write
