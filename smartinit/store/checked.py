"""Tensors of a blob in memory of one's own: checked while they are read, so that nothing passes by twice."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import xxhash

from smartinit.errors import VerificationError
from smartinit.store.blobs import PIECE, THREADS, check_size, mapped
from smartinit.store.regular import open_regular

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    import torch

    from smartinit.store.blobs import Blob

_STEP = 1 << 20  # bytes that are read and then digested while the processor's cache still has them
_MOST_BUFFERS = 512  # that one call of the system fills
_SEEKING = threading.Lock()


def own_tensors(
    path: Path, blob: Blob, into: Mapping[str, torch.Tensor] | None = None
) -> tuple[memoryview, dict[str, torch.Tensor]]:
    """A blob's bytes and the tensors in them, which lie in memory of one's own.

    Args:
        path: of the blob.
        blob: what it should be.
        into: tensors of the same names, shapes and dtypes, on the CPU and contiguous, into which its tensors are read;
            after a VerificationError what they hold is of no use.

    Cost: one read, no more than mapping and copying the tensors would take without a check.

    Raises:
        VerificationError: other bytes than the blob's, or no regular file.
        ArtefactError: no safetensors file.
        ArgumentError: other tensors than those of ``into``, which is as it was.
        OSError: it cannot be read.
    """
    from smartinit.formats.tensor_file import places_for

    with open_regular(path) as file:
        check_size(path, blob, os.fstat(file.fileno()).st_size)
        head, places, tensors = places_for(file.read, blob.size, str(path), into)
        _read_checked(file, [memoryview(bytearray(head)), *places], path, blob)
        return mapped(file, blob.size), tensors


def _read_checked(file: BinaryIO, buffers: Sequence[memoryview], path: Path, blob: Blob) -> None:
    """Fill buffers with a file from its start; see `smartinit.store.blobs.Blob.xxh3` for what is checked.

    Raises:
        VerificationError: other bytes than the blob's.
    """
    pieces, descriptor = _pieces(buffers), file.fileno()

    def read(number: int) -> bytes:
        digest, place = xxhash.xxh3_128(), number * PIECE
        for step in pieces[number]:
            place += _fill(descriptor, step, place)
            for part in step:
                digest.update(part)
        return digest.digest()

    whole = xxhash.xxh3_128()
    if len(pieces) <= 1:
        for number in range(len(pieces)):
            whole.update(read(number))
    else:
        with ThreadPoolExecutor(THREADS) as threads:
            for found in threads.map(read, range(len(pieces))):
                whole.update(found)
    if whole.hexdigest() != blob.xxh3:
        raise VerificationError(f"'{path}' was changed: its checksum differs")


def _pieces(buffers: Sequence[memoryview]) -> list[list[list[memoryview]]]:
    """Buffers that follow each other, cut into pieces of `PIECE` bytes, and these into steps of at most `_STEP`."""
    pieces: list[list[list[memoryview]]] = []
    place = 0
    for buffer in buffers:
        start = 0
        while start < buffer.nbytes:
            if place % PIECE == 0:
                pieces.append([])
            if place % _STEP == 0 or len(pieces[-1][-1]) == _MOST_BUFFERS:
                pieces[-1].append([])
            part = buffer[start : start + _STEP - place % _STEP]
            pieces[-1][-1].append(part)
            start, place = start + part.nbytes, place + part.nbytes
    return pieces


def _fill(descriptor: int, buffers: list[memoryview], place: int) -> int:
    """Read what lies there into the buffers: how many bytes they have.

    Raises:
        VerificationError: the file ends before.
    """
    done, rest = 0, buffers
    while rest:
        got = _read_at(descriptor, rest, place + done)
        if not got:
            raise VerificationError("a file became shorter while it was read")
        done += got
        while rest and got >= rest[0].nbytes:
            got -= rest[0].nbytes
            rest = rest[1:]
        if got:
            rest = [rest[0][got:], *rest[1:]]
    return done


def _read_at(descriptor: int, buffers: list[memoryview], place: int) -> int:
    """How many bytes could be read from there into the first buffers."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, buffers, place)
    with _SEEKING:  # Windows
        os.lseek(descriptor, place, os.SEEK_SET)
        content = os.read(descriptor, buffers[0].nbytes)
    buffers[0][: len(content)] = content
    return len(content)
