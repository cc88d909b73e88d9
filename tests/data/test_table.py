"""Rows from files: the same from every kind of file, read anew, and every damage told in one line."""

import numpy as np
import pytest

from vlora_jax.data.table import read, read_file, spread
from vlora_jax.errors import DataError

ROWS = [{"question": f"how\nmany, {n}?", "answer": f'"{n}" \u2028 über'} for n in range(5)]


def refused(path, match, **options):
    with pytest.raises(DataError, match=match) as caught:
        read(str(path), None, options.pop("split", "train"), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl", "csv"])
def test_every_kind_of_file_holds_the_same_rows(write, suffix):
    table = read(write(f"rows.{suffix}", ROWS), None, "train")
    assert len(table) == 5
    assert [dict(zip(("question", "answer"), pair, strict=True)) for pair in
            zip(table.values("question"), table.values("answer"), strict=True)] == ROWS  # fmt: skip


def test_quotes_in_tsv_are_text(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text('sentence\tlabel\n" one\t1\nit \'s "two\t0\r\n')
    table = read(str(path), None, "train")
    assert (table.values("sentence"), table.values("label")) == (['" one', "it 's \"two"], ["1", "0"])


def test_a_file_without_a_line_of_names_gets_them(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("good\t1\nbad\t0\n")
    table = read(str(path), None, "train", header=["sentence", "label"])
    assert table.values("sentence") == ["good", "bad"]
    with pytest.raises(DataError, match=r"no column 'sentence'.*data\.header"):
        read(str(path), None, "train").column("sentence")


def test_several_files_are_one_table_and_a_directory_has_a_file_a_split(write, tmp_path):
    parts = [write("train-0.jsonl", ROWS[:2]), write("train-1.jsonl", ROWS[2:])]
    write("test.jsonl", ROWS[:1])
    write("training.jsonl", ROWS[:1])
    for table in (read(parts, None, "train"), read(str(tmp_path), None, "train")):
        assert table.values("answer") == [row["answer"] for row in ROWS]
    assert len(read(str(tmp_path), None, "test")) == 1
    refused(tmp_path, "no file for split 'dev'; it has test.jsonl, train-0.jsonl", split="dev")


def test_a_changed_file_is_read_anew(write):
    path = write("rows.jsonl", ROWS)
    read(path, None, "train")
    write("rows.jsonl", ROWS[:2])
    assert len(read(path, None, "train")) == 2


def test_a_set_that_datasets_saved_is_read_with_its_classes(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": made}).save_to_disk(tmp_path / "saved")
    table = read(str(tmp_path / "saved"), None, "train")
    assert (table.values("text"), table.values("label")) == (["a", "b"], [1, 0])
    assert table.labels == {"label": ["no", "yes"]}
    refused(tmp_path / "saved", "no split 'test'; it has train", split="test")


def test_without_a_network_a_hub_name_fails_in_one_line_and_at_once(monkeypatch, unchecked):
    from vlora_jax.data import network

    monkeypatch.setattr(network, "reachable", lambda endpoint: False)
    refused("nobody/nothing-here", "no file here, and from the hub.*give files")


def test_a_megabyte_in_one_field_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("text\n" + "x" * 1_000_000 + "\n")
    assert len(read(str(path), None, "train").values("text")[0]) == 1_000_000


def test_limited_rows_are_evenly_spread(write):
    table = read(write("rows.jsonl", [{"text": str(n)} for n in range(11)]), None, "train")
    assert spread(table, 3).values("text") == ["0", "5", "10"]
    assert spread(table, 3).where(1).endswith("row 6")
    assert spread(table, 99) is spread(table, None) is table


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("empty.jsonl", b"", "empty.jsonl is empty"),
        ("blank.csv", b" \n\n", "blank.csv is empty"),
        ("names.csv", b"text,label\n", "names.csv has no rows"),
        ("none.json", b"[]", "none.json has no rows"),
        ("latin.csv", "text\nok\nüber\n".encode("latin-1"), "latin.csv, line 3: byte 8 is not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl, line 2 is not JSON"),
        ("broken.json", b'[{"text": "a"}, ', "broken.json is not JSON"),
        ("list.jsonl", b'{"text": "a"}\n["a"]\n', "list.jsonl, row 2 is list, not an object"),
        ("twice.csv", b"text,text\na,b\n", "twice.csv has two columns 'text'"),
        ("twice.jsonl", b'{"text": "a", "text": "b"}\n', "twice.jsonl has two columns 'text'"),
        ("short.csv", b"text,label\na,1\nb\n", "short.csv, row 2 has 1 fields, but there are 2 columns"),
        ("quote.csv", b'text\n"a\n', "quote.csv, line 2 is not csv"),
        ("torn.parquet", b"PAR1 and no more", "torn.parquet is no whole parquet file"),
        ("rows.xlsx", b"?", "rows.xlsx is none of .parquet"),
    ],
)  # fmt: skip
def test_damage_is_told_in_one_line(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name, match)


def test_missing_files_columns_and_needless_headers_are_refused(write, tmp_path):
    refused(tmp_path / "nowhere.csv", "nowhere.csv cannot be read: No such file")
    path = write("rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no column 'awnser'; nearest: 'answer' of 'question', 'answer'"):
        read(path, None, "train").column("awnser")
    refused(path, "names its columns itself", header=["a", "b"])
    other = write("other.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match=r"other.jsonl has columns \['text'\], but .*rows.jsonl has \['answer'"):
        read([path, other], None, "train")


def test_parquet_cells_are_made_when_asked_for(write, tmp_path):
    cells = read_file(tmp_path / write("rows.parquet", ROWS))["answer"]
    assert [cells[np.int64(place)] for place in range(len(cells))] == [row["answer"] for row in ROWS]
