"""Writing that survives a kill and a power failure: unique temp file, fsync, rename, fsync of the folder.

Every change that a store makes to its files goes through this module, so that the tests can make any step fail.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# File systems that cannot do a thing say so in many ways.
_CANNOT = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}
_FOLLOWS = os.utime not in os.supports_follow_symlinks  # where it cannot be helped
_kept: set[Path] = set()  # folders whose names this process knows to be on disk


def make_folder(path: Path, *, follow: bool = False) -> None:
    """The folder and its parents; its name is on disk when this returns, also if another process has just made it.

    Args:
        path: of the folder.
        follow: whether a link to a folder counts as one: within a store none does, as it may lead anywhere.

    Raises:
        OSError: among others a file, or a link, that has the name.
    """
    if not follow:
        _refuse_link(path)
    if path in _kept and path.is_dir():
        return
    if not path.is_dir():
        make_folder(path.parent, follow=True)
        with suppress(FileExistsError):
            os.mkdir(path)  # noqa: PTH102 - one function to make fail
            shared = team_bits(path.parent)
            if shared is not None:
                os.chmod(path, shared | stat.S_ISGID)  # noqa: PTH101 - same
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    flush_folder(path.parent)
    _kept.add(path)


def write_new(path: Path, chunks: Iterable[Any], *, mode: int = 0o444) -> None:
    """A file that did not exist, with all its bytes on disk when this returns; after an error it is gone.

    Raises:
        OSError: among others no space left, or an I/O error.
    """
    descriptor = _create(path, mode)
    try:
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            for chunk in chunks:
                view = memoryview(chunk)
                while view.nbytes:
                    view = view[file.write(view) or 0 :]
            os.fsync(file.fileno())
    except BaseException:
        clear(path)
        raise


def publish(unfinished: Path, final: Path) -> None:
    """Give a finished file its name, in place of what has it now."""
    os.replace(unfinished, final)  # noqa: PTH105 - one function to make fail
    flush_folder(final.parent)


def publish_once(unfinished: Path, final: Path) -> bool:
    """Give a finished file its name unless that is taken.

    Returns:
        Whether it was free. Either way the unfinished name is gone.
    """
    try:
        os.link(unfinished, final)
    except FileExistsError:
        clear(unfinished)
        return False
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        if final.exists():
            clear(unfinished)
            return False
        publish(unfinished, final)  # both of two at once may believe they were first: each file is whole
        return True
    clear(unfinished)
    flush_folder(final.parent)
    return True


def write_once(unfinished: Path, final: Path, content: bytes) -> None:
    """A small file with all its bytes, unless its name is taken."""
    try:
        write_new(unfinished, [content])
        publish_once(unfinished, final)
    finally:
        clear(unfinished)


def move(path: Path, to: Path) -> None:
    """Rename within a store, in place of what has that name; not on disk before the folder is flushed."""
    os.replace(path, to)  # noqa: PTH105 - one function to make fail


def touch(path: Path, *, lasting: bool = False) -> None:
    """An empty file, modified now.

    Args:
        path: of the file.
        lasting: it survives a power failure; other marks are cheaper.

    Raises:
        OSError: it cannot be, or its folder is a link.
    """
    _refuse_link(path.parent)
    try:
        _now(path)
    except FileNotFoundError:
        make_folder(path.parent)
        with suppress(FileExistsError):
            os.close(_create(path, 0o664))
        _now(path)
    if lasting:
        make_folder(path.parent)  # who has made it may not have flushed it
        flush_folder(path.parent)


def renew(path: Path) -> bool:
    """Whether a file's time could be made new; False if it is gone, or someone else's.

    Raises:
        OSError: for other reasons.
    """
    try:
        _now(path)
    except (FileNotFoundError, PermissionError):
        return False
    return True


def remove(path: Path) -> bool:
    """Whether there was such a file; now there is none."""
    try:
        os.unlink(path)  # noqa: PTH108 - one function to make fail
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def clear(path: Path) -> None:
    """Remove a file that nothing needs, if that can be done; what stays is pruned later."""
    with suppress(OSError):
        remove(path)


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure; some file systems have no such thing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """What may still be written there."""
    return shutil.disk_usage(folder).free


def _refuse_link(folder: Path) -> None:
    if folder.is_symlink():
        raise NotADirectoryError(errno.ENOTDIR, "it is a link, not a folder", str(folder))


def _now(path: Path) -> None:
    """Make the time of a name new: of a link itself, not of what it points to."""
    os.utime(path, follow_symlinks=_FOLLOWS)


def _create(path: Path, mode: int) -> int:
    """A descriptor of a new file, writable whatever ``mode`` will say to others."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    if os.name == "nt":
        mode |= 0o200  # a file that is read-only there cannot be replaced
    descriptor = os.open(path, flags, mode)
    shared = team_bits(path.parent)
    if shared is not None:
        with suppress(OSError):
            os.fchmod(descriptor, mode & shared)
    return descriptor


def team_bits(folder: Path) -> int | None:
    """Permissions of a folder that a group shares (setgid, and writable for the group), else None: the umask decides.

    Without this, one colleague's umask would lock out the others.
    """
    mode = folder.stat().st_mode
    return mode & 0o777 if mode & stat.S_ISGID and mode & stat.S_IWGRP else None
