"""Writing that survives a kill and a power failure: unique temp file, fsync, rename, fsync of the folder.

Every change that a store makes to its files goes through this module, so that the tests can make any step fail.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# File systems that cannot do a thing say so in many ways.
_CANNOT = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}


def make_folder(path: Path) -> None:
    """The folder and its parents; each new one is on disk before something is put into it."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir()
        flush_folder(path.parent)


def write_new(path: Path, chunks: Iterable[Any], *, mode: int = 0o444) -> None:
    """A file that did not exist, with all its bytes on disk when this returns; after an error it is gone.

    Raises:
        OSError: among others no space left, or an I/O error.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        with open(descriptor, "wb", buffering=0) as file:  # noqa: PTH123 - a descriptor
            for chunk in chunks:
                view = memoryview(chunk)
                while view.nbytes:
                    view = view[file.write(view) or 0 :]
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
    except BaseException:
        remove(path)
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
        remove(unfinished)
        return False
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        if final.exists():
            remove(unfinished)
            return False
        publish(unfinished, final)  # both of two at once may believe they were first: each file is whole
        return True
    flush_folder(final.parent)
    remove(unfinished)
    return True


def touch(path: Path) -> None:
    """An empty file, modified now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        make_folder(path.parent)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
        os.utime(path)


def remove(path: Path) -> bool:
    """Whether there was such a file; now there is none."""
    try:
        os.unlink(path)  # noqa: PTH108 - one function to make fail
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


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
    usage = os.statvfs(folder)
    return usage.f_bavail * usage.f_frsize
