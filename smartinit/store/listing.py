"""What a store holds, one entry at a time: memory does not grow with their number."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from smartinit.errors import StoreError, VerificationError
from smartinit.store.census import GONE, read_manifest
from smartinit.store.keys import check_name
from smartinit.store.leases import leased_keys
from smartinit.store.pins import pinned_keys
from smartinit.store.scanning import scan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from smartinit.store.layout import Layout
    from smartinit.store.manifest import Manifest

_SUFFIX = ".json"
_DIGEST = 64
_SHORT = 12
# Of leaves and meta, what tells entries apart, in the order of reading.
_TELLING = ("method", "form", "layer", "rank", "ranks", "limit", "layers", "host", "artefact", "model", "data", "out")


class Listed(NamedTuple):
    """One entry.

    Attributes:
        key: its name.
        kind: see `smartinit.store.keys.Key`.
        size: bytes of its blobs, also of those that it shares with others.
        created: seconds since the epoch, by the clock of who computed it.
        used: its last use, or else when it was stored here; seconds since the epoch.
        pinned: it is never pruned.
        leased: someone reads it now.
        about: a few words of its key that tell it from others.
        problem: a sentence if its manifest cannot be read; then kind, size and the rest are empty.
    """

    key: str
    kind: str
    size: int
    created: float
    used: float
    pinned: bool
    leased: bool
    about: Mapping[str, str]
    problem: str | None = None


def list_entries(layout: Layout) -> Iterator[Listed]:
    """All entries, in no order.

    Manifests are checked against their own digest; blobs are not looked at.

    Raises:
        StoreError: the folder cannot be listed.

    Cost: one small file and one look at a mark for each, about 60 µs; memory for one entry, all pins and leases.
    """
    pinned, leased = pinned_keys(layout), leased_keys(layout)
    used = os.fspath(layout.used)
    try:
        for item in scan(layout.entries):
            name = item.name.removesuffix(_SUFFIX) if item.name.endswith(_SUFFIX) else ""
            with suppress(ValueError):
                listed = _read(item, check_name(name), used, pinned, leased)
                if listed is not None:
                    yield listed
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"cannot list the store '{layout.root}': {error.strerror or error}") from error


def stored_bytes(layout: Layout) -> int:
    """Bytes of all blobs, each once. Cost: one look at each file."""
    total = 0
    for folder in scan(layout.blobs):
        for item in scan(folder.path):
            with suppress(FileNotFoundError):
                total += item.stat(follow_symlinks=False).st_size
    return total


def _read(item: os.DirEntry[str], key: str, used: str, pinned: set[str], leased: set[str]) -> Listed | None:
    try:
        manifest, _ = read_manifest(item.path, key)
    except (OSError, VerificationError) as error:
        if isinstance(error, OSError) and error.errno in GONE:
            return None
        return Listed(key, "", 0, 0.0, 0.0, key in pinned, key in leased, {}, str(error))
    try:
        last = os.stat(f"{used}/{key}").st_mtime  # noqa: PTH116 - once for every entry
    except OSError:
        try:
            last = item.stat(follow_symlinks=False).st_mtime
        except OSError:
            return None
    about = dict(_about(manifest))
    return Listed(key, manifest.kind, manifest.size, manifest.created, last, key in pinned, key in leased, about)


def _about(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for name in _TELLING:
        value: Any = manifest.leaves.get(name, manifest.meta.get(name))
        if isinstance(value, str):
            yield name, value[:_SHORT] if len(value) == _DIGEST else value
        elif type(value) in (int, float):
            yield name, str(value)
