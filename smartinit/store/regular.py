"""Opening what may be hostile: regular files only, never through a link, without ever waiting."""

from __future__ import annotations

import errno
import os
import stat
from typing import TYPE_CHECKING, BinaryIO

from smartinit.errors import VerificationError

if TYPE_CHECKING:
    from pathlib import Path

_STEP = 1 << 20
_FLAGS = os.O_RDONLY
for _name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"):
    _FLAGS |= getattr(os, _name, 0)  # O_NONBLOCK: a pipe without a writer would be waited for


def open_regular(path: Path | str) -> BinaryIO:
    """A file for reading, unbuffered.

    Raises:
        VerificationError: a link, folder, pipe, socket or device.
        OSError: it cannot be opened.
    """
    if not hasattr(os, "O_NOFOLLOW") and os.path.islink(path):  # noqa: PTH114 - see read_small
        raise VerificationError(f"'{path}' is no regular file")
    try:
        descriptor = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO, errno.EISDIR):  # links, sockets, folders
            raise VerificationError(f"'{path}' is no regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VerificationError(f"'{path}' is no regular file")
    return open(descriptor, "rb", buffering=0)  # noqa: PTH123 - a descriptor


def read_small(path: Path | str, most: int) -> bytes:
    """A file's bytes.

    Whoever reads very many gives text: a Path costs as much time as the rest, and keeps each of its parts in memory.

    Raises:
        VerificationError: more than ``most`` bytes, or no regular file.
        OSError: it cannot be read.
    """
    content = bytearray()
    with open_regular(path) as file:
        while len(content) <= most and (more := file.read(_STEP)):
            content += more
    if len(content) > most:
        raise VerificationError(f"'{path}' has more than {most} bytes")
    return bytes(content)
