"""Removing what a plan names: entries first, then their blobs, with another look before each step."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from smartinit.store import durable
from smartinit.store.census import read_manifest
from smartinit.store.leases import leased_keys
from smartinit.store.leftovers import TRASH, Leftover, drop
from smartinit.store.pins import pinned_keys
from smartinit.store.trash import BLOB, ENTRY, discard, settle, trash_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from smartinit.store.census import Census, Counted
    from smartinit.store.layout import Layout


class Going(NamedTuple):
    """An entry that goes.

    Attributes:
        entry: what it is.
        reason: a few words.
        used: its last use, seconds since the epoch.
    """

    entry: Counted
    reason: str
    used: float

    @property
    def key(self) -> str:
        """Of the entry."""
        return self.entry.key


class Unnamed(NamedTuple):
    """A blob that goes.

    Attributes:
        sha256: its name.
        bytes: its size.
        modified_ns: when it was last wanted; if that changes, it stays.
    """

    sha256: str
    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Freed:
    """What the execution of a plan has done.

    Attributes:
        bytes: that are free now.
        entries: number of entries that are gone.
        blobs: of blobs.
        leftovers: of other files and folders.
        kept: keys that were to go but were used, pinned or written again since the plan.
        problems: sentences about what could not be removed.
    """

    bytes: int = 0
    entries: int = 0
    blobs: int = 0
    leftovers: int = 0
    kept: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def sweep(
    layout: Layout,
    census: Census,
    entries: Sequence[Going],
    blobs: Sequence[Unnamed],
    others: Sequence[Leftover],
) -> Freed:
    """Remove what goes.

    Args:
        layout: of the store.
        census: of the manifests, without the entries that go.
        entries: that go.
        blobs: that nothing names once these are gone.
        others: files that go anyway.

    Raises:
        OSError: the store cannot be changed. What can be removed only in part is named in `Freed.problems`.

    Cost: a few renames for each; one listing of the manifests, and a read of those that are new.
    """
    durable.make_folder(layout.unfinished)
    sweeper = _Sweeper(layout, census)
    kept, gone = sweeper.entries(entries)
    durable.flush_folder(layout.entries)  # manifests go before their blobs, also where the power fails
    blobs_gone = sweeper.blobs(blobs, kept)
    others_gone = sum(sweeper.drop(item) for item in others if not item.path.name.startswith(TRASH))
    keys = tuple(going.key for going in kept)
    return Freed(sweeper.bytes, gone, blobs_gone, others_gone, keys, tuple(sweeper.problems))


def last_use(used: str, entry: Counted) -> float:
    """When an entry was last read, or else stored; seconds since the epoch.

    Args:
        used: the folder of marks; as text, since this is asked very often.
        entry: which.
    """
    try:
        return os.stat(f"{used}/{entry.key}").st_mtime  # noqa: PTH116 - once for every entry
    except OSError:
        return entry.modified_ns / 1e9


class _Sweeper:
    """One plan in execution."""

    def __init__(self, layout: Layout, census: Census) -> None:
        self.layout, self.census = layout, census
        self.problems: list[str] = []
        self.bytes = 0

    def entries(self, entries: Sequence[Going]) -> tuple[list[Going], int]:
        """Remove entries; returns those that stay after all, and how many are gone."""
        leased, pinned = leased_keys(self.layout), pinned_keys(self.layout)
        used, ours = os.fspath(self.layout.used), {}
        for going in entries:
            busy = going.key in leased or going.key in pinned or last_use(used, going.entry) > going.used
            if not busy:
                self._discard(ENTRY, going.key, going.entry.modified_ns)
            ours[going.key] = going
        trash = trash_of(self.layout, ENTRY)
        # Readers lease first and look then, so one of both sees the other.
        wanted = pinned_keys(self.layout) | leased_keys(self.layout)
        count = 0
        for item, freed in settle(self.layout, trash, ENTRY, wanted.__contains__):
            ours.pop(item.name, None)
            count += 1
            self.bytes += freed
            self._forget(item.name, item.path)
        return [going for going in ours.values() if os.path.lexists(self.layout.entry(going.key))], count

    def blobs(self, blobs: Sequence[Unnamed], kept: Sequence[Going]) -> int:
        """Remove blobs, but for those of the entries that were kept; how many are gone."""
        for going in kept:
            self.census.remember(going.entry)
        for blob in blobs:
            if not self._is_named(blob.sha256):
                self._discard(BLOB, blob.sha256, blob.modified_ns)
        trash = trash_of(self.layout, BLOB)
        for entry in self.census.read():  # after the trash was listed: see `smartinit.store.trash`
            del entry
        count = 0
        for _, freed in settle(self.layout, trash, BLOB, self._is_named):
            count += 1
            self.bytes += freed
        return count

    def drop(self, leftover: Leftover) -> bool:
        """Remove a leftover; whether it could be."""
        try:
            self.bytes += drop(leftover, self.layout)
        except OSError as error:
            self.problems.append(f"'{leftover.path}' cannot be removed: {error.strerror or error}")
            return False
        return True

    def _is_named(self, sha256: str) -> bool:
        return bool(self.census.blind) or self.census.count(bytes.fromhex(sha256)) > 0

    def _forget(self, key: str, manifest: Path) -> None:
        """Remove what belongs to an entry that is gone."""
        try:
            tags = read_manifest(manifest, key)[0].tags
        except (OSError, ValueError):  # then its marks dangle, and the next plan finds them
            tags = ()
        marks = [self.layout.used / key, *(self.layout.index(tag) / key for tag in tags)]
        for path in (*marks, self.layout.adapters / key):
            self.drop(Leftover(path, "its entry is gone", 0))

    def _discard(self, kind: str, name: str, modified_ns: int) -> None:
        try:
            discard(self.layout, kind, name, modified_ns)
        except OSError as error:
            self.problems.append(f"the {kind} '{name}' cannot be removed: {error.strerror or error}")
