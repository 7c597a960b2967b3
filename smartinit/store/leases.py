"""Marks that an entry is being read: pruning leaves it alone. Losing one loses no data, as open files stay readable."""

from __future__ import annotations

import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smartinit.store import durable

if TYPE_CHECKING:
    from pathlib import Path

    from smartinit.store.layout import Layout

FOREIGN_SECONDS = 24 * 3600
"""How long another machine's lease counts: whether its process lives cannot be seen from here."""


@dataclass(frozen=True)
class Lease:
    """One reader's mark on one entry."""

    path: Path

    def release(self) -> None:
        """The reader is done."""
        with suppress(OSError):
            durable.remove(self.path)


def take_lease(layout: Layout, key: str) -> Lease | None:
    """A mark on ``key``; None where the store cannot be written to."""
    path = layout.leases / f"{key}.{_host()}.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        durable.touch(path)
    except OSError:
        return None
    return Lease(path)


def leased_keys(layout: Layout, *, now: float | None = None) -> set[str]:
    """Keys that someone reads; marks of processes that have ended are removed on the way."""
    now = time.time() if now is None else now
    found: set[str] = set()
    try:
        paths = list(os.scandir(layout.leases))
    except FileNotFoundError:
        return found
    for item in paths:
        key, host, pid, _ = (*item.name.split("."), "", "", "")[:4]
        if _lives(host, pid, item, now):
            found.add(key)
        else:
            with suppress(OSError):
                os.unlink(item.path)  # noqa: PTH108 - a scandir entry
    return found


def _lives(host: str, pid: str, item: os.DirEntry[str], now: float) -> bool:
    if host != _host() or not pid.isdigit():
        with suppress(OSError):
            return abs(now - item.stat().st_mtime) < FOREIGN_SECONDS  # a clock may have gone backwards
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _host() -> str:
    """This machine's name as part of a file name."""
    kept = [letter if letter.isalnum() or letter == "-" else "_" for letter in socket.gethostname().lower()]
    return "".join(kept)[:60] or "host"
