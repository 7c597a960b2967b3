from __future__ import annotations

import os

import pytest
import torch

from smartinit.errors import ArgumentError
from smartinit.store import Store, blobs, checked


@pytest.fixture
def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "large": torch.randn(1100, 1000, generator=generator),
        "bytes": torch.randint(0, 255, (4_500_001,), generator=generator, dtype=torch.uint8),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0, 3),
        "half": torch.randn(7, 3, generator=generator).bfloat16(),
        "bool": torch.ones(3, dtype=torch.bool),
        **{f"small.{n}": torch.full((3,), float(n)) for n in range(2000)},
    }


@pytest.fixture
def store(tmp_path, tensors):
    store = Store(tmp_path / "cache")
    store.put("key", tensors)
    return store


def equal(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], tensor) for name, tensor in other.items())


def empty(tensors):
    return {name: torch.empty_like(tensor) for name, tensor in tensors.items()}


@pytest.fixture(params=["preadv", "read"])
def _reading(request, monkeypatch):
    if request.param == "read":
        monkeypatch.delattr(os, "preadv", raising=False)
    elif not hasattr(os, "preadv"):
        pytest.skip("this system has none")


@pytest.mark.usefixtures("_reading")
def test_memory_of_ones_own_has_the_same_tensors(store, tensors):
    own = store.get("key", own=True)
    assert equal(own.tensors, tensors)
    assert own.content("tensors.safetensors") == store.get("key").content("tensors.safetensors")
    own.tensors["large"].zero_()
    assert equal(store.get("key").tensors, tensors)


@pytest.mark.usefixtures("_reading")
def test_tensors_are_read_into_others(store, tensors):
    into = empty(tensors)
    entry = store.get("key", own=into)
    assert equal(into, tensors)
    assert all(entry.tensors[name] is tensor for name, tensor in into.items())


@pytest.mark.parametrize("own", [True, "into"])
@pytest.mark.parametrize("place", [3, 5_000, -1, 4_200_000, 4 << 20])
def test_a_changed_byte_is_found_while_it_is_read(store, tensors, own, place):
    path = store.local.layout.blob(store.peek("key").blobs["tensors.safetensors"].sha256)
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.chmod(0o644)
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="quarantine"):
        assert store.get("key", own=empty(tensors) if own == "into" else own) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda into: into.pop("large"),
        lambda into: into.update(more=torch.ones(1)),
        lambda into: into.update(large=torch.empty(1000, 1100)),
        lambda into: into.update(large=torch.empty(1000, 1100).T),
        lambda into: into.update(large=torch.empty(1100, 1000, dtype=torch.int32)),
        lambda into: into.update(large=torch.empty(1100, 1000, device="meta")),
    ],
)
def test_other_tensors_than_the_entrys_are_the_callers_mistake(store, tensors, change):
    into = {name: torch.full_like(tensor, 1) for name, tensor in tensors.items()}
    change(into)
    with pytest.raises(ArgumentError):
        store.get("key", own=into)
    assert all(bool((into[name] == 1).all()) for name in into.keys() - {"large"})
    assert equal(store.get("key").tensors, tensors)


def test_pieces_are_those_of_the_checksum(monkeypatch, tmp_path):
    for piece, step in ((1 << 20, 1 << 20), (1 << 20, 1 << 16), (1 << 21, 1 << 20)):
        monkeypatch.setattr(blobs, "PIECE", piece)
        monkeypatch.setattr(checked, "PIECE", piece)
        monkeypatch.setattr(checked, "_STEP", step)
        for size in (0, 1, piece - 1, piece, piece + 1, 3 * piece + 17):
            path = tmp_path / "x"
            path.write_bytes(os.urandom(size))
            content = path.read_bytes()
            blob = blobs.Blob("", size, blobs.checksum(memoryview(content)))
            for cuts in ([size], [1] * min(size, 1500) + [size - min(size, 1500)]):
                buffers = [memoryview(bytearray(cut)) for cut in cuts]
                with path.open("rb", buffering=0) as file:
                    checked._read_checked(file, buffers, path, blob)
                assert b"".join(buffers) == content
