"""Where things lie in a store.

    cache/
      CACHEDIR.TAG                       backup programs leave the folder out
      smartinit-store.json               {"schema": 1}: who reads another number keeps off
      blobs/sha256/ab/abcd…              immutable files, named by their content, mode 0444
      entries/<key>.json                 one manifest per key, written last: it is what makes an entry exist
      index/<tag>/<key>                  empty: keys that share something, to find them without reading all entries
      used/<key>                         empty; its modification time is the last use
      pins/<key>                         empty: never pruned
      leases/<key>.<host>.<pid>.<token>  empty: someone reads this entry now
      locks/<key>.lock                   only saves double work; nothing depends on it
      aside/<key>.<digest>.json          manifests of other results for a key that has one already
      quarantine/<name>.<token>          what was found broken
      adapters/<key>/                    artefacts as adapter folders, copies of blobs
      memo/                              digests of files that others own
      tmp/<host>.<pid>.<token>           unfinished

Everything but `blobs` and `entries` may be lost without losing a result.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smartinit.store.owner import owner_mark

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Paths below one root; names have been checked by whoever asks."""

    root: Path

    @property
    def tag(self) -> Path:
        """CACHEDIR.TAG (bford.info/cachedir)."""
        return self.root / "CACHEDIR.TAG"

    @property
    def schema(self) -> Path:
        """The store's version."""
        return self.root / "smartinit-store.json"

    @property
    def blobs(self) -> Path:
        """All blobs."""
        return self.root / "blobs" / "sha256"

    @property
    def entries(self) -> Path:
        """All manifests."""
        return self.root / "entries"

    @property
    def quarantine(self) -> Path:
        """Broken files."""
        return self.root / "quarantine"

    @property
    def aside(self) -> Path:
        """Manifests of differing results."""
        return self.root / "aside"

    @property
    def pins(self) -> Path:
        """Pins."""
        return self.root / "pins"

    @property
    def used(self) -> Path:
        """Times of last use."""
        return self.root / "used"

    @property
    def leases(self) -> Path:
        """Leases of readers."""
        return self.root / "leases"

    @property
    def locks(self) -> Path:
        """Locks."""
        return self.root / "locks"

    @property
    def adapters(self) -> Path:
        """Adapter folders."""
        return self.root / "adapters"

    @property
    def memo(self) -> Path:
        """Digests of others' files."""
        return self.root / "memo"

    @property
    def unfinished(self) -> Path:
        """Temporary files."""
        return self.root / "tmp"

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that a store may have, but for those within them."""
        marks = (self.index_root, self.used, self.pins, self.leases, self.locks)
        others = (self.aside, self.quarantine, self.adapters, self.memo, self.unfinished)
        return (self.blobs.parent, self.blobs, self.entries, *marks, *others)

    def blob(self, sha256: str) -> Path:
        """A blob by its digest."""
        return self.blobs / sha256[:2] / sha256

    def entry(self, key: str) -> Path:
        """A manifest by its key."""
        return self.entries / f"{key}.json"

    @property
    def index_root(self) -> Path:
        """The folders of all tags."""
        return self.root / "index"

    def index(self, tag: str) -> Path:
        """The folder of one tag."""
        return self.index_root / tag

    def new_file(self) -> Path:
        """A name below `unfinished` that nobody else uses, and that says whose it is."""
        return self.unfinished / f"{owner_mark()}.{secrets.token_hex(12)}"
