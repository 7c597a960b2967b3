"""What is fuzzed: functions of bytes that may do one of two things, give a sound value or raise an expected error."""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import re
import shutil
import struct
import tempfile
import time
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch

from smartinit.errors import ArtefactError, ConfigError, StoreError, VerificationError
from smartinit.formats.safetensors_header import read_header
from smartinit.formats.tensor_file import places_for, tensor_chunks, tensors_in
from smartinit.store.blobs import Blob, checksum
from smartinit.store.file_memo import FileMemo
from smartinit.store.keys import check_name
from smartinit.store.local import LocalStore
from smartinit.store.manifest import Manifest
from smartinit.store.remote import RemoteStore

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = "key"
_REFUSED = (StoreError, VerificationError, ConfigError, ArtefactError)
_TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.int8), "c": torch.zeros(0, 2)}


class FindingError(AssertionError):
    """A target did what it must not do."""


def seal(body: bytes) -> bytes:
    """A manifest that answers for itself, whatever it says; ``body`` lacks its closing brace."""
    return body + b',"check":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def manifest_bytes() -> bytes:
    """A sound manifest, to begin with."""
    blobs = {"tensors.safetensors": _blob(), "start/more.json": Blob("0" * 64, 0, "1" * 32)}
    leaves = {"method": {"name": "eva", "rho": 2.0}, "model": ["a", None, True]}
    return Manifest(KEY, blobs, "artefact", leaves, {"x": 1}, ("tag",), "basis", 1.5, {"host": "x"}).to_bytes()


def manifest_body() -> bytes:
    """The same without what seals it."""
    return manifest_bytes().rpartition(b',"check"')[0]


def header_case() -> bytes:
    """A sound case for `header`."""
    content = b"".join(bytes(chunk) for chunk in tensor_chunks(_TENSORS))
    (length,) = struct.unpack("<Q", content[:8])
    return b"\1" + bytes([len(content) - 8 - length]) + content[8 : 8 + length]


def manifest(data: bytes) -> None:
    """Any bytes as a manifest, as they are and sealed: sound, or refused in words that a terminal may show."""
    for content in (data, seal(data)):
        try:
            found = Manifest.from_bytes(content, KEY)
        except (VerificationError, StoreError) as error:
            _check_text(error)
            continue
        if Manifest.from_bytes(found.to_bytes(), KEY) != found:
            raise FindingError("a manifest that reads otherwise when it is written again")
        if any(name.startswith("/") or ".." in name.split("/") for name in found.blobs):
            raise FindingError("a file outside")
        _ = time.gmtime(found.created), f"{found.size / 1e6:.1f}"  # what a listing shows


def header(data: bytes) -> None:
    """A safetensors file: the first byte says whether ``data`` is all of it, or its header and its number of bytes."""
    content = data[1:]
    if data[:1] != b"\0":
        content = struct.pack("<Q", len(data[2:])) + data[2:] + bytes(data[1] if len(data) > 1 else 0)
    ours = None
    try:
        ours = tensors_in(torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)], "x")
    except ArtefactError as error:
        _check_text(error)
    own = None
    with suppress(ArtefactError):
        own = places_for(io.BytesIO(content).read, len(content), "x")[2]
    if (own is None) != (ours is None) or (own is not None and ours is not None and _shapes(own) != _shapes(ours)):
        raise FindingError("mapped and read, it is not the same")
    path = _folder() / "x.safetensors"
    path.write_bytes(content)
    with suppress(ValueError):
        entries = read_header(path)
        if ours is not None and {name: entry.shape for name, entry in entries.items()} != _shapes(ours):
            raise FindingError("two readers disagree")
    try:
        theirs = dict(safetensors.deserialize(content))
    except Exception:  # noqa: BLE001 - whatever it does not like
        return
    if ours is not None and {name: tuple(one["shape"]) for name, one in theirs.items()} != _shapes(ours):
        raise FindingError("safetensors reads something else")


