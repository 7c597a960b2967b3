"""Requests as they are before anything is loaded, and the artefacts that they led to.

A request's leaves are digests of files and the options as they were given. They name an artefact only by way of what
the libraries make of the files: so an entry of the kind ``"request"`` holds the artefact's key, and counts by itself
under the same versions of these libraries only. Under others it is a guess, which the first batches confirm or not.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from typing import TYPE_CHECKING, Any

from smartinit import __version__
from smartinit.errors import StoreError
from smartinit.store.explain import describe, nearest
from smartinit.store.keys import Key, canonical, check_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.store.store import Store

KIND = "request"
LIBRARIES = ("datasets", "tokenizers", "torch", "transformers")
"""What turns files into weights and batches."""
BATCHES = 16
"""So many of the first batches are looked at again under other versions."""
_MOST_GUESSES = 16
_SHA = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Remembered:
    """Where a request led before.

    Attributes:
        artefact: key of its artefact, which may have been pruned since.
        versions: library -> version, as they were.
        first: digest of the first `BATCHES` batches; None for methods that read none.
        certain: whether the versions are those of now, so that the data need no look.
        about: what the caller noted besides.
    """

    artefact: str
    versions: Mapping[str, str]
    first: str | None
    certain: bool
    about: Mapping[str, Any]


def library_versions() -> dict[str, str]:
    """Of the libraries that are installed; none is imported."""
    return {name: _version(name) for name in LIBRARIES}


def recall(store: Store, leaves: Mapping[str, Any]) -> Remembered | None:
    """Where the request led, under the versions of now if it was made under them; None if it was never made.

    Args:
        store: to look in.
        leaves: the request: JSON values.

    Cost: one small file; under other versions up to 17, and a listing of a few names.
    """
    now = library_versions()
    found = _read(store, _key(leaves, now).digest, leaves, now)
    if found is not None:
        return found
    for name in islice(sorted(store.keys(_tag(leaves))), _MOST_GUESSES):
        guess = _read(store, name, leaves, now)
        if guess is not None:
            return guess
    return None


def remember(
    store: Store,
    leaves: Mapping[str, Any],
    artefact: str,
    *,
    first: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Note where the request led, under the versions of now.

    Args:
        store: to write to.
        leaves: the request.
        artefact: key of an artefact in the store.
        first: see `Remembered.first`.
        about: JSON values to be given back with it.

    Raises:
        StoreError: it cannot be written.
    """
    meta = {"artefact": check_name(artefact), "first": first, "about": dict(about or {})}
    key = _key(leaves, library_versions())
    there = store.local.peek(key)
    if there is not None and dict(there.meta) == meta:
        return
    if store.local.read_only:
        raise StoreError(f"the store '{store.local.layout.root}' is read-only, so the request is not remembered")
    store.put(key, meta=meta, tags=[KIND, _tag(leaves)], replace=there is not None)


def missed(store: Store, leaves: Mapping[str, Any]) -> str:
    """What differs from the nearest request that the store remembers, in a sentence."""
    found = nearest(store, _key(leaves, library_versions()))
    if found is None:
        return "the store remembers no request to compare this one with"
    manifest, differing = found
    if not differing:
        return "the same request was made before, but its artefact is gone"
    artefact = str(manifest.meta.get("artefact"))[:12]
    return f"the nearest request (artefact {artefact}) differs in {describe(differing)}"


def _key(leaves: Mapping[str, Any], versions: Mapping[str, str]) -> Key:
    return Key(KIND, {**leaves, "smartinit": __version__, "versions": dict(versions)})


def _tag(leaves: Mapping[str, Any]) -> str:
    """Of one request under all versions of the libraries."""
    digest = hashlib.sha256(canonical({**leaves, "smartinit": __version__})).hexdigest()
    return f"{KIND}-{digest[:40]}"


def _read(store: Store, name: str, leaves: Mapping[str, Any], now: Mapping[str, str]) -> Remembered | None:
    """An entry of a request, if it is of this one and says what such entries say."""
    manifest = store.peek(name)
    if manifest is None or manifest.kind != KIND:
        return None
    versions = manifest.leaves.get("versions")
    artefact, first, about = (manifest.meta.get(name) for name in ("artefact", "first", "about"))
    if not isinstance(versions, dict) or not isinstance(about, dict):
        return None
    if not _is_digest(artefact) or not (first is None or _is_digest(first)):
        return None
    if _key(leaves, versions).digest != name or Key(manifest.kind, manifest.leaves).digest != name:
        return None
    store.local.mark_used(name)
    return Remembered(str(artefact), versions, first, certain=versions == dict(now), about=about)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _SHA.fullmatch(value) is not None
