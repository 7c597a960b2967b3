"""Removing a file that someone may want again at the same moment, without a lock.

A file is first renamed into the folder for unfinished ones; its new name says what it was and when it was modified.
Then one looks again. A blob that is named now, or an entry that was written again or pinned, gets its name back,
unless there is a new file of that name; the rest is deleted. A writer looks in the opposite order (first it publishes
its manifest, then it looks whether its blobs are there), so one of both sees the other. Whoever finds trash of a
killed process goes on with it by the same rule.
"""

from __future__ import annotations

import re
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from smartinit.store import durable
from smartinit.store.leftovers import TRASH
from smartinit.store.scanning import scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from smartinit.store.layout import Layout

BLOB, ENTRY = "blob", "entry"
_NAME = re.compile(r"trash\.(blob|entry)\.([a-z0-9_-]+)\.(\d+)\.[0-9a-f]{16}")


class Trash(NamedTuple):
    """A file on its way out.

    Attributes:
        path: where it is now.
        name: its key or digest.
        modified_ns: when it was modified, as known when the decision to remove it was taken.
    """

    path: Path
    name: str
    modified_ns: int


def discard(layout: Layout, kind: str, name: str, modified_ns: int) -> bool:
    """Take a file's name away, if the file is still the one that was modified then; whether it was done.

    Raises:
        OSError: it cannot be renamed.
    """
    path = layout.blob(name) if kind == BLOB else layout.entry(name)
    try:
        if path.parent.is_symlink() or path.lstat().st_mtime_ns != modified_ns:
            return False
        durable.move(path, layout.unfinished / f"{TRASH}{kind}.{name}.{modified_ns}.{secrets.token_hex(8)}")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def trash_of(layout: Layout, kind: str) -> list[Trash]:
    """All that is on its way out, whoever put it there."""
    found = []
    for item in scan(layout.unfinished):
        match = _NAME.fullmatch(item.name)
        if match and match[1] == kind:
            found.append(Trash(layout.unfinished / item.name, match[2], int(match[3])))
    return found


def put_back(layout: Layout, sha256: str) -> bool:
    """Give a blob its name back that is on its way out but named: whoever prunes would do so a moment later.

    Returns:
        Whether it was.
    """
    for item in trash_of(layout, BLOB):
        if item.name == sha256:
            with suppress(OSError):  # another process is faster, or the store cannot be written
                durable.publish_once(item.path, layout.blob(sha256))
                return True
    return False


def settle(layout: Layout, trash: list[Trash], kind: str, wanted: Callable[[str], bool]) -> Iterator[tuple[Trash, int]]:
    """Delete trash, or put it back if it was modified since or is wanted.

    Args:
        layout: of the store.
        trash: from `trash_of`; what ``wanted`` answers must have been read after that.
        kind: of the trash.
        wanted: whether a name is needed now.

    Yields:
        What was deleted, and the bytes that were freed; before an entry is deleted, as its text tells its marks.

    Raises:
        OSError: a file can neither be deleted nor put back.
    """
    for item in trash:
        try:
            status = item.path.lstat()
            if status.st_mtime_ns != item.modified_ns or wanted(item.name):
                final = layout.blob(item.name) if kind == BLOB else layout.entry(item.name)
                durable.publish_once(item.path, final)
                continue
            yield item, status.st_size if status.st_nlink == 1 else 0
            durable.remove(item.path)
        except FileNotFoundError:  # another process settles the same
            continue
