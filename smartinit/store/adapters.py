"""Stored artefacts as adapter folders.

No file is shared with a blob: who writes into a hard link with ``open(…, "w")``, as trainers that save over an adapter
do, would empty the blob too, and root's processes are not stopped by mode 0444. Where the file system can (btrfs, XFS,
bcachefs), the copies share their bytes until one is written to, and cost nothing.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from smartinit.errors import NotStoredError, OutputError, StoreError, VerificationError
from smartinit.formats.files import new_folder
from smartinit.store import durable
from smartinit.store.entry import read_blob
from smartinit.store.folder import check_space, make_store, writing
from smartinit.store.keys import check_name
from smartinit.store.regular import open_regular, read_small

if TYPE_CHECKING:
    from smartinit.store.blobs import Blob
    from smartinit.store.entry import Entry
    from smartinit.store.keys import Key
    from smartinit.store.local import LocalStore
    from smartinit.store.manifest import Manifest

_MARKER = "adapter_config.json"
_RECORD = "smartinit.json"
_TOLD = (_RECORD, "README.md")  # what says how the rest came about
_LARGEST = 256 << 20  # bytes of a record
_CLONE = 0x40049409  # FICLONE, see ioctl_ficlone(2)
_PIECE = 8 << 20


def adapter_folder(local: LocalStore, key: Key | str, *, out: str | os.PathLike[str] | None = None) -> Path:
    """An artefact's files as a folder that PEFT and `Artefact.load` read; it is made when it is first asked for.

    The folder is for reading: it goes with its entry when the store is pruned, so pin an entry that a run reads from.
    If its files were changed it is put into quarantine, with a warning, and made again; files that were added stay, and
    so does a folder whose entry was computed again since, with the same result.

    Args:
        local: the store.
        key: of the artefact.
        out: another place for it than ``adapters/<key>/`` in the store, such as for a store that cannot be written.

    Raises:
        NotStoredError: there is no such artefact, or it is not sound.
        StoreError: the store is read-only or full.
        OutputError: ``out`` exists and is another folder, or cannot be written.

    Cost: one read of the folder if it is there, else one read of the entry and, unless bytes are shared, one write.
    """
    name = check_name(key)
    folder = local.layout.adapters / name if out is None else Path(os.path.realpath(out))
    manifest = local.peek(name)
    if manifest is None or _MARKER not in manifest.blobs:
        raise _not_stored(name)
    if _is_sound(local, folder, manifest):
        local.mark_used(name)
        return folder
    if out is not None:
        return copy_adapter(local, key, out)
    if local.read_only:
        raise StoreError(
            f"the store '{local.layout.root}' was opened read-only and has no folder of '{name}' yet; name a folder to "
            "write it to (--out)"
        )
    with _opened(local, name) as entry:
        _build(local, folder, entry)
    return folder


def copy_adapter(local: LocalStore, key: Key | str, out: str | os.PathLike[str], force: bool = False) -> Path:
    """An artefact's files as a folder of the user's own, which nothing of the store's ever changes or removes.

    Raises:
        NotStoredError: there is no such artefact, or it is not sound.
        OutputError: the folder exists (without ``force``), holds other things, or cannot be written.

    Cost: one read and, where bytes cannot be shared, one write of the entry.
    """
    with _opened(local, check_name(key)) as entry, new_folder(out, force=force, marker=_MARKER) as unfinished:
        _fill(unfinished, entry, writable=True)
    return Path(out)


def _opened(local: LocalStore, name: str) -> Entry:
    entry = local.get(name, tensors=False)
    if entry is None or _MARKER not in entry.files:
        raise _not_stored(name)
    return entry


def _not_stored(name: str) -> NotStoredError:
    return NotStoredError(f"the store has no artefact '{name}'; compute it, or pull it from another store")


def readable_folder(local: LocalStore, key: Key | str) -> Path:
    """`adapter_folder`, or `private_folder` where the store cannot be written: reading needs no writing."""
    try:
        return adapter_folder(local, key)
    except StoreError:
        return private_folder(local, key)


def private_folder(local: LocalStore, key: Key | str) -> Path:
    """The same folder in a place of the user's own, for a store that cannot be written.

    It is in the user's folder for caches or, if that cannot be written, in the one for temporary files. One that is not
    the artefact's any more is made again.

    Raises:
        NotStoredError: there is no such artefact, or it is not sound.
        OutputError: no place can be written.

    Cost: as of `adapter_folder`.
    """
    name, trouble = check_name(key), None
    manifest = local.peek(name)
    if manifest is None:
        raise _not_stored(name)
    for place in _private_places():
        folder = place / name
        try:
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(place):
                continue
            return folder if _is_sound(local, folder, manifest) else copy_adapter(local, name, folder, force=True)
        except OSError as error:  # an OutputError too
            trouble = error
    raise OutputError(
        f"the folder of '{name[:12]}' can be written neither into its store nor to {place} ({trouble}); name a cache "
        "folder with XDG_CACHE_HOME"
    )


def _private_places() -> list[Path]:
    user = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    cache = Path(user) if user else Path(os.path.expanduser("~")) / ".cache"  # noqa: PTH111 - Path's raises without a home
    owner = os.getuid() if hasattr(os, "getuid") else "own"
    return [cache / "smartinit" / "adapters", Path(tempfile.gettempdir()) / f"smartinit-adapters-{owner}"]


def _is_ours(place: Path) -> bool:
    """Whether nobody else can put files there."""
    if not hasattr(os, "getuid"):
        return True
    found = place.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _is_sound(local: LocalStore, folder: Path, manifest: Manifest) -> bool:
    """Whether a folder has all files of an entry, byte for byte, or those of another computation of the same result."""
    if folder.is_symlink():
        return False
    told = {name: blob for name, blob in manifest.blobs.items() if name in _TOLD}
    try:
        for name, blob in manifest.blobs.items():
            if (folder / name).parent.is_symlink():
                return False
            if name not in told:
                read_blob(folder / name, blob, as_tensors=False)
        if all(_is_blob(folder / name, blob) for name, blob in told.items()):
            return True
        record = _result(read_small(folder / _RECORD, _LARGEST))
        return record == _result(read_small(local.layout.blob(told[_RECORD].sha256), _LARGEST)) and all(
            stat.S_ISREG((folder / name).lstat().st_mode) for name in told
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not there, or no record
        return False  # VerificationError is a ValueError


def _is_blob(path: Path, blob: Blob) -> bool:
    try:
        read_blob(path, blob, as_tensors=False)
    except ValueError:
        return False
    return True


def _result(record: bytes) -> dict[str, Any]:
    """What a record says but for when and how it came about, which is another each time."""
    return {name: value for name, value in json.loads(record).items() if name not in ("provenance", "timings")}


def _build(local: LocalStore, folder: Path, entry: Entry) -> None:
    """Make the folder aside, then rename it: a reader never sees half of it."""
    layout = local.layout
    with writing(layout):
        make_store(layout)
        durable.make_folder(layout.adapters)
        check_space(layout, entry.manifest.size)
        unfinished = layout.new_file()
        try:
            unfinished.mkdir()
            _fill(unfinished, entry, writable=False)
            if os.path.lexists(folder) and not _is_sound(local, folder, entry.manifest):
                _put_aside(local, folder)
            try:
                os.rename(unfinished, folder)  # noqa: PTH104 - fails where a folder is, unlike os.replace of files
            except OSError:
                if not _is_sound(local, folder, entry.manifest):  # else another process was faster
                    raise
            durable.flush_folder(layout.adapters)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


def _put_aside(local: LocalStore, folder: Path) -> None:
    """Someone has written into it: perhaps a training run, whose result must not be lost without a word."""
    aside = local.layout.quarantine / f"{folder.name}.{secrets.token_hex(4)}"
    durable.make_folder(aside.parent)
    durable.move(folder, aside)
    warnings.warn(
        f"files in '{folder}' were changed; it was moved to '{aside}', where `smartinit cache gc` removes it after a "
        "week, and is made again: let trainers save elsewhere",
        stacklevel=5,
    )


def _fill(folder: Path, entry: Entry, *, writable: bool) -> None:
    """Write an entry's files into an empty folder.

    Raises:
        OSError: they cannot be written.
    """
    for name in entry.files:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("xb") as file:
            if not _cloned(entry.files[name], file):
                content = entry.content(name)
                for start in range(0, content.nbytes, _PIECE):
                    file.write(content[start : start + _PIECE])
            file.flush()
            if not writable and hasattr(os, "fchmod"):
                os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & 0o444)
            os.fsync(file.fileno())
        if path.parent != folder:
            durable.flush_folder(path.parent)
    durable.flush_folder(folder)


def _cloned(blob: Path, file: BinaryIO) -> bool:
    """Whether an empty file now has the bytes of a blob, which has been checked, without a copy of them."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    with suppress(OSError, VerificationError), open_regular(blob) as source:  # pruned, or a file system that cannot
        fcntl.ioctl(file.fileno(), _CLONE, source.fileno())
        return True
    return False
