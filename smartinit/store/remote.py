"""A store on another machine: the same files as in a folder, and none of them believed.

    remote = RemoteStore("s3://team/smartinit")
    remote.fetch(key, local)      # blobs, checked while they come; then the entry
    remote.send(key, local)       # blobs first, the manifest last; what is there is not sent again

Only `entries`, `blobs`, `index`, `aside`, `signatures` and ``smartinit-store.json`` are used. Nothing is ever removed:
who may prune a shared store does so where its folder lies, or by the rules of the bucket.
"""

from __future__ import annotations

import hashlib
import json
import threading
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from smartinit.errors import SmartinitError, VerificationError
from smartinit.store.adoption import Copied, adopt, contradicts
from smartinit.store.blobs import draft_blob
from smartinit.store.keys import SCHEMA, check_name
from smartinit.store.manifest import MAX_BYTES, Manifest
from smartinit.store.signing import MOST_BYTES as LONGEST_SIGNATURE
from smartinit.store.signing import signature_name, signer_of, trust_of
from smartinit.store.transport import ATTEMPTS, TIMEOUT, RemoteError, Transport

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from smartinit.store.blobs import Blob, Draft
    from smartinit.store.keys import Key
    from smartinit.store.local import LocalStore
    from smartinit.store.signing import Signer, Trust

_SCHEMA_FILE = "smartinit-store.json"
_LONGEST_SCHEMA = 1 << 16


