"""One process computes, the others wait for its result: a lock that saves work and that nothing depends on."""

from __future__ import annotations

import errno
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import filelock

from smartinit.store import durable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from smartinit.store.layout import Layout

WAIT_SECONDS = 3600.0
"""How long a process waits for another before it computes by itself."""
_SILENT_SECONDS = 2.0


@contextmanager
def single_flight(
    layout: Layout,
    key: str,
    *,
    timeout: float = WAIT_SECONDS,
    tell: Callable[[str], None] | None = None,
    locking: bool = True,
) -> Iterator[bool]:
    """Hold ``key``'s lock inside the block, if it can be had.

    Args:
        layout: of the store.
        key: what is about to be computed; look it up again inside the block.
        timeout: seconds to wait for another process.
        tell: gets a sentence when the wait is longer than two seconds, and when it was in vain.
        locking: False: no lock at all.

    Yields:
        Whether the lock is held. Without it everything is correct all the same, if done twice.
    """
    lock, held = None, False
    if locking:
        try:
            durable.make_folder(layout.locks)
            lock = _lock(layout, key)
            held = _wait(lock, key, timeout, tell)
        except (OSError, NotImplementedError):  # a file system without locks, or a store that cannot be written
            held = False
    try:
        yield held
    finally:
        if lock is not None and held:
            with suppress(OSError):
                lock.release()


def _lock(layout: Layout, key: str) -> filelock.BaseFileLock:
    path = layout.locks / f"{key}.lock"
    if path.is_symlink():  # older versions of filelock would empty the file that it leads to
        raise OSError(errno.ELOOP, "it is a link", str(path))
    shared = durable.team_bits(layout.locks)
    if shared is None:  # the umask decides
        return filelock.FileLock(path, thread_local=False)
    return filelock.FileLock(path, thread_local=False, mode=0o666 & shared)


def _wait(lock: filelock.BaseFileLock, key: str, timeout: float, tell: Callable[[str], None] | None) -> bool:
    if _acquired(lock, min(_SILENT_SECONDS, timeout)):
        return True
    if tell is not None and timeout > _SILENT_SECONDS:
        tell(f"another process computes {key[:12]}; waiting for it, at most {timeout:.0f} s")
    if timeout > _SILENT_SECONDS and _acquired(lock, timeout - _SILENT_SECONDS):
        return True
    if tell is not None:
        tell(f"{key[:12]} is still being computed elsewhere after {timeout:.0f} s; computing it here too")
    return False


def _acquired(lock: filelock.BaseFileLock, seconds: float) -> bool:
    try:
        lock.acquire(timeout=seconds, poll_interval=0.05)
    except filelock.Timeout:
        return False
    return True
