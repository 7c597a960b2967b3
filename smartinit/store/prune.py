"""Making room: first a plan that says what goes and why, then its execution, which looks again before each step."""

from __future__ import annotations

import os
import re
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smartinit.errors import ConfigError, StoreError
from smartinit.store.census import Census
from smartinit.store.leases import leased_keys
from smartinit.store.leftovers import GRACE, WEEK, folder_bytes, leftovers
from smartinit.store.pins import pinned_keys, refuse_read_only
from smartinit.store.scanning import scan
from smartinit.store.sweep import Freed, Going, Unnamed, last_use, sweep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smartinit.store.census import Counted
    from smartinit.store.layout import Layout
    from smartinit.store.leftovers import Leftover
    from smartinit.store.local import LocalStore

_HEX = "0123456789abcdef"
_BLOB = re.compile(f"[{_HEX}]{{64}}")


@dataclass(frozen=True)
class PrunePlan:
    """What goes, and what that frees.

    Attributes:
        entries: entries that go, with reasons.
        blobs: blobs that nothing names then.
        leftovers: other files.
        total: bytes of the store before.
        expected_freed: bytes that go; less if other processes want something again before it is executed.
        kept: number of entries that stay.
        pinned: keys that stay because of a pin although a rule would have them go.
        leased: likewise, because someone reads them.
        messages: sentences, such as why no blob goes.
    """

    local: LocalStore = field(repr=False)
    entries: tuple[Going, ...]
    blobs: tuple[Unnamed, ...]
    leftovers: tuple[Leftover, ...]
    total: int
    expected_freed: int
    kept: int
    pinned: tuple[str, ...]
    leased: tuple[str, ...]
    messages: tuple[str, ...]
    census: Census = field(repr=False, compare=False)

    def execute(self) -> Freed:
        """Remove it; entries first, so that a kill leaves blobs that nothing names, which the next plan finds.

        Raises:
            StoreError: the store is read-only, or cannot be written at all.
        """
        refuse_read_only(self.local)
        if not self.local.layout.root.is_dir():
            return Freed()
        try:
            return sweep(self.local.layout, self.census, self.entries, self.blobs, self.leftovers)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot prune '{self.local.layout.root}': {error.strerror or error}") from error


def plan_prune(
    local: LocalStore,
    *,
    max_bytes: int | None = None,
    max_age: float | None = None,
    unused_for: float | None = None,
    now: float | None = None,
) -> PrunePlan:
    """Say what would go; nothing is changed.

    Entries go by the rules that are given; pinned ones, and those that someone reads, stay. Whatever the rules, blobs
    that no entry names go when they are an hour old, and so does what the killed have left.

    Args:
        local: the store.
        max_bytes: entries go, least recently used first, until the store is no larger.
        max_age: seconds since an entry was stored.
        unused_for: seconds since its last use.
        now: seconds since the epoch; None: the clock's.

    Raises:
        ConfigError: a rule below 0.

    Cost: one read of every manifest, about 60 µs each; memory of about 600 bytes for an entry.
    """
    for name, value in (("max_bytes", max_bytes), ("max_age", max_age), ("unused_for", unused_for)):
        if value is not None and not value >= 0:
            raise ConfigError(f"{name}={value!r} is below 0")
    return _Planning(local, time.time() if now is None else now).plan(max_bytes, max_age, unused_for)


