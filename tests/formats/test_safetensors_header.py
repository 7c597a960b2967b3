from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from smartinit.formats.safetensors_header import read_header


def write(path, header, content=b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


def entry(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def test_entries_say_where_the_bytes_are(tmp_path):
    tensors = {"b": torch.arange(6, dtype=torch.int16).reshape(2, 3), "a": torch.zeros(0, 4), "c": torch.ones(())}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    entries = read_header(path)
    assert {name: entry.shape for name, entry in entries.items()} == {"a": (0, 4), "b": (2, 3), "c": ()}
    content = path.read_bytes()
    for name, tensor in tensors.items():
        assert content[entries[name].start : entries[name].stop] == tensor.numpy().tobytes()


HOSTILE = {
    "out of the file": {"a": entry(0, 9)},
    "one over another": {"a": entry(0, 4), "b": entry(2, 4)},
    "a gap": {"a": entry(0, 2), "b": entry(3, 4)},
    "not from the start": {"a": entry(1, 4)},
    "backwards": {"a": entry(4, 0, shape=[0])},
    "negative": {"a": entry(-4, 0, shape=[4])},
    "too few bytes for the shape": {"a": entry(0, 4, "F32", [2])},
    "a negative shape": {"a": entry(0, 4, "U8", [-2, -2])},
    "true is no number": {"a": entry(0, 1, "U8", [True]), "b": entry(1, 4)},
    "fractions": {"a": entry(0, 4, "U8", [4.0])},
    "a list": [1, 2],
    "a number": 3,
    "an entry that is none": {"a": 3},
    "a dtype that is none": {"a": entry(0, 4, ["U8"])},
    "nested too deeply": b'{"a":' * 100_000,
    "a name that stands twice": b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
    b'"a":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}}',
    "no text": b"\xff\xfe{}",
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_headers_that_lie_are_refused(tmp_path, header):
    path = tmp_path / "x.safetensors"
    write(path, header, b"1234")
    with pytest.raises(ValueError, match=r"no safetensors file|bytes instead of"):
        read_header(path)


def test_a_longer_header_than_the_format_allows_is_not_read(tmp_path):
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000))
        file.truncate(200_000_008)  # sparse: nothing is written
    with pytest.raises(ValueError, match="at most 100000000"):
        read_header(path)
