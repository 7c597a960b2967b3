"""Copying entries between a folder and another store."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

    from smartinit.store.keys import Key
    from smartinit.store.local import LocalStore

_NONE: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Transfer:
    """What was copied.

    Attributes:
        sent: keys that the other side has now and had not before.
        skipped: keys that it had already.
        failed: keys that could not be copied, each with a sentence that says why.
        bytes: of blobs that went over; blobs that were there do not count.
        conflicts: keys for which the other side has a different result of the same inputs: that one stays.
    """

    sent: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=lambda: _NONE)
    bytes: int = 0
    conflicts: tuple[str, ...] = ()


def push(local: LocalStore, target: str | os.PathLike[str], keys: Iterable[Key | str] | None = None) -> Transfer:
    """Copy entries (all of them if none are named) to another store."""
    raise NotImplementedError


def pull(local: LocalStore, source: str | os.PathLike[str], keys: Iterable[Key | str] | None = None) -> Transfer:
    """Copy entries (all of them if none are named) from another store."""
    raise NotImplementedError
