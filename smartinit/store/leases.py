"""Marks that an entry is being read: pruning leaves it alone. Losing one loses no data, as open files stay readable."""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smartinit.store import durable
from smartinit.store.owner import owner_lives, owner_mark

if TYPE_CHECKING:
    from pathlib import Path

    from smartinit.store.layout import Layout


@dataclass(frozen=True)
class Lease:
    """One reader's mark on one entry."""

    path: Path
    process: int = field(default_factory=os.getpid)

    def release(self) -> None:
        """The reader is done; nothing happens in a fork of the reader, whose copy of the entry is not the last."""
        if os.getpid() == self.process:
            durable.clear(self.path)


def take_lease(layout: Layout, key: str) -> Lease | None:
    """A mark on ``key``; None where the store cannot be written to."""
    path = layout.leases / f"{key}.{owner_mark()}.{secrets.token_hex(4)}"
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
        items = list(os.scandir(layout.leases))
    except (FileNotFoundError, NotADirectoryError):
        return found
    for item in items:
        key, host, pid, _ = (*item.name.split("."), "", "", "")[:4]
        with suppress(OSError):  # released in the meantime
            if owner_lives(host, pid, item.stat().st_mtime, now):
                found.add(key)
            else:
                os.unlink(item.path)  # noqa: PTH108 - a scandir entry
    return found
