"""Taking an entry over from another store: nothing that it says is believed before it has been checked here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from smartinit.errors import StoreError, VerificationError
from smartinit.store import durable
from smartinit.store.blobs import draft_blob, keep_blob
from smartinit.store.finite import check_tensors
from smartinit.store.folder import check_space, make_store, writing
from smartinit.store.regular import open_regular
from smartinit.store.transport import RemoteError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from smartinit.store.blobs import Blob, Draft
    from smartinit.store.local import LocalStore
    from smartinit.store.manifest import Manifest

MOST_BYTES = 1 << 40
"""Of one entry."""
_MOST_FILES = 10_000
_PIECE = 4 << 20
_FINITE = frozenset({"artefact", "spectrum"})  # statistics may well start from -inf


@dataclass(frozen=True)
class Copied:
    """One entry that went from one store to another.

    Attributes:
        bytes: of blobs that were not there.
        new: whether the entry was not there.
        conflict: whether there is a different result of the same inputs: that one stays.
    """

    bytes: int = 0
    new: bool = False
    conflict: bool = False


def adopt(local: LocalStore, manifest: Manifest, read: Callable[[Blob], Draft]) -> Copied:
    """Make another store's entry one of this.

    Args:
        local: takes it.
        manifest: checked by itself already.
        read: makes a draft of a blob, of which nothing is believed; called once for each that is missing.

    Raises:
        VerificationError: it is too large, its bytes are not those of its manifest, its tensors are no safetensors
            file or not finite; the entry is not made.
        StoreError: the store is read-only or full.

    Cost: one write of what is missing, and one read of its tensors.
    """
    local.check_writable()
    _check_size(manifest)
    there = local.peek(manifest.key) if manifest.key in local else None
    if there is not None:
        conflict = contradicts(there, manifest)
        if conflict:
            with writing(local.layout):
                local.keep_aside(manifest)
        return Copied(conflict=conflict)
    drafts: dict[Blob, Draft] = {}
    with writing(local.layout):
        make_store(local.layout)
        missing = [blob for blob in dict.fromkeys(manifest.blobs.values()) if not keep_blob(local.layout, blob)]
        check_space(local.layout, sum(blob.size for blob in missing))
        try:
            for blob in missing:
                drafts[blob] = checked_draft(read(blob), blob)
            for name, blob in manifest.blobs.items():
                path = drafts[blob].path if blob in drafts else local.layout.blob(blob.sha256)
                check_tensors(path, name, manifest.key, finite=manifest.kind in _FINITE)
            sources = {name: partial(_again, read, blob) for name, blob in manifest.blobs.items()}
            there = local.finish(manifest, drafts.values(), sources, compare=compared(manifest))
        finally:
            for draft in drafts.values():
                durable.clear(draft.path)
    # someone else may have put another result there in the meantime: `finish` has told then
    return Copied(sum(blob.size for blob in missing), new=True, conflict=contradicts(there, manifest))


def copy_entry(source: LocalStore, target: LocalStore, key: str) -> Copied | None:
    """Copy an entry between two folders; None: the source does not have it.

    Raises:
        As `adopt`.
    """
    manifest = source.peek(key)
    if manifest is None or manifest.key not in source:
        return None
    return adopt(target, manifest, lambda blob: draft_blob(target.layout, _pieces(source, blob)))


def compared(manifest: Manifest) -> frozenset[str] | None:
    """The files in which two results of one key must be equal: tensors; what was written about them may differ."""
    return frozenset(name for name in manifest.blobs if name.endswith(".safetensors")) or None


def contradicts(there: Manifest, other: Manifest) -> bool:
    """Whether two results of one key show that its computation is not deterministic."""
    names = (compared(there) or frozenset()) | (compared(other) or frozenset())
    names = names or frozenset({*there.blobs, *other.blobs})
    return there.basis == other.basis and any(there.blobs.get(name) != other.blobs.get(name) for name in names)


def checked_draft(draft: Draft, blob: Blob) -> Draft:
    """The draft.

    Raises:
        VerificationError: it is of other bytes; it is removed.
    """
    if draft.blob != blob:
        durable.clear(draft.path)
        raise VerificationError(
            f"the other store has {draft.blob.size:,} bytes with sha256 {draft.blob.sha256[:12]}… in place of the "
            f"{blob.size:,} with {blob.sha256[:12]}… that its manifest names"
        )
    return draft


def _check_size(manifest: Manifest) -> None:
    if manifest.size > MOST_BYTES or len(manifest.blobs) > _MOST_FILES:
        raise VerificationError(
            f"the entry '{manifest.key}' would have {manifest.size:,} bytes in {len(manifest.blobs):,} files; at most "
            f"{MOST_BYTES:,} in {_MOST_FILES:,} are taken over"
        )


def _pieces(store: LocalStore, blob: Blob) -> Iterable[Any]:
    path = store.layout.blob(blob.sha256)
    try:
        with open_regular(path) as file:
            left = blob.size + 1
            while left and (piece := file.read(min(_PIECE, left))):
                left -= len(piece)
                yield piece
    except FileNotFoundError as error:
        raise VerificationError(f"'{store.layout.root}' has lost the blob {blob.sha256[:12]}…") from error
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise RemoteError(f"'{path}' cannot be read: {error.strerror or error}") from error


def _again(read: Callable[[Blob], Draft], blob: Blob) -> Iterable[Any]:
    """A blob's bytes once more: pruning took it while its manifest was published."""
    draft = checked_draft(read(blob), blob)
    try:
        with draft.path.open("rb") as file:
            while piece := file.read(_PIECE):
                yield piece
    finally:
        durable.clear(draft.path)
