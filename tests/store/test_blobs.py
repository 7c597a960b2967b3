"""Blobs: two digests in one pass, pieces under one checksum, one file per content."""

from __future__ import annotations

import hashlib
import os
import random

import pytest
import xxhash
from faulty import Steps, watched

from smartinit.errors import VerificationError
from smartinit.store import blobs
from smartinit.store.blobs import PIECE, check_size, checksum, draft_blob, keep_blob, settle_blob, write_blob
from smartinit.store.layout import Layout

SIZES = [0, 1, 1000, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 2 * PIECE + 17]


@pytest.fixture
def layout(ram):
    return Layout(ram / "store")


def slow_checksum(data):
    """Of the digests of the pieces; of the piece itself there is none without bytes."""
    pieces = [data[start : start + PIECE] for start in range(0, len(data), PIECE)]
    return xxhash.xxh3_128(b"".join(xxhash.xxh3_128(piece).digest() for piece in pieces)).hexdigest()


@pytest.mark.parametrize("size", SIZES)
def test_digests_are_those_of_the_bytes_however_they_arrive(layout, size, seed):
    random_ = random.Random(seed)
    data = random_.randbytes(size)
    cuts = sorted(random_.choices(range(size + 1), k=7))
    chunks = [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, size], strict=True)]
    for given in ([data], chunks, [memoryview(chunk) for chunk in chunks], [bytearray(data)]):
        blob = write_blob(layout, given)
        assert blob.size == size
        assert blob.sha256 == hashlib.sha256(data).hexdigest()
        assert blob.xxh3 == checksum(memoryview(data))
        assert layout.blob(blob.sha256).read_bytes() == data
    if size:
        reference = slow_checksum(data)
        whole = xxhash.xxh3_128(data).hexdigest()
        assert blob.xxh3 in (reference, whole)


def test_chunks_may_be_of_any_type(layout):
    import numpy as np

    numbers = np.arange(1000, dtype=np.float64)
    blob = write_blob(layout, [numbers, memoryview(numbers)[10:20]])
    assert layout.blob(blob.sha256).read_bytes() == numbers.tobytes() + numbers[10:20].tobytes()


def test_the_same_content_is_one_file(layout):
    first = write_blob(layout, [b"abc"])
    inode = layout.blob(first.sha256).stat().st_ino
    os.utime(layout.blob(first.sha256), (1, 1))
    assert write_blob(layout, [b"a", b"bc"]) == first
    state = layout.blob(first.sha256).stat()
    assert state.st_ino == inode
    assert state.st_mtime > 1, "it is wanted again"
    assert list(layout.unfinished.iterdir()) == []


@pytest.mark.parametrize("broken", [b"", b"ab", b"abd", b"abcd"])
def test_what_is_broken_is_replaced(layout, broken):
    blob = write_blob(layout, [b"abc"])
    path = layout.blob(blob.sha256)
    path.chmod(0o644)
    path.write_bytes(broken)
    write_blob(layout, [b"abc"])
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o222 == 0


def test_what_cannot_be_touched_is_replaced(layout):
    """A colleague's file: its time cannot be made new, so pruning would not see that it is wanted."""
    path = layout.blob(write_blob(layout, [b"abc"]).sha256)
    os.utime(path, (1, 1))

    def before(name, _args):
        if name == "utime":
            raise PermissionError(1, "not yours")

    with watched(Steps(before)):
        write_blob(layout, [b"abc"])
    assert path.stat().st_mtime > 1


def test_keep_says_whether_it_is_there(layout):
    blob = write_blob(layout, [b"abc"])
    assert keep_blob(layout, blob)
    layout.blob(blob.sha256).unlink()
    assert not keep_blob(layout, blob)
    layout.blob(blob.sha256).write_bytes(b"longer")
    assert not keep_blob(layout, blob)


def test_a_draft_is_not_under_its_name(layout):
    draft = draft_blob(layout, [b"abc"])
    assert draft.path.read_bytes() == b"abc"
    assert not layout.blob(draft.blob.sha256).exists()
    settle_blob(layout, draft)
    assert not draft.path.exists()
    assert layout.blob(draft.blob.sha256).read_bytes() == b"abc"


def test_an_error_in_the_source_leaves_nothing(layout):
    def chunks():
        yield b"abc"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_blob(layout, chunks())
    assert list(layout.unfinished.iterdir()) == []


def test_sizes(layout):
    blob = write_blob(layout, [b"abc"])
    check_size(layout.blob(blob.sha256), blob)
    layout.blob(blob.sha256).chmod(0o644)
    layout.blob(blob.sha256).write_bytes(b"ab")
    with pytest.raises(VerificationError, match="has 2 bytes instead of 3"):
        check_size(layout.blob(blob.sha256), blob)


def test_one_thread_or_many_find_the_same(monkeypatch, seed):
    data = memoryview(random.Random(seed).randbytes(3 * PIECE + 5))
    many = checksum(data)
    monkeypatch.setattr(blobs, "THREADS", 1)
    assert checksum(data) == many
