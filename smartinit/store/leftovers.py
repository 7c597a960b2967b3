"""What nothing needs any more: unfinished files of the killed, marks of entries that are gone, old broken files."""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from smartinit.store import durable
from smartinit.store.keys import check_name
from smartinit.store.owner import owner_lives
from smartinit.store.scanning import scan

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smartinit.store.layout import Layout

HOUR, DAY, WEEK = 3600.0, 86400.0, 7 * 86400.0
GRACE = HOUR
"""Seconds that something unreferenced stays: its writer may be about to name it."""
TRASH = "trash."
"""How names of what is being pruned begin, in the folder for unfinished files."""


class Leftover(NamedTuple):
    """A file or folder that goes.

    Attributes:
        path: where it is.
        reason: a few words.
        bytes: that are free afterwards.
        modified_ns: when it was last modified: if that has changed, it stays. None: it goes in any case.
    """

    path: Path
    reason: str
    bytes: int
    modified_ns: int | None = None


def leftovers(layout: Layout, now: float) -> Iterator[Leftover]:
    """Everything that may go whatever the rules are. Cost: a listing of each folder, and a look for each mark."""
    for item, age, size in _inside(layout.unfinished, now):
        if item.name.startswith(TRASH):
            yield Leftover(Path(item.path), "left by an interrupted gc", size)
        elif age > DAY:
            yield Leftover(Path(item.path), "unfinished for a day", size)
        elif age >= 0 and not owner_lives(*_owner(item.name), now - age, now):
            yield Leftover(Path(item.path), "unfinished, and its process has ended", size)
    for item, age, size in _inside(layout.quarantine, now, moved=True):
        if age > WEEK:
            yield Leftover(Path(item.path), "in quarantine for a week", size)
    for folder, reason in ((layout.aside, "kept aside for a week"), (layout.locks, "a lock unused for a week")):
        for item, age, size in _inside(folder, now):
            if age > WEEK:
                yield Leftover(Path(item.path), reason, size)
    yield from _dangling(layout, now)


def drop(leftover: Leftover, layout: Layout) -> int:
    """Remove a leftover; bytes that were freed. A mark whose entry has come meanwhile is put back.

    Raises:
        OSError: it cannot be removed.
    """
    path = leftover.path
    try:
        status = path.lstat()
    except FileNotFoundError:
        return 0
    if leftover.modified_ns not in (None, status.st_mtime_ns):
        return 0
    if stat.S_ISDIR(status.st_mode):
        size = folder_bytes(path)
        shutil.rmtree(path)
        return size
    durable.remove(path)
    if path.parent in (layout.used, layout.pins) or path.parent.parent == layout.index_root:
        restore_mark(layout, path)
    return status.st_size if status.st_nlink == 1 else 0


def restore_mark(layout: Layout, mark: Path) -> None:
    """Make a mark again if its entry is there: a writer marks first and publishes then, so one of both is seen."""
    if os.path.lexists(layout.entry(mark.name)):
        durable.touch(mark)


def folder_bytes(folder: Path | str) -> int:
    """Bytes that are free when a folder is removed: links to blobs count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                status = os.lstat(os.path.join(root, name))  # noqa: PTH118 - os.walk gives text
                total += status.st_size if status.st_nlink == 1 else 0
    return total


def _dangling(layout: Layout, now: float) -> Iterator[Leftover]:
    folders = [layout.used, layout.pins, layout.adapters]
    with suppress(OSError), os.scandir(layout.index_root) as tags:
        folders += [Path(tag.path) for tag in tags if tag.is_dir(follow_symlinks=False)]
    entries = os.fspath(layout.entries)
    for folder in folders:
        for item in scan(folder):
            with suppress(ValueError, OSError):
                if os.path.lexists(f"{entries}/{check_name(item.name)}.json"):
                    continue
                status = item.stat(follow_symlinks=False)
                if now - status.st_mtime > GRACE:
                    path = Path(item.path)
                    size = folder_bytes(path) if stat.S_ISDIR(status.st_mode) else status.st_size
                    yield Leftover(path, "its entry is gone", size, status.st_mtime_ns)


def _inside(folder: Path, now: float, *, moved: bool = False) -> Iterator[tuple[os.DirEntry[str], float, int]]:
    """What is in a folder, its age in seconds (negative where a clock went back), and its bytes."""
    for item in scan(folder):
        with suppress(OSError):
            status = item.stat(follow_symlinks=False)
            is_folder = stat.S_ISDIR(status.st_mode)
            size = folder_bytes(Path(item.path)) if is_folder else status.st_size if status.st_nlink == 1 else 0
            # A rename keeps the time of the content.
            yield item, now - max(status.st_mtime, status.st_ctime if moved else 0.0), size


def _owner(name: str) -> tuple[str, str]:
    """Host and process in the name of an unfinished file."""
    host, _, rest = name.partition(".")
    return host, rest.partition(".")[0]
