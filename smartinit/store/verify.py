"""Reading everything that is stored, and checking it against its sha256."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smartinit.errors import StoreError, VerificationError
from smartinit.store import durable
from smartinit.store.blobs import read_digests
from smartinit.store.census import GONE, read_manifest
from smartinit.store.keys import check_name
from smartinit.store.pins import refuse_read_only
from smartinit.store.regular import read_small
from smartinit.store.scanning import scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from smartinit.store.blobs import Blob
    from smartinit.store.layout import Layout
    from smartinit.store.local import LocalStore
    from smartinit.store.manifest import Manifest

MANIFEST, BLOB, MISSING, FILE, MARK, UNREADABLE = "manifest", "blob", "missing", "file", "mark", "unreadable"
_THREADS = min(8, os.cpu_count() or 1)
_AHEAD = 4 * _THREADS  # blobs that wait for a thread: a bound on memory
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")
_SCHEMA_BYTES = 1 << 16


class Unsound(NamedTuple):
    """Something that does not hold.

    Attributes:
        name: key of the entry, or path of the file below the store.
        what: ``"manifest"`` (changed), ``"blob"`` (changed), ``"missing"`` (an entry without one of its blobs),
            ``"file"`` (something that no store has), ``"mark"`` (an entry that its tag does not lead to), or
            ``"unreadable"``.
        sentence: for people.
    """

    name: str
    what: str
    sentence: str


def verify(local: LocalStore, *, repair: bool = False, progress: Callable[[int], None] | None = None) -> list[Unsound]:
    """Read every blob and every manifest; everything that is not what it should be.

    Args:
        local: the store; others may use it meanwhile.
        repair: put broken files, and entries that have lost a blob, into quarantine, so that they are computed again;
            make lost marks again.
        progress: called with the number of bytes that were read since the last call.

    Raises:
        StoreError: ``repair`` in a store that cannot be written.

    Cost: one read of the store by several threads; memory of about 250 bytes for a blob.
    """
    if repair:
        refuse_read_only(local)
    try:
        return _Verification(local.layout, repair=repair, progress=progress).run()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot verify '{local.layout.root}': {error.strerror or error}") from error


class _Verification:
    """One verification."""

    def __init__(self, layout: Layout, *, repair: bool, progress: Callable[[int], None] | None) -> None:
        self.layout, self.repair, self.progress = layout, repair, progress
        self.found: list[Unsound] = []
        self.sound: dict[bytes, bytes] = {}
        self.unreadable: set[bytes] = set()

    def run(self) -> list[Unsound]:
        """See `verify`."""
        self._schema()
        with ThreadPoolExecutor(_THREADS) as threads:
            waiting: deque[tuple[Path, tuple[int, int] | None, Future[Blob]]] = deque()
            try:
                for path in self._blob_files():
                    waiting.append((path, _which(path), threads.submit(read_digests, path)))
                    if len(waiting) > _AHEAD:
                        self._blob(*waiting.popleft())
                while waiting:
                    self._blob(*waiting.popleft())
            finally:
                for _, _, future in waiting:
                    future.cancel()
        suspects = [item for item in self._manifest_files(self.layout.entries) if not self._entry(*item, first=True)]
        for path, key in suspects:  # a second look: pruning may have had a blob in hand, and put it back
            self._entry(path, key, first=False)
        for path, key in self._manifest_files(self.layout.aside):
            self._manifest(path, key)
        return self.found

    def _schema(self) -> None:
        path = self.layout.schema
        try:
            if type(json.loads(read_small(path, _SCHEMA_BYTES))["schema"]) is int:
                return
        except OSError as error:
            self._unreadable(path, error)
            return
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        self._report(path, FILE, "does not say which schema the store has")
        self._put_aside(path, _which(path))

    def _blob_files(self) -> Iterator[Path]:
        for folder in scan(self.layout.blobs):
            path = Path(folder.path)
            if not folder.is_dir(follow_symlinks=False):
                self._strange(path, "lies where only folders of blobs are")
                continue
            for item in scan(path):
                if _BLOB_NAME.fullmatch(item.name) and item.name.startswith(folder.name):
                    yield path / item.name
                else:
                    self._strange(path / item.name, "has no name of a blob, or lies in the wrong folder")

    def _blob(self, path: Path, which: tuple[int, int] | None, reading: Future[Blob]) -> None:
        try:
            blob = reading.result()
        except VerificationError as error:
            self._strange(path, str(error), which)
            return
        except OSError as error:
            if self._unreadable(path, error):
                self.unreadable.add(bytes.fromhex(path.name))
            return
        if self.progress is not None:
            self.progress(blob.size)
        if blob.sha256 == path.name:
            self.sound[bytes.fromhex(blob.sha256)] = _claims(blob)
        else:
            self._report(path, BLOB, f"was changed: its sha256 is {blob.sha256[:12]}…")
            self._put_aside(path, which)

    def _manifest_files(self, folder: Path) -> Iterator[tuple[Path, str]]:
        for item in scan(folder):
            path = folder / item.name
            key = item.name.removesuffix(".json")
            try:
                key = check_name(key if folder == self.layout.entries else key.partition(".")[0])
            except ValueError:
                key = ""
            if key and item.name.endswith(".json"):
                yield path, key
            else:
                self._strange(path, "has no name of a manifest")

    def _manifest(self, path: Path, key: str) -> Manifest | None:
        which = _which(path)
        try:
            return read_manifest(path, key)[0]
        except VerificationError as error:
            self.found.append(Unsound(self._name(path), MANIFEST, str(error)))
            self._put_aside(path, which)
        except OSError as error:
            if isinstance(error, StoreError):
                self.found.append(Unsound(self._name(path), UNREADABLE, str(error)))
            else:
                self._unreadable(path, error)
        return None

    def _entry(self, path: Path, key: str, *, first: bool) -> bool:
        """Look at an entry; False if it should be looked at again."""
        which = _which(path)
        manifest = self._manifest(path, key)
        if manifest is None:
            return True
        for name, blob in manifest.blobs.items():
            problem = self._problem(blob)
            if problem and first:
                return False
            if problem and _which(path) == which:  # not pruned or replaced in the meantime
                self.found.append(Unsound(key, MISSING, f"entry '{key}': the blob of '{name}' {problem}"))
                self._put_aside(path, which)
                return True
        for tag in manifest.tags:
            mark = self.layout.index(tag) / key
            if not os.path.lexists(mark) and os.path.lexists(path):
                self.found.append(Unsound(key, MARK, f"entry '{key}' is not found by its tag '{tag}'"))
                if self.repair:
                    durable.touch(mark, lasting=True)
        return True

    def _problem(self, blob: Blob) -> str | None:
        """What is wrong with a blob that an entry names; None if nothing is."""
        digest = bytes.fromhex(blob.sha256)
        if digest in self.unreadable:  # that was said of the blob; the entry may be sound
            return None
        if digest not in self.sound:  # it may have come since
            with suppress(OSError, VerificationError):
                now = read_digests(self.layout.blob(blob.sha256))
                self.sound[bytes.fromhex(now.sha256)] = _claims(now)
        known = self.sound.get(digest)
        if known is None or not os.path.lexists(self.layout.blob(blob.sha256)):
            return "is missing or broken"
        return None if known == _claims(blob) else "is not the one that its manifest describes"

    def _strange(self, path: Path, sentence: str, which: tuple[int, int] | None = None) -> None:
        self._report(path, FILE, sentence)
        self._put_aside(path, which or _which(path))

    def _unreadable(self, path: Path, error: OSError) -> bool:
        if error.errno in GONE:
            return False
        self._report(path, UNREADABLE, f"cannot be read ({error.strerror or error})")
        return True

    def _report(self, path: Path, what: str, sentence: str) -> None:
        shown = self._name(path)
        self.found.append(Unsound(shown, what, f"'{shown}' {sentence}"))

    def _name(self, path: Path) -> str:
        """Below the store, with nothing in it that a terminal would obey."""
        text = path.relative_to(self.layout.root).as_posix()
        return text if text.isprintable() else ascii(text)[1:-1]

    def _put_aside(self, path: Path, which: tuple[int, int] | None) -> None:
        """Into quarantine, if it is still the file that was looked at."""
        if not self.repair or which is None or _which(path) != which:
            return
        name = path.name if path.name.isprintable() else "unprintable"
        aside = self.layout.quarantine / f"{name[:200]}.{secrets.token_hex(4)}"
        durable.make_folder(aside.parent)
        with suppress(FileNotFoundError):
            durable.publish(path, aside)
            if _which(aside) != which:  # it was replaced at this very moment
                durable.publish_once(aside, path)


def _claims(blob: Blob) -> bytes:
    """Size and fast checksum, in few bytes."""
    return blob.size.to_bytes(8, "little") + bytes.fromhex(blob.xxh3)


def _which(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file that has a name now; None: no file."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
