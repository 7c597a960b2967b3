"""Digests of files that others own, remembered so that each file is read once."""

from __future__ import annotations

import hashlib
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smartinit.errors import ModelError
from smartinit.formats.files import write_file
from smartinit.store.keys import canonical
from smartinit.store.regular import read_small

if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from pathlib import Path

_VERSION = 1
_PIECE = 1 << 22
_LARGEST = 64 << 20  # bytes of a memo; one of a file with 100,000 tensors has 15 MB
_SETTLED = 2 * 10**9  # ns
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileMemo:
    """What was found out about files, in a folder that may be lost at any time.

    A note is found by the file's real path; it holds as long as inode, size and times are those of the file that was
    read. A file in the hub's cache is named by its sha256 and never written to: its note is found by that, so also for
    a copy of the cache, where another file must only have the same size.

    Args:
        folder: of the notes; made when the first one is written.
    """

    folder: Path

    def recall(self, path: Path, kind: str, compute: Callable[[Path], Any], fits: Callable[[Any], bool]) -> Any:  # noqa: ANN401 - JSON
        """``compute(path)``, or what it gave before.

        Args:
            path: a file.
            kind: what is remembered: a word per function.
            compute: its result is a JSON value.
            fits: whether a remembered value can be a result; asked of whatever is read.

        Raises:
            ModelError: the file changed while it was read.
            OSError: it cannot be read. That the note cannot be written is no error.
        """
        real = path.resolve()
        before, now = real.stat(), time.time_ns()
        blob = _blob_name(path, real)
        note = self.folder / f"{hashlib.sha256(canonical([_VERSION, kind, blob or str(real)])).hexdigest()}.json"
        identity: list[Any] = [str(real), *_identity(before)]
        known = _read(note, identity, by_name=blob is not None)
        if known is not None and fits(known):
            return known
        value = compute(real)
        if _identity(real.stat()) != _identity(before):
            raise ModelError(f"'{path}' changed while it was read; wait until nothing writes to it, then try again")
        # Who wrote a moment ago may write again within the same tick of the file system's clock: nothing would show it.
        if min(now - before.st_mtime_ns, now - before.st_ctime_ns) > _SETTLED:
            content = {"file": identity, "value": value}
            sealed = canonical({**content, "sum": hashlib.sha256(canonical(content)).hexdigest()})
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_file(note, sealed)
        return value


def file_sha256(path: Path, memo_dir: Path) -> str:
    """Sha256 of a file's bytes. Cost: reads it once, however often this is called.

    Raises:
        ModelError: it changed while it was read.
        OSError: it cannot be read.
    """
    value: str = FileMemo(memo_dir).recall(path, "bytes", _sha256, is_sha256)
    return value


def is_sha256(value: object) -> bool:
    """Whether this is the text of a sha256."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _sha256(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            whole.update(piece)
    return whole.hexdigest()


def _identity(stat: os.stat_result) -> list[int]:
    # The time of change (ctime) shows a write after which someone set the time of modification back.
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _blob_name(path: Path, real: Path) -> str | None:
    """The sha256 of a large file in the hub's cache, which is its name there; None of any other file."""
    is_blob = real.parent.name == "blobs" and is_sha256(real.name) and "snapshots" in path.absolute().parts
    return real.name if is_blob and path.is_symlink() else None


def _read(note: Path, identity: list[Any], *, by_name: bool) -> Any:  # noqa: ANN401 - JSON
    """The value of a sound note about this very file; None otherwise."""
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        content = json.loads(read_small(note, _LARGEST))
        file, value = content["file"], content["value"]
        seal = hashlib.sha256(canonical({"file": file, "value": value})).hexdigest()
        elsewhere = by_name and file[0] != identity[0] and file[2] == identity[2]
        if content["sum"] == seal and (file == identity or elsewhere):
            return value
    return None