class RemoteStore:
    """Entries below a URL.

    Args:
        url: such as ``s3://bucket/folder``; see `smartinit.store.connections` for the protocols.
        timeout: seconds that any answer, or the next piece of a file, may take.
        attempts: how often anything is tried.
        signing_key: file of a private key for what is sent; None: see `smartinit.store.signing`.
        trusted_keys: file or folder of public keys, without whose signature nothing is read; None: likewise.
        storage_options: of fsspec's file system, such as ``endpoint_url``.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        attempts: int = ATTEMPTS,
        signing_key: str | os.PathLike[str] | None = None,
        trusted_keys: str | os.PathLike[str] | None = None,
        **storage_options: Any,  # noqa: ANN401 - fsspec's
    ) -> None:
        self.transport = Transport(url, storage_options, timeout=timeout, attempts=attempts)
        self._places = (signing_key, trusted_keys)
        self._keys: tuple[Signer | None, Trust | None] | None = None
        self._lock = threading.Lock()
        self._known: bool | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.transport.shown!r})"

    def peek(self, key: Key | str) -> Manifest | None:
        """The manifest of a key, checked; None if there is none. Cost: one small file, with trusted keys two.

        Raises:
            VerificationError: it is broken, or nobody trusted has signed it.
            RemoteError: the store cannot be reached, or a newer version has made it.
        """
        name = check_name(key)
        content = self._manifest_bytes(name)
        return None if content is None else self._checked(content, name)

    def keys(self, tag: str | None = None) -> Iterator[str]:
        """All keys, in no order; or those with a tag. Cost: one listing; memory for all names.

        Raises:
            RemoteError: the store cannot be reached.
        """
        self._check_schema()
        folder, suffix = ("entries", ".json") if tag is None else (f"index/{check_name(tag)}", "")
        for item in self.transport.names(folder):
            name = item.removesuffix(suffix) if item.endswith(suffix) else ""
            with suppress(ValueError):
                yield check_name(name)

    def fetch(self, key: Key | str, into: LocalStore, manifest: Manifest | None = None) -> Copied | None:
        """Copy an entry to a folder; None: the store does not have it.

        Args:
            key: its name.
            into: takes it, when every byte has been checked.
            manifest: of the entry, if `peek` has just returned it.

        Raises:
            VerificationError: something there is not what it should be; the folder has nothing of it.
            RemoteError: the store cannot be reached.
            StoreError: the folder cannot be written.

        Cost: what is missing is read once, and written once.
        """
        name = check_name(key)
        manifest = self.peek(name) if manifest is None else manifest
        return None if manifest is None else adopt(into, manifest, lambda blob: self._download(blob, name, into))

    def send(self, key: Key | str, store: LocalStore) -> Copied | None:
        """Copy an entry of a folder here; None: the folder does not have it, or not in order.

        What is here stays: an equal entry as it is; one with other tensors of the same inputs is a conflict, of which
        a note is put into ``aside``. One that is broken is replaced.

        Raises:
            RemoteError: the store cannot be reached, or written to.

        Cost: the entry is read twice, and sent as far as it is not here.
        """
        name = check_name(key)
        entry = store.get(name, tensors=False)
        if entry is None:
            return None
        with entry:
            self._make()
            there, found = self._present(name)
            if there is not None and self._has(there):
                return self._keep(there, entry.manifest)
            sent = 0
            for file, path in entry.files.items():
                blob = entry.manifest.blobs[file]
                if self.transport.size(_blob_name(blob)) != blob.size:
                    self.transport.upload(_blob_name(blob), path)
                    sent += blob.size
            if there is not None and there.blobs == entry.manifest.blobs:  # it had lost blobs
                return Copied(sent, new=True)
            content = entry.manifest.to_bytes()
            self._sign(content)
            for tag in entry.manifest.tags:
                self.transport.put(f"index/{check_name(tag)}/{name}", b"", once=True)
            if self.transport.put(f"entries/{name}.json", content, once=not found):
                return Copied(sent, new=True)
            there, _ = self._present(name)  # someone was faster
            return Copied(sent, new=True) if there is None else self._keep(there, entry.manifest, sent)

    def _keep(self, there: Manifest, ours: Manifest, sent: int = 0) -> Copied:
        if not contradicts(there, ours):
            return Copied(sent)
        content = ours.to_bytes()
        what = json.dumps({name: blob.sha256 for name, blob in ours.blobs.items()}, sort_keys=True).encode()
        name = f"aside/{ours.key}.{hashlib.sha256(what).hexdigest()[:16]}.json"
        self.transport.put(name, content, once=True)
        warnings.warn(
            f"the store '{self.transport.shown}' has another result for the entry '{ours.key}': the computation is "
            f"not deterministic on these machines; that one stays, this one is named there in '{name}'",
            stacklevel=4,
        )
        return Copied(sent, conflict=True)

    def _present(self, name: str) -> tuple[Manifest | None, bool]:
        """The manifest that is here, if it is sound; and whether there is any."""
        try:
            content = self._manifest_bytes(name)
            return (None, False) if content is None else (self._checked(content, name), True)
        except VerificationError as error:
            warnings.warn(f"{error}; it is replaced in '{self.transport.shown}'", stacklevel=4)
            return None, True

    def _has(self, manifest: Manifest) -> bool:
        """Whether all blobs are here, by their sizes."""
        return all(self.transport.size(_blob_name(blob)) == blob.size for blob in set(manifest.blobs.values()))

    def _download(self, blob: Blob, key: str, into: LocalStore) -> Draft:
        name = _blob_name(blob)

        def download() -> Draft:
            return draft_blob(into.layout, self.transport.stream(name, blob.size))

        try:
            return self.transport.attempt(f"'{name}' cannot be read", download)
        except RemoteError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise VerificationError(
                    f"the entry '{key}' in '{self.transport.shown}' names a blob that is not there: {blob.sha256[:12]}…"
                ) from error
            raise

    def _manifest_bytes(self, name: str) -> bytes | None:
        self._check_schema()
        return self.transport.read_small(f"entries/{name}.json", MAX_BYTES)

    def _checked(self, content: bytes, name: str) -> Manifest:
        try:
            manifest = Manifest.from_bytes(content, name)
        except VerificationError as error:
            raise VerificationError(f"{error} (in '{self.transport.shown}')") from error
        except OSError as error:  # a newer schema
            raise RemoteError(f"{error} (in '{self.transport.shown}')") from error
        trust = self._signatures()[1]
        if trust is not None:
            trust.check(content, name, lambda file: self.transport.read_small(file, LONGEST_SIGNATURE))
        return manifest

    def _sign(self, content: bytes) -> None:
        signer = self._signatures()[0]
        if signer is not None:
            self.transport.put(signature_name(content, signer.public), signer.sign(content))

    def _signatures(self) -> tuple[Signer | None, Trust | None]:
        if self._keys is None:
            self._keys = signer_of(self._places[0]), trust_of(self._places[1])
        return self._keys

    def _make(self) -> None:
        """The store's own file, unless there is one."""
        with self._lock:
            if not self._known_schema():
                self.transport.put(_SCHEMA_FILE, json.dumps({"schema": SCHEMA}).encode() + b"\n", once=True)
                self._known = True

    def _check_schema(self) -> None:
        with self._lock:
            self._known_schema()

    def _known_schema(self) -> bool:
        """Whether there is a store; asked once.

        Raises:
            RemoteError: it is of another version.
        """
        if self._known is None:
            try:
                content = self.transport.read_small(_SCHEMA_FILE, _LONGEST_SCHEMA)
                found = None if content is None else json.loads(content).get("schema")
            except SmartinitError as error:
                if not isinstance(error, VerificationError):
                    raise
                content, found = b"", None
            except (ValueError, AttributeError, RecursionError):  # it says nothing; keys and manifests do
                content, found = b"", None
            if found is not None and found != SCHEMA:
                raise RemoteError(
                    f"the store '{self.transport.shown}' has schema {found!r}, but this version knows {SCHEMA}; "
                    "upgrade smartinit, or name another store"
                )
            self._known = content is not None
        return self._known


def _blob_name(blob: Blob) -> str:
    return f"blobs/sha256/{blob.sha256[:2]}/{blob.sha256}"