def key(data: bytes) -> None:
    """Any text as a key: a plain file name, or refused."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        name = check_name(text)
    except ConfigError as error:
        _check_text(error)
        return
    if not re.fullmatch(r"[a-z0-9_-]{1,128}", name) or name != text or Path(name).name != name:
        raise FindingError(f"{name!r} is no plain name")


def memo(data: bytes) -> None:
    """Any bytes as a note about a file, sealed or not: what was computed comes back."""
    folder = _folder() / "memo"
    subject = folder.parent / "subject"
    if not subject.exists():
        subject.write_text("x")
    notes = FileMemo(folder)
    for content in (data, _sealed_note(data)):
        for note in _notes(notes, subject):
            note.write_bytes(content)
        found = notes.recall(subject, "kind", lambda _: "computed", lambda value: value == "computed")
        if found != "computed":
            raise FindingError(f"the memo gave {found!r}")


def entry(data: bytes) -> None:
    """An entry of a store on disk, whose manifest is ``data``, sealed: whole, or a miss."""
    root = _folder() / "store"
    local = LocalStore(root, read_only=True)
    _place(root, local, seal(data))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = local.get(KEY)
        except _REFUSED as error:
            _check_text(error)
            found = None
    for one in said:
        _check_text(one.message)
    if found is not None:
        _ = [tensor.sum() for tensors in found._tensors.values() for tensor in tensors.values()]  # noqa: SLF001
        found.close()


def remote(data: bytes) -> None:
    """An entry of a remote store, whose manifest is ``data``, sealed: taken over whole, or refused."""
    there, here = _folder() / "remote", _folder() / "here"
    _place(there, LocalStore(there, read_only=True), seal(data))
    local = LocalStore(here)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            RemoteStore(there.as_uri()).fetch(KEY, local)
        except _REFUSED as error:
            _check_text(error)
    for one in said:
        _check_text(one.message)
    with suppress(FileNotFoundError):
        for path in (here / "entries").iterdir():
            if path.name != f"{KEY}.json":
                raise FindingError(f"{path.name!r} was written")
            path.unlink()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": manifest,
    "header": header,
    "key": key,
    "memo": memo,
    "entry": entry,
    "remote": remote,
}
SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "manifest": lambda: [manifest_body(), manifest_bytes()],
    "header": lambda: [header_case(), b"\0" + b"".join(bytes(chunk) for chunk in tensor_chunks(_TENSORS))],
    "key": lambda: [b"key", b"../x", b"a" * 64],
    "memo": lambda: [b'{"file":["x",1,2,3,4],"value":"other"}'],
    "entry": lambda: [manifest_body()],
    "remote": lambda: [manifest_body()],
}


def _check_text(message: object) -> None:
    text = str(message)
    if not text.isprintable() or len(text) > 2000:  # noqa: PLR2004 - a screen
        raise FindingError(f"a message that no terminal should show: {text[:300]!r}")


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@cache
def _folder() -> Path:
    """Scratch of this process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def _content() -> bytes:
    return b"".join(bytes(chunk) for chunk in tensor_chunks(_TENSORS))


@cache
def _blob() -> Blob:
    content = _content()
    return Blob(hashlib.sha256(content).hexdigest(), len(content), checksum(memoryview(content)))


def _place(root: Path, local: LocalStore, content: bytes) -> None:
    blob = local.layout.blob(_blob().sha256)
    if not blob.exists():
        blob.parent.mkdir(parents=True)
        blob.write_bytes(_content())
        local.layout.entries.mkdir(parents=True)
        (root / "smartinit-store.json").write_text('{"schema": 1}\n')
    local.layout.entry(KEY).write_bytes(content)


def _notes(notes: FileMemo, subject: Path) -> list[Path]:
    if not notes.folder.is_dir():
        os.utime(subject, (1e9, 1e9))
        notes.folder.mkdir()
        now = time.time_ns
        time.time_ns = lambda: now() + 10**11  # type: ignore[assignment]  # the file has not changed for long
        try:
            notes.recall(subject, "kind", lambda _: "computed", lambda _: True)
        finally:
            time.time_ns = now  # type: ignore[assignment]
    found = list(notes.folder.iterdir())
    if len(found) != 1:
        raise FindingError(f"{len(found)} notes")
    return found


def _sealed_note(data: bytes) -> bytes:
    with suppress(ValueError, RecursionError, TypeError, AttributeError, KeyError):
        content = json.loads(data)
        whole = json.dumps({"file": content["file"], "value": content["value"]}, sort_keys=True, separators=(",", ":"))
        content["sum"] = hashlib.sha256(whole.encode()).hexdigest()
        return json.dumps(content).encode()
    return data
