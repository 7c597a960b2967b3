"""Immutable files named by their sha256, with a fast checksum for every read."""

from __future__ import annotations

import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import xxhash

from smartinit.errors import VerificationError
from smartinit.store import durable
from smartinit.store.regular import open_regular

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from smartinit.store.layout import Layout

PIECE = 4 << 20
"""Bytes under one checksum: pieces are checked by several threads."""
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Blob:
    """One file's content.

    Attributes:
        sha256: its name.
        size: bytes.
        xxh3: of the xxh3-128 digests of its pieces of `PIECE` bytes, one after the other.
    """

    sha256: str
    size: int
    xxh3: str

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {"sha256": self.sha256, "size": self.size, "xxh3": self.xxh3}


class _Digests:
    """Both digests of bytes that pass by."""

    def __init__(self) -> None:
        self._sha, self._size = hashlib.sha256(), 0
        self._piece, self._pieces = xxhash.xxh3_128(), xxhash.xxh3_128()

    def passing(self, chunks: Iterable[Any]) -> Iterator[Any]:
        """The chunks, unchanged."""
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            self._sha.update(view)
            start = 0
            while start < view.nbytes:
                taken = view[start : start + PIECE - self._size % PIECE]
                self._piece.update(taken)
                self._size += taken.nbytes
                start += taken.nbytes
                if self._size % PIECE == 0:
                    self._close_piece()
            yield chunk

    def _close_piece(self) -> None:
        self._pieces.update(self._piece.digest())
        self._piece.reset()

    def blob(self) -> Blob:
        """Of all that has passed."""
        if self._size % PIECE:
            self._close_piece()
        return Blob(self._sha.hexdigest(), self._size, self._pieces.hexdigest())


@dataclass(frozen=True)
class Draft:
    """A blob that is whole and on disk, but not yet under its name."""

    path: Path
    blob: Blob


def draft_blob(layout: Layout, chunks: Iterable[Any]) -> Draft:
    """Write content to a temporary file.

    Raises:
        OSError: it cannot be written; nothing is left.

    Cost: one write and two digests in one pass; memory for one chunk.
    """
    digests, unfinished = _Digests(), layout.new_file()
    durable.make_folder(layout.unfinished)
    durable.write_new(unfinished, digests.passing(chunks))
    return Draft(unfinished, digests.blob())


def settle_blob(layout: Layout, draft: Draft) -> None:
    """Give a draft its name, unless the same content has it already: one that is broken is replaced.

    Raises:
        OSError: it cannot be done; the draft may be left.

    Cost: one read of what is there.
    """
    final = layout.blob(draft.blob.sha256)
    durable.make_folder(final.parent)
    if _is_sound(final, draft.blob) and durable.renew(final):
        durable.flush_folder(final.parent)  # who has put it there may not have come so far
        durable.clear(draft.path)
    else:
        durable.publish(draft.path, final)


def write_blob(layout: Layout, chunks: Iterable[Any]) -> Blob:
    """Store content under its digest, unless it is there.

    Raises:
        OSError: it cannot be written; nothing is left.
    """
    draft = draft_blob(layout, chunks)
    try:
        settle_blob(layout, draft)
    except BaseException:
        durable.clear(draft.path)
        raise
    return draft.blob


def keep_blob(layout: Layout, blob: Blob) -> bool:
    """Whether the blob is there; its time is made new, so that pruning sees that it is wanted again."""
    path = layout.blob(blob.sha256)
    try:
        if path.lstat().st_size != blob.size:  # links are not followed: they are no blobs
            return False
        return durable.renew(path) or path.exists()  # someone else's file is there all the same
    except FileNotFoundError:
        return False


def _is_sound(path: Path, blob: Blob) -> bool:
    """Whether a file has a blob's bytes; whatever cannot be read has not."""
    try:
        with open_regular(path) as file:
            return os.fstat(file.fileno()).st_size == blob.size and checksum(mapped(file, blob.size)) == blob.xxh3
    except (OSError, ValueError):  # VerificationError is one
        return False


def mapped(file: BinaryIO, size: int) -> memoryview:
    """A file's bytes, read when they are looked at.

    Raises:
        OSError, ValueError: it cannot be mapped, or is shorter.
    """
    return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)) if size else memoryview(b"")


def checksum(data: memoryview) -> str:
    """`Blob.xxh3` of bytes at hand. Cost: one read by several threads."""
    pieces = [data[start : start + PIECE] for start in range(0, data.nbytes, PIECE)]
    whole = xxhash.xxh3_128()
    if len(pieces) <= 1:
        for piece in pieces:
            whole.update(xxhash.xxh3_128_digest(piece))
        return whole.hexdigest()
    with ThreadPoolExecutor(THREADS) as threads:
        for digest in threads.map(xxhash.xxh3_128_digest, pieces):
            whole.update(digest)
    return whole.hexdigest()


def read_digests(path: Path) -> Blob:
    """What a file is, from its bytes. Cost: one read, two digests; memory for one step.

    Raises:
        VerificationError: no regular file.
        OSError: it cannot be read.
    """
    digests = _Digests()
    with open_regular(path) as file:
        for chunk in digests.passing(iter(lambda: file.read(1 << 20), b"")):
            del chunk
    return digests.blob()


def check_size(path: Path, blob: Blob, found: int | None = None) -> None:
    """Cheap: sizes only.

    Args:
        path: of the file.
        blob: what it should be.
        found: its size, if that is known.

    Raises:
        VerificationError: another size.
        FileNotFoundError: there is no such blob.
    """
    found = path.lstat().st_size if found is None else found
    if found != blob.size:
        raise VerificationError(f"'{path}' has {found} bytes instead of {blob.size}")
