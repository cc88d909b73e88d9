"""The standard library as text: whole documents on one side, windows that predict what follows."""

import sys
import sysconfig
import time

import numpy as np
import pytest

from vlora_jax.data import pystdlib
from vlora_jax.errors import DataError

WORDS = np.random.default_rng(0).integers(97, 123, (60, 40), np.uint8)
LIBRARY = {f"{index}.py": row[: 10 + index % 30].tobytes() for index, row in enumerate(WORDS)}
COPIES = {f"copy/{name}": text for name, text in LIBRARY.items()}


@pytest.fixture
def library(monkeypatch):
    """A small library, which a test may change."""
    documents = dict(LIBRARY)
    monkeypatch.setattr(pystdlib, "documents", lambda part: documents)
    return documents


def documents_in(source: pystdlib.Windows) -> list[bytes]:
    return source.text.tobytes().split(b"\0")[:-1]


def test_a_document_is_on_one_side_whatever_its_names(library):
    library |= COPIES
    data = pystdlib.load(length=5)
    train, held_out = documents_in(data.train), documents_in(data.held_out)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(library.values())
    assert 0 < len(held_out) < len(train)


def test_training_windows_follow_each_other_and_predict_the_next_token(library):
    train = pystdlib.load(length=7).train
    used = len(train) * 7
    assert len(train.text) - 7 <= used < len(train.text)
    tokens, targets = (np.concatenate([train[i][name] for i in range(len(train))]) for name in ("tokens", "targets"))
    np.testing.assert_array_equal(tokens, train.text[:used])
    np.testing.assert_array_equal(targets, train.text[1 : used + 1])
    assert train[2]["mask"].tolist() == [True] * 7
    assert train[2]["id"] == 2


def test_held_out_windows_are_spread_and_predict_what_the_text_goes_on_with(library):
    library |= {f"more/{name}": text[::-1] for name, text in LIBRARY.items()}
    every = pystdlib.load(length=5).held_out
    few = pystdlib.load(length=5, held_out_windows=9).held_out
    assert len(few) == 9 < len(every)
    known = [(every[i]["tokens"].tolist(), every[i]["targets"].tolist()) for i in range(len(every))]
    places = [known.index((few[i]["tokens"].tolist(), few[i]["targets"].tolist())) for i in range(9)]
    assert (places[0], places[-1]) == (0, len(every) - 1)
    gaps = np.diff(places)
    assert gaps.min() > 0
    assert gaps.max() - gaps.min() <= 1


def test_the_fingerprint_is_that_of_the_contents(library):
    before = pystdlib.load(length=5).fingerprint
    assert pystdlib.load(length=6).fingerprint == before
    name = next(name for name, text in LIBRARY.items() if text in documents_in(pystdlib.load(length=5).held_out))
    library[name] = library[name][:-1] + b"!"
    assert pystdlib.load(length=5).fingerprint != before


@pytest.mark.parametrize(("length", "what"), [(100_000, "training"), (400, "held-out")])
def test_windows_that_are_too_long_are_refused(library, length, what):
    with pytest.raises(DataError, match=rf"pystdlib/code has \d+ {what} tokens, too few for one window of {length}"):
        pystdlib.load(length=length)


def test_code_is_every_source_file_of_the_library_but_tests_and_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match=f"no Python source files below {tmp_path}"):
        pystdlib.documents("code")
    kept = ["abc.py", "json/decoder.py"]
    for name in [*kept, "json/tests/a.py", "test/b.py", "site-packages/c.py", "data.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    assert pystdlib.documents("code") == {name: f"# {name}".encode() for name in kept}


def test_prose_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"this Python has no pydoc_data\.topics, the prose of pystdlib; use part=code"):
        pystdlib.load("prose")


def test_the_real_library_loads_in_seconds_and_its_parts_differ():
    began = time.monotonic()
    code, prose = (pystdlib.load(part) for part in ("code", "prose"))
    assert time.monotonic() - began < 20
    assert code.fingerprint != prose.fingerprint
    sizes = {"pystdlib/code": (10_000, 256), "pystdlib/prose": (1_000, 100)}
    every = []
    for data in (code, prose):
        least_train, least_held_out = sizes[data.name]
        assert len(data.train) >= least_train
        assert len(data.held_out) >= least_held_out
        assert data.train[0]["tokens"].shape == data.held_out[99]["targets"].shape == (256,)
        train, held_out = set(documents_in(data.train)), set(documents_in(data.held_out))
        assert not train & held_out
        assert data.facts == {"vocabulary": 256}
        every.append(train | held_out)
    assert not every[0] & every[1]
