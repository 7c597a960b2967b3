"""A store in a folder: correct for any number of processes and machines, without a lock.

Blobs are written first and named by their content, a manifest makes the entry exist, and every step is a rename. So
whoever is killed leaves either nothing or the whole; two writers of one key write the same, or the second is told.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import secrets
import socket
import time
import warnings
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartinit import __version__
from smartinit.errors import ArtefactError, StoreError, VerificationError
from smartinit.store import durable
from smartinit.store.blobs import check_size, checksum, keep_blob, write_blob
from smartinit.store.entry import TENSORS, Entry
from smartinit.store.keys import SCHEMA, Key, canonical, check_name
from smartinit.store.layout import Layout
from smartinit.store.leases import take_lease
from smartinit.store.manifest import MAX_BYTES, Manifest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from smartinit.store.blobs import Blob
    from smartinit.store.leases import Lease

_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This folder holds what smartinit can compute again; backups may leave it out.\n"
)
_MARGIN = 8 << 20  # bytes that are left free on the disk
_LOST = {errno.ENOENT, errno.ESTALE, errno.ENOTDIR}


class LocalStore:
    """Entries in a folder.

    Args:
        root: the folder; made when something is first put in.
        read_only: change nothing there: no entries, no marks of use, no quarantine.
    """

    def __init__(self, root: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self.layout = Layout(Path(root).expanduser())
        self.read_only = read_only
        self._ready = False
        self._check_schema()

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

        Returns:
            The manifest that the key has now.

        Raises:
            StoreError: the store is read-only, the disk is full, or it cannot be written; nothing is left behind.
            ConfigError, ArgumentError: no key, or values that cannot be stored.
        """
        name = check_name(key)
        tags = tuple(check_name(tag) for tag in tags)
        canonical(meta or {})  # what cannot be stored is told before anything is
        self._prepare()
        sources: dict[str, bytes | Path | Mapping[str, torch.Tensor]] = dict(files or {})
        if tensors is not None:
            sources[TENSORS] = tensors
        self._check_space(sources)
        try:
            blobs = {file: write_blob(self.layout, _chunks(source)) for file, source in sources.items()}
            manifest = Manifest(
                key=name,
                blobs=blobs,
                kind=key.kind if isinstance(key, Key) else "",
                leaves=key.leaves if isinstance(key, Key) else {},
                meta=meta or {},
                tags=tags,
                basis=basis,
                created=time.time(),
                writer={"smartinit": __version__, "torch": version("torch"), "host": socket.gethostname()},
            )
            return self._publish(manifest, replace=replace, sources=sources)
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot write to the store '{self.layout.root}': {error.strerror or error}") from error

    def get(self, key: Key | str, *, tensors: bool = True) -> Entry | None:
        """The entry of a key, every byte of which has been checked; None if there is none.

        What is found broken is put into quarantine with a warning, and is None as well.

        Args:
            key: its name.
            tensors: False: only the files are wanted (and torch is not imported).

        Cost: one read of the entry; the tensors are mapped, not copied.
        """
        name = check_name(key)
        lease = None if self.read_only else take_lease(self.layout, name)
        entry = None
        try:
            manifest = self.peek(name)
            entry = None if manifest is None else self._open(manifest, lease, as_tensors=tensors)
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
        try:
            return Manifest.from_bytes(_read_small(path), name)
        except VerificationError as error:
            self.discard(path, str(error))
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            if error.errno not in _LOST:
                warnings.warn(
                    f"'{path}' cannot be read ({error.strerror or error}); it counts as missing", stacklevel=3
                )
        return None

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (Key, str)) and self.peek(key) is not None

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

    def remove(self, key: Key | str) -> bool:
        """Forget an entry; its blobs stay until they are pruned. Whether there was one."""
        name = check_name(key)
        self._prepare()
        found = durable.remove(self.layout.entry(name))
        for mark in (self.layout.used / name, self.layout.pins / name):
            with suppress(OSError):
                durable.remove(mark)
        return found

    def mark_used(self, key: str) -> None:
        """Now is the entry's last use."""
        if not self.read_only:
            with suppress(OSError):
                durable.touch(self.layout.used / key)

    def discard(self, path: Path, why: str) -> None:
        """Put a broken file into quarantine, where nothing reads it, and say so."""
        done = "it counts as missing"
        if not self.read_only:
            with suppress(OSError):
                durable.make_folder(self.layout.quarantine)
                os.replace(path, self.layout.quarantine / f"{path.name}.{secrets.token_hex(4)}")  # noqa: PTH105
                done = "it was put into quarantine, and will be computed again"
        warnings.warn(f"{why}; {done}", stacklevel=4)

    def _open(self, manifest: Manifest, lease: Lease | None, *, as_tensors: bool) -> Entry | None:
        files, tensors = {}, {}
        for name, blob in manifest.blobs.items():
            path = self.layout.blob(blob.sha256)
            files[name] = path
            try:
                check_size(path, blob)
                tensors[name] = _checked(path, blob, as_tensors=as_tensors and name.endswith(".safetensors"))
            except (VerificationError, ArtefactError) as error:
                self.discard(path, f"entry '{manifest.key}': {error}")
                return None
            except (OSError, RuntimeError) as error:
                if getattr(error, "errno", None) not in _LOST and path.exists():
                    warnings.warn(f"entry '{manifest.key}': '{path}' cannot be read ({error})", stacklevel=3)
                return None
        return Entry(manifest, files, tensors, lease)

    def _publish(self, manifest: Manifest, *, replace: bool, sources: Mapping[str, Any]) -> Manifest:
        path = self.layout.entry(manifest.key)
        durable.make_folder(path.parent)
        for tag in manifest.tags:
            durable.touch(self.layout.index(tag) / manifest.key)
        there = None if replace else self._whole(manifest.key)
        if there is None:
            unfinished = self.layout.new_file()
            durable.write_new(unfinished, [manifest.to_bytes()])
            if replace or path.exists():  # one that has lost its blobs makes room
                durable.publish(unfinished, path)
            else:
                durable.publish_once(unfinished, path)
            there = (None if replace else self._whole(manifest.key)) or manifest
        if there.blobs != manifest.blobs and there.basis == manifest.basis:
            self._keep_aside(manifest)
        for file, blob in there.blobs.items():  # pruning may have taken one that nothing named until now
            if blob in manifest.blobs.values() and not keep_blob(self.layout, blob):
                write_blob(self.layout, _chunks(sources[file]))
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

    def _keep_aside(self, manifest: Manifest) -> None:
        content = manifest.to_bytes()
        differing = json.dumps({name: blob.sha256 for name, blob in manifest.blobs.items()}, sort_keys=True).encode()
        path = self.layout.aside / f"{manifest.key}.{checksum(memoryview(differing))[:16]}.json"
        if not path.exists():
            durable.make_folder(path.parent)
            unfinished = self.layout.new_file()
            durable.write_new(unfinished, [content])
            durable.publish(unfinished, path)
        warnings.warn(
            f"another result for the entry '{manifest.key}' than the one that is stored: the computation is not "
            f"deterministic on these machines; the first one stays, the other is named in '{path}'",
            stacklevel=4,
        )

    def _prepare(self) -> None:
        """Make the store's own files, once.

        Raises:
            StoreError: it is read-only, or cannot be written.
        """
        if self.read_only:
            raise StoreError(f"the store '{self.layout.root}' was opened read-only; name another one to write to")
        if self._ready and self.layout.unfinished.is_dir():
            return
        layout = self.layout
        try:
            for folder in (layout.entries, layout.blobs, layout.unfinished):
                durable.make_folder(folder)
            schema = json.dumps({"schema": SCHEMA}).encode() + b"\n"
            for path, content in ((layout.tag, _TAG), (layout.schema, schema)):
                if not path.exists():
                    unfinished = layout.new_file()
                    durable.write_new(unfinished, [content], mode=0o644)
                    durable.publish(unfinished, path)
        except OSError as error:
            raise StoreError(f"cannot make the store '{layout.root}': {error.strerror or error}") from error
        self._ready = True

    def _check_schema(self) -> None:
        """Refuse what a newer version has made.

        Raises:
            StoreError: see above; or the root is a file.
        """
        root = self.layout.root
        if root.exists() and not root.is_dir():
            raise StoreError(f"'{root}' is a file; a store is a folder")
        try:
            found = json.loads(_read_small(self.layout.schema)).get("schema")
        except FileNotFoundError:
            return
        except (OSError, ValueError, AttributeError, RecursionError):
            found = None
        if found is not None and found != SCHEMA:
            raise StoreError(
                f"the store '{root}' has schema {found!r}, but this version knows {SCHEMA}; upgrade smartinit, or name "
                "another store"
            )

    def _check_space(self, sources: Mapping[str, Any]) -> None:
        needed = sum(_size(source) for source in sources.values())
        free = durable.free_bytes(self.layout.root)
        if needed + _MARGIN > free:
            raise StoreError(
                f"the store '{self.layout.root}' needs {needed / 1e6:,.0f} MB more, but its disk has {free / 1e6:,.0f} "
                "MB free; free some with `smartinit cache gc`, or name another store"
            )


