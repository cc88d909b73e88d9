"""Damaged files of PEFT adapters: each kind is an error of its own."""

import json
import struct

import pytest
from peft_tiny import Q, read, write

from vlora_jax.errors import AdapterFileError
from vlora_jax.hub.peft_file import CONFIG, TENSORS

FIRST = f"{Q.format(0)}.lora_A.weight"


def raw(folder):
    return (folder / TENSORS).read_bytes()


def test_every_truncation_and_every_flipped_byte_is_noticed(tmp_path):
    """By lengths, or by the hash in the header; of files that PEFT wrote, without a hash, the values may differ."""
    folder = write(tmp_path)
    whole = raw(folder)
    for size in [0, 1, 7, 8, 9, *range(16, len(whole), 61), len(whole) - 1]:
        (folder / TENSORS).write_bytes(whole[:size])
        with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors"):
            read(folder)
    for place in [*range(0, len(whole), 37), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        (folder / TENSORS).write_bytes(bytes(flipped))
        with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors"):
            read(folder)


def edited(folder, change):
    """The header of a file as `change` makes it, without its hash."""
    data = raw(folder)
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    text = change(header)
    text = (text if isinstance(text, str) else json.dumps(header)).encode()
    (folder / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


HEADERS = {
    "a key twice": (lambda h: json.dumps(h)[:-1] + f', "{FIRST}": {json.dumps(h[FIRST])}}}', "has the key .* twice"),
    "a null byte": (lambda h: h.update({"\0": h.pop(FIRST)}), "is empty or has a null byte"),
    "an integer dtype": (lambda h: h[FIRST].update(dtype="I32"), "lora_A.weight is I32; F32, F16, BF16 are possible"),
    "float64": (lambda h: h[FIRST].update(dtype="F64"), "is F64"),
    "complex": (lambda h: h[FIRST].update(dtype="C64"), "is C64"),
    "overlap": (lambda h: h[FIRST].update(data_offsets=[64, 128]), "needs 64 bytes, the file has 0"),
    "a negative side": (lambda h: h[FIRST].update(shape=[-2, -8]), "has the shape"),
    "another shape": (lambda h: h[FIRST].update(shape=[2, 9]), "needs 72 bytes, the file has 64"),
    "no JSON": (lambda h: "{ ", "its header is damaged"),
    "no object": (lambda h: "[]", "its header is damaged"),
    "no entry": (lambda h: h.update({FIRST: 3}), "its header is damaged"),
}


@pytest.mark.parametrize(("change", "message"), HEADERS.values(), ids=HEADERS)
def test_impossible_headers_are_refused(tmp_path, change, message):
    edited(write(tmp_path), change)
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path)


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path):
    (write(tmp_path) / TENSORS).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(AdapterFileError, match=r"its header would have 1099511627776"):
        read(tmp_path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    folder = write(tmp_path)
    (folder / TENSORS).write_bytes(raw(folder) + b"\0")
    with pytest.raises(AdapterFileError, match="its header says"):
        read(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"peft_type": "LORA",\n "r": }', "line 2, column 7"),
        (b"", "line 1, column 1"),
        (b"[]", "must hold an object, not list"),
        (b'{"r": 1, "r": 2}', "has the key 'r' twice"),
        (b'"\xff"', "is not UTF-8"),
    ],
)
def test_configs_that_are_no_json_are_refused(tmp_path, text, message):
    (write(tmp_path) / CONFIG).write_bytes(text)
    with pytest.raises(AdapterFileError, match=message):
        read(tmp_path)


def test_what_is_missing_is_named_and_pickles_are_never_opened(tmp_path):
    with pytest.raises(AdapterFileError, match=r"adapter_config.json does not exist"):
        read(tmp_path)
    write(tmp_path / "other")
    with pytest.raises(AdapterFileError, match="does not exist; adapters in it: other"):
        read(tmp_path)
    folder = write(tmp_path / "other")
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match=r"adapter_model.bin is a pickle and is never opened"):
        read(folder)