class _Planning:
    """One plan in the making."""

    def __init__(self, local: LocalStore, now: float) -> None:
        self.local, self.layout, self.now = local, local.layout, now
        self.census = Census(local.layout)
        self.marks = leased_keys(local.layout), pinned_keys(local.layout)
        self.stay: tuple[list[str], list[str]] = [], []
        self.going: list[Going] = []
        self.adapters = os.fspath(local.layout.adapters)
        self.count = self.total = self.freed = 0
        self.free: list[tuple[bytes, int]] = []

    def plan(self, max_bytes: int | None, max_age: float | None, unused_for: float | None) -> PrunePlan:
        """See `plan_prune`."""
        going: list[Going] = []
        candidates: list[Counted] = []
        times = array("d")  # of their last use
        folder = os.fspath(self.layout.used)
        for entry in self.census.read():
            self.count += 1
            self.total += entry.length + sum(size for digest, size in entry.blobs() if self.census.count(digest) == 1)
            used = last_use(folder, entry)
            if max_age is not None and self.now - entry.modified_ns / 1e9 > max_age:
                going.append(Going(entry, "too old", used))
            elif unused_for is not None and self.now - used > unused_for:
                going.append(Going(entry, "not used for too long", used))
            elif max_bytes is not None:
                candidates.append(entry)
                times.append(used)
        self.census.read_aside(int((self.now - WEEK) * 1e9))
        for each in going:  # all have been counted: now it is known what they share
            self._let_go(each)
        others = self._unnamed()
        left = list(leftovers(self.layout, self.now))
        gone = sum(blob.bytes for blob in others) + sum(item.bytes for item in left)
        self.total += gone
        self.freed += gone
        if max_bytes is not None:
            for index in sorted(range(len(times)), key=lambda index: (times[index], candidates[index].key)):
                if self.total - self.freed <= max_bytes:
                    break
                self._let_go(Going(candidates[index], "least recently used", times[index]))
        return self._finish([*others, *self._stamped()], left, max_bytes)

    def _finish(self, blobs: list[Unnamed], left: list[Leftover], max_bytes: int | None) -> PrunePlan:
        messages = list(self.census.blind)
        if self.census.blind:
            self.freed -= sum(blob.bytes for blob in blobs)
            blobs = []
            messages.append("no blob goes while it is not known which ones these name")
        if self.census.damaged:
            messages.append(
                f"{len(self.census.damaged)} manifests are damaged, such as '{self.census.damaged[0]}'; "
                "`smartinit cache verify --repair` puts them aside"
            )
        rest = self.total - self.freed
        if max_bytes is not None and rest > max_bytes:
            messages.append(f"{rest:,} bytes stay, more than the {max_bytes:,} that were asked for")
        leased, pinned = self.stay
        return PrunePlan(
            local=self.local,
            entries=tuple(self.going),
            blobs=tuple(blobs),
            leftovers=tuple(left),
            total=self.total,
            expected_freed=self.freed,
            kept=self.count - len(self.going),
            pinned=tuple(pinned),
            leased=tuple(leased),
            messages=tuple(messages),
            census=self.census,
        )

    def _let_go(self, going: Going) -> None:
        entry = going.entry
        for keys, stay in zip(self.marks, self.stay, strict=True):
            if entry.key in keys:
                stay.append(entry.key)
                return
        self.going.append(going)
        free = self.census.forget(entry)
        self.free += free
        self.freed += entry.length + sum(size for _, size in free) + folder_bytes(f"{self.adapters}/{entry.key}")

    def _unnamed(self) -> list[Unnamed]:
        """Blobs that no manifest names, and that are old enough to go."""
        found = []
        going = {digest for digest, _ in self.free}
        for item in _blobs(self.layout):
            digest = bytes.fromhex(item.name)
            if self.census.count(digest) or digest in going:
                continue
            with suppress(FileNotFoundError):
                status = item.stat(follow_symlinks=False)
                if self.now - status.st_mtime > GRACE:
                    found.append(Unnamed(item.name, status.st_size, status.st_mtime_ns))
                else:
                    self.total += status.st_size
        return found

    def _stamped(self) -> Iterator[Unnamed]:
        """The blobs of the entries that go, as they are now."""
        blobs = os.fspath(self.layout.blobs)
        for digest, size in self.free:
            sha256 = digest.hex()
            with suppress(OSError):
                yield Unnamed(sha256, size, os.lstat(f"{blobs}/{sha256[:2]}/{sha256}").st_mtime_ns)


def _blobs(layout: Layout) -> Iterator[os.DirEntry[str]]:
    """Every file that is named as a blob is."""
    for first in _HEX:
        for second in _HEX:
            folder = layout.blobs / (first + second)
            if folder.is_symlink():  # what lies there is not the store's
                continue
            for item in scan(folder):
                if _BLOB.fullmatch(item.name) and item.name[:2] == first + second:
                    yield item
