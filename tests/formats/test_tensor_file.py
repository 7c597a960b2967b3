from __future__ import annotations

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smartinit.errors import ArgumentError, ArtefactError
from smartinit.formats import tensor_file
from smartinit.formats.safetensors_header import read_header
from smartinit.formats.tensor_file import DTYPES, map_tensors, tensor_chunks


def written(tensors, metadata=None) -> bytes:
    return b"".join(bytes(chunk) for chunk in tensor_chunks(tensors, metadata))


def read(path):
    return map_tensors(path, path.stat().st_size)[1]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return (
        alike and one.contiguous().view(torch.uint8).equal(other.contiguous().view(torch.uint8))
        if one.dim()
        else (alike and torch.equal(one, other))
    )


def of_every_dtype() -> dict[str, torch.Tensor]:
    bits = torch.arange(48, dtype=torch.uint8)
    return {f"of {name}": bits.clone().view(dtype) if name != "BOOL" else bits > 7 for dtype, name in DTYPES.items()}


def test_every_dtype_comes_back_and_others_read_the_same(tmp_path):
    tensors = of_every_dtype() | {"0-d": torch.tensor(3.5), "none": torch.zeros(2, 0, 3), "é\n": torch.ones(2)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(written(tensors, {"b": "2", "a": "1"}))
    for found in (read(path), load_file(path)):
        assert found.keys() == tensors.keys()
        assert all(same(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "1", "b": "2"}
    assert {name: entry.shape for name, entry in read_header(path).items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


def test_what_others_write_is_read(tmp_path):
    tensors = of_every_dtype() | {"0-d": torch.tensor(3.5), "none": torch.zeros(2, 0, 3)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read(tmp_path / "x.safetensors")
    assert all(same(found[name], tensor) for name, tensor in tensors.items())


def test_equal_tensors_make_equal_files_in_any_order_and_layout():
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(3, dtype=torch.int8), "c": torch.zeros(4).double()}
    strange = {
        "c": torch.zeros(8).double()[::2],
        "b": torch.arange(6.0).reshape(2, 3).T.contiguous().T,
        "a": torch.nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False),
    }
    assert written(tensors) == written(strange)
    conjugate = torch.tensor([1 + 2j]).conj()
    assert written({"a": conjugate}) == written({"a": torch.tensor([1 - 2j])})


def test_large_tensors_pass_in_pieces():
    chunks = list(tensor_chunks({"a": torch.zeros(5 << 20, dtype=torch.uint8)}))
    assert [memoryview(chunk).nbytes for chunk in chunks[1:]] == [4 << 20, 1 << 20]


def test_a_mapped_tensor_can_be_written_to_and_changes_neither_file_nor_others(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(written({"a": torch.ones(5), "b": torch.ones(5)}))
    before = path.read_bytes()
    found = read(path)
    weight = found["a"].requires_grad_()
    loss = (weight * weight).sum()
    found["b"].zero_()  # another tensor: what autograd has kept of the first is not stale
    loss.backward()
    assert path.read_bytes() == before
    assert read(path)["b"].sum() == 5


def test_tensors_that_do_not_lie_at_multiples_of_their_width(tmp_path):
    header = json.dumps({"a": {"dtype": "F64", "shape": [2], "data_offsets": [0, 16]}}).encode()
    for padding in range(8):
        text = header + b" " * padding
        path = tmp_path / f"{padding}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<2d", 1.5, -2))
        assert read(path)["a"].tolist() == [1.5, -2]


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": [1, 2]},
        {1: torch.ones(1)},
        {"__metadata__": torch.ones(1)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.empty(2, device="meta")},
        {"a": torch.ones(2, dtype=torch.complex128)},
        {"\x1b[2J": None},
    ],
)
def test_what_the_format_has_no_form_for(tensors):
    with pytest.raises(ArgumentError) as told:
        written(tensors)
    assert str(told.value).isprintable()


def test_more_names_than_would_be_read_again(monkeypatch):
    monkeypatch.setattr(tensor_file, "MAX_HEADER", 1000)
    with pytest.raises(ArgumentError, match="store fewer"):
        written({f"tensor {n}": torch.ones(1) for n in range(100)})


@given(st.data())
def test_a_file_of_which_a_byte_of_the_header_was_changed_is_refused_or_read_as_it_says(tmp_path_factory, data):
    content = bytearray(written({"a": torch.arange(4.0), "b": torch.ones(2, 2).half(), "c": torch.ones(3).char()}))
    (length,) = struct.unpack("<Q", content[:8])
    content[data.draw(st.integers(0, 7 + length))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("x") / "x.safetensors"
    path.write_bytes(content)
    found, told = None, ""
    try:
        found = read(path)
    except ArtefactError as error:
        told = str(error)
    assert told.isprintable()
    if found is None:
        return
    theirs = load_file(path)
    assert found.keys() == theirs.keys()
    assert all(same(found[name], tensor) for name, tensor in theirs.items())
