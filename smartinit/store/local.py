"""A store in a folder: correct for any number of processes and machines, without a lock.

Blobs are written first and named by their content, a manifest makes the entry exist, and every step is a rename. So
whoever is killed leaves either nothing or the whole; two writers of one key write the same, or the second is told.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import secrets
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit.errors import ArtefactError, StoreError, VerificationError
from smartinit.store import durable
from smartinit.store.blobs import check_size, checksum, draft_blob, keep_blob, settle_blob, write_blob
from smartinit.store.entry import MAIN, Entry, read_blob
from smartinit.store.folder import check_space, check_store, make_store, writing
from smartinit.store.keys import Key, check_name
from smartinit.store.layout import Layout
from smartinit.store.leases import take_lease
from smartinit.store.manifest import MAX_BYTES, Manifest
from smartinit.store.regular import read_small
from smartinit.store.sources import chunks, describe, gather, size
from smartinit.store.trash import put_back

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from smartinit.store.blobs import Draft
    from smartinit.store.entry import Own
    from smartinit.store.leases import Lease
    from smartinit.store.sources import Source

_LOST = {errno.ENOENT, errno.ESTALE, errno.ENOTDIR}
_LOOKS = 4  # at a name that others change at the same time


class LocalStore:
    """Entries in a folder.

    Args:
        root: the folder; made when something is first put in.
        read_only: change nothing there: no entries, no marks of use, no quarantine.
    """

    def __init__(self, root: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.layout = Layout(Path(root).expanduser().absolute())  # the process may go elsewhere
        self.read_only = read_only
        self._ready = False
        check_store(self.layout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.layout.root)!r})"

    def put(
        self,
        key: Key | str,
        tensors: Mapping[str, torch.Tensor] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        files: Mapping[str, bytes | Path] | None = None,
        tags: Iterable[str] = (),
        basis: str = "",
        replace: bool = False,
        compare: Iterable[str] | None = None,
    ) -> Manifest:
        """Store a result: whole, or not at all.

        If the key has a result already, that stays. One that differs although its basis is the same shows that the
        computation is not deterministic: it is kept aside, with a warning.

        Args:
            key: what it is the result of.
            tensors: name -> tensor.
            meta: JSON values.
            files: further files by name: their bytes, or where they are.
            tags: groups that it can be found by (`keys`).
            basis: see `Manifest.basis`.
            replace: take the place of the result that is there.
            compare: the files that must be equal in two results of one key; None: all of them.

        Returns:
            The manifest that the key has now.

        Raises:
            StoreError: the store is read-only, the disk is full, or it cannot be written; nothing is left behind.
            ConfigError, ArgumentError: no key, or values that cannot be stored.
        """
        self.check_writable()
        sources = gather(tensors, files)
        draft = describe(check_name(key), key, sources, tags=tags, meta=meta or {}, basis=basis)
        names = None if compare is None else frozenset(compare)
        with writing(self.layout):
            for _ in range(_LOOKS):
                with suppress(FileNotFoundError):  # someone has removed a folder, or swept the temporary files
                    return self._write(draft, sources, replace=replace, compare=names)
            return self._write(draft, sources, replace=replace, compare=names)

    def get(self, key: Key | str, *, tensors: bool = True, own: Own = False) -> Entry | None:
        """The entry of a key, every byte of which has been checked; None if there is none.

        What is found broken is put into quarantine with a warning, and is None as well.

        Args:
            key: its name.
            tensors: False: only the files are wanted (and torch is not imported).
            own: True: the tensors are to lie in memory of one's own, where they are checked while they are read. Or
                tensors of the same names, shapes and dtypes, contiguous and on the CPU, into which they are read; if
                the result is None, what these hold is of no use.

        Raises:
            ArgumentError: ``own`` holds other tensors than the entry.

        Cost: one read of the entry; the tensors are mapped unless they are to be one's own.
        """
        name = check_name(key)
        if _which(self.layout.entry(name)) is None:  # no lease on what is not there
            return None
        lease, entry, last = None if self.read_only else take_lease(self.layout, name), None, None
        try:
            for _ in range(_LOOKS):
                manifest = self.peek(name)
                if manifest is None or manifest == last:
                    break
                entry = self._open(manifest, lease, as_tensors=tensors, own=own)
                if entry is not None:
                    break
                last = manifest  # another one may have taken its place, and its blobs have gone
        finally:
            if entry is None and lease is not None:
                lease.release()
        if entry is not None:
            self.mark_used(name)
        return entry

    def peek(self, key: Key | str) -> Manifest | None:
        """The manifest of a key alone; None if there is none, or no sound one. Cost: one small file."""
        name = check_name(key)
        path = self.layout.entry(name)
        which = _which(path)
        try:
            return Manifest.from_bytes(read_small(path, MAX_BYTES), name)
        except VerificationError as error:
            self.discard(path, str(error), which)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            if error.errno not in _LOST:
                warnings.warn(
                    f"'{path}' cannot be read ({error.strerror or error}); it counts as missing", stacklevel=3
                )
        return None

    def __contains__(self, key: object) -> bool:
        """Whether there is an entry with all its blobs, which are not read."""
        return isinstance(key, (Key, str)) and self._whole(check_name(key)) is not None

    def keys(self, tag: str | None = None) -> Iterator[str]:
        """All keys, in no order; or those with a tag. Nothing but names is read.

        Cost: one listing of a folder; memory for one name.
        """
        folder = self.layout.entries if tag is None else self.layout.index(check_name(tag))
        suffix = ".json" if tag is None else ""
        try:
            with os.scandir(folder) as items:
                for item in items:
                    name = item.name.removesuffix(suffix) if item.name.endswith(suffix) else ""
                    with suppress(ValueError):
                        yield check_name(name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise StoreError(f"'{folder}' cannot be listed: {error.strerror or error}") from error

    def remove(self, key: Key | str) -> bool:
        """Forget an entry; its blobs stay until they are pruned. Whether there was one.

        Raises:
            StoreError: the store is read-only, or cannot be written.
        """
        name, layout = check_name(key), self.layout
        self.check_writable()
        manifest = self.peek(name)
        with writing(self.layout):
            found = durable.remove(layout.entry(name))
        marks = [layout.used / name, layout.pins / name]
        marks += [layout.index(tag) / name for tag in (manifest.tags if manifest is not None else ())]
        for mark in marks:
            durable.clear(mark)
        return found

    def mark_used(self, key: str) -> None:
        """Now is the entry's last use."""
        if not self.read_only:
            with suppress(OSError):
                durable.touch(self.layout.used / key)

    def discard(self, path: Path, why: str, which: tuple[int, int] | None = None) -> None:
        """Put a broken file into quarantine, where nothing reads it, and say so.

        Args:
            path: where it lies.
            why: a sentence.
            which: device and inode of the file that is meant: one that has been put in its place since stays.
        """
        done = "it counts as missing"
        if not self.read_only and which in (None, _which(path)):
            aside = self.layout.quarantine / f"{path.name}.{secrets.token_hex(4)}"
            with suppress(OSError):
                durable.make_folder(aside.parent)
                durable.publish(path, aside)
                if which in (None, _which(aside)):
                    done = "it was put into quarantine, and will be computed again"
                else:  # it was replaced at this very moment
                    durable.publish_once(aside, path)
        warnings.warn(f"{why}; {done}", stacklevel=4)

    def _open(self, manifest: Manifest, lease: Lease | None, *, as_tensors: bool, own: Own) -> Entry | None:
        files, tensors, contents = {}, {}, {}
        for name, blob in manifest.blobs.items():  # all of them: a broken one that stayed would break the next entry
            path = self.layout.blob(blob.sha256)
            if not self.read_only and not path.exists():
                put_back(self.layout, blob.sha256)
            files[name], which = path, _which(path)
            mapped, ours = as_tensors and name.endswith(".safetensors"), own is True or (own if name in MAIN else False)
            try:
                contents[name], tensors[name] = read_blob(path, blob, as_tensors=mapped, own=ours)
            except (VerificationError, ArtefactError) as error:
                self.discard(path, f"entry '{manifest.key}': {error}", which)
            except (OSError, RuntimeError) as error:
                if getattr(error, "errno", None) not in _LOST and path.exists():
                    warnings.warn(f"entry '{manifest.key}': '{path}' cannot be read ({error})", stacklevel=3)
        return Entry(manifest, files, tensors, contents, lease) if len(tensors) == len(manifest.blobs) else None

    def _write(
        self, draft: Manifest, sources: Mapping[str, Source], *, replace: bool, compare: frozenset[str] | None
    ) -> Manifest:
        """Everything to temporary files first: a full disk is met before any name is given."""
        if not (self._ready and self.layout.unfinished.is_dir()):
            make_store(self.layout)
            self._ready = True
        check_space(self.layout, sum(size(source) for source in sources.values()))
        drafts: dict[str, Draft] = {}
        try:
            for file, source in sources.items():
                drafts[file] = draft_blob(self.layout, chunks(source))
            blobs = {file: written.blob for file, written in drafts.items()}
            manifest = dataclasses.replace(draft, blobs=blobs, created=time.time())
            return self.finish(manifest, drafts.values(), sources, replace=replace, compare=compare)
        finally:
            for written in drafts.values():
                durable.clear(written.path)

    def finish(
        self,
        manifest: Manifest,
        drafts: Iterable[Draft],
        sources: Mapping[str, Source],
        *,
        replace: bool = False,
        compare: frozenset[str] | None = None,
    ) -> Manifest:
        """Make an entry exist.

        Args:
            manifest: of the entry.
            drafts: its blobs, as far as they are not there.
            sources: where its files came from, for blobs that pruning takes in this moment.
            replace: see `put`.
            compare: see `put`.

        Returns:
            The manifest that the key has now.

        Raises:
            OSError: it cannot be written.
        """
        unfinished = self.layout.new_file()
        try:
            durable.write_new(unfinished, [manifest.to_bytes()])
            for written in drafts:
                settle_blob(self.layout, written)
            there = self._publish(manifest, unfinished, sources, replace=replace)
        finally:
            durable.clear(unfinished)
        names = manifest.blobs.keys() | there.blobs.keys() if compare is None else compare
        differs = any(there.blobs.get(name) != manifest.blobs.get(name) for name in names)
        if differs and there.basis == manifest.basis:
            self.keep_aside(manifest)
        return there

    def _publish(
        self, manifest: Manifest, unfinished: Path, sources: Mapping[str, Source], *, replace: bool
    ) -> Manifest:
        """Make the entry exist, its blobs being there.

        Args:
            manifest: of the entry.
            unfinished: a temporary file with its bytes.
            sources: where the blobs came from, for those that pruning takes in this moment.
            replace: see `put`.
        """
        path = self.layout.entry(manifest.key)
        durable.make_folder(path.parent)
        for tag in manifest.tags:
            durable.touch(self.layout.index(tag) / manifest.key, lasting=True)
        there = None
        for _ in range(_LOOKS):
            there = None if replace else self._whole(manifest.key)
            if there is not None:
                durable.flush_folder(path.parent)  # who has put it there may not have come so far
                self.mark_used(manifest.key)
                break
            if not (replace or path.exists()) and durable.publish_once(unfinished, path):
                break
            if not unfinished.exists():  # someone else was first, this very moment
                durable.write_new(unfinished, [manifest.to_bytes()])
            elif replace or self._whole(manifest.key) is None:  # one that has lost its blobs makes room
                durable.publish(unfinished, path)
                break
        else:
            raise StoreError(f"the entry '{manifest.key}' is written and removed by others all the time; try again")
        there = there or manifest
        origin = {blob: sources[file] for file, blob in manifest.blobs.items()}
        for blob in there.blobs.values():  # pruning may have taken one that nothing named until now
            if blob in origin and not keep_blob(self.layout, blob):
                write_blob(self.layout, chunks(origin[blob]))
        for tag in manifest.tags:  # and marks, which led to nothing
            durable.touch(self.layout.index(tag) / manifest.key)
        return there

    def _whole(self, key: str) -> Manifest | None:
        """The manifest of a key if its blobs are there."""
        manifest = self.peek(key)
        if manifest is None:
            return None
        try:
            for blob in manifest.blobs.values():
                check_size(self.layout.blob(blob.sha256), blob)
        except (OSError, VerificationError):
            return None
        return manifest

    def keep_aside(self, manifest: Manifest) -> None:
        """Name another result for a key that has one, and warn.

        Raises:
            OSError: it cannot be written.
        """
        differing = json.dumps({name: blob.sha256 for name, blob in manifest.blobs.items()}, sort_keys=True).encode()
        path = self.layout.aside / f"{manifest.key}.{checksum(memoryview(differing))[:16]}.json"
        if not path.exists():
            durable.make_folder(path.parent)
            durable.write_once(self.layout.new_file(), path, manifest.to_bytes())
        warnings.warn(
            f"another result for the entry '{manifest.key}' than the one that is stored: the computation is not "
            f"deterministic on these machines; the first one stays, the other is named in '{path}'",
            stacklevel=4,
        )

    def check_writable(self) -> None:
        """Refuse to write to what was opened for reading.

        Raises:
            StoreError: see above.
        """
        if self.read_only:
            raise StoreError(f"the store '{self.layout.root}' was opened read-only; name another one to write to")


def _which(path: Path) -> tuple[int, int] | None:
    """Device and inode of the file that has a name now; None: no file."""
    try:
        state = path.lstat()
    except OSError:
        return None
    return state.st_dev, state.st_ino