def _checked(path: Path, blob: Blob, *, as_tensors: bool) -> Mapping[str, torch.Tensor]:
    """The tensors of a blob (none of another file), after its checksum was found right.

    Raises:
        VerificationError: it was changed.
        ArtefactError: it is no safetensors file.
    """
    tensors: Mapping[str, torch.Tensor] = {}
    if as_tensors:
        from smartinit.formats.tensor_file import map_tensors

        data, tensors = map_tensors(path, blob.size)
    elif blob.size:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    else:
        data = memoryview(b"")
    if checksum(data) != blob.xxh3:
        raise VerificationError(f"'{path}' was changed: its checksum differs")
    return tensors


def _chunks(source: bytes | Path | Mapping[str, torch.Tensor]) -> Iterator[Any]:
    if isinstance(source, bytes):
        yield source
    elif isinstance(source, Path):
        with source.open("rb") as file:
            while piece := file.read(1 << 22):
                yield piece
    else:
        from smartinit.formats.tensor_file import tensor_chunks

        yield from tensor_chunks(source)


def _size(source: bytes | Path | Mapping[str, torch.Tensor]) -> int:
    if isinstance(source, bytes):
        return len(source)
    if isinstance(source, Path):
        return source.stat().st_size
    return sum(tensor.numel() * tensor.element_size() for tensor in source.values() if hasattr(tensor, "numel"))


def _read_small(path: Path) -> bytes:
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise VerificationError(f"'{path}' is longer than any manifest")
    return content
