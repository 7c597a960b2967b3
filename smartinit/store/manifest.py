"""What an entry is: one small JSON file that names its blobs, and answers for its own bytes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smartinit.errors import StoreError, VerificationError
from smartinit.store.blobs import Blob
from smartinit.store.keys import SCHEMA, canonical, check_name

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES = 32 << 20
"""Longest manifest that is read."""
_SHA = re.compile(r"[0-9a-f]{64}")
_XXH = re.compile(r"[0-9a-f]{32}")
# Names of an entry's files: at most one folder, no leading dots, nothing that any file system takes for more.
_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,99}/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,149}")
_END = re.compile(rb',"check":"([0-9a-f]{64})"}\n')
_END_LENGTH = len(b',"check":"') + 64 + len(b'"}\n')


@dataclass(frozen=True)
class Manifest:
    """An entry without its bytes.

    Attributes:
        key: its name.
        kind: see `smartinit.store.keys.Key`; empty for keys that were given as text.
        leaves: of the key.
        blobs: file name -> content.
        meta: the caller's JSON values.
        tags: names of groups that the entry can be found by.
        basis: digest of what the content came from beyond the key, such as a larger statistic than was needed: two
            results of one key are a contradiction only if their bases are equal too.
        created: seconds since the epoch, of the writer's clock; for people, nothing depends on it.
        writer: versions and host of who wrote it; recorded, not part of the key.
        schema: of the store.
    """

    key: str
    blobs: Mapping[str, Blob]
    kind: str = ""
    leaves: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    basis: str = ""
    created: float = 0.0
    writer: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def size(self) -> int:
        """Bytes of all blobs."""
        return sum(blob.size for blob in self.blobs.values())

    def to_bytes(self) -> bytes:
        """Canonical JSON whose last value is the sha256 of all that stands before it.

        Raises:
            ArgumentError: ``meta`` or ``leaves`` hold something that is no JSON value.
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["blobs"] = {name: blob.as_dict() for name, blob in self.blobs.items()}
        body = canonical(values)[:-1]
        return body + b',"check":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'

    @classmethod
    def from_bytes(cls, content: bytes, key: str) -> Manifest:
        """The inverse of `to_bytes`; nothing in it is believed.

        Args:
            content: of the file.
            key: under which it was found.

        Raises:
            VerificationError: a byte was changed, or it says things that no writer says.
            StoreError: a newer version wrote it.
        """
        end = _END.fullmatch(content[-_END_LENGTH:])
        if end is None or len(content) > MAX_BYTES:
            raise VerificationError(f"the manifest of '{key}' is cut off, or is none")
        if hashlib.sha256(content[:-_END_LENGTH]).hexdigest().encode() != end.group(1):
            raise VerificationError(f"the manifest of '{key}' was changed: its digest differs")
        try:
            values = json.loads(content)
            values.pop("check")
            if values.get("schema") != SCHEMA:
                raise StoreError(
                    f"'{key}' was written with schema {values.get('schema')!r}, but this version reads {SCHEMA}; "
                    "upgrade smartinit, or use another store"
                )
            blobs = {name: Blob(**blob) for name, blob in values.pop("blobs").items()}
            manifest = cls(blobs=blobs, **{**values, "tags": tuple(values["tags"])})
            problem = manifest.problem(key)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, StoreError):
                raise
            problem = f"{type(error).__name__}: {error}"
        if problem:
            raise VerificationError(f"the manifest of '{key}' is not sound: {problem}")
        return manifest

    def problem(self, key: str) -> str | None:
        """What is wrong with what it says; None if nothing is."""
        texts: tuple[Any, ...] = (self.kind, self.basis)
        mappings: tuple[Any, ...] = (self.leaves, self.meta, self.writer)
        if self.key != key:
            return f"it is of the key {self.key!r}"
        if not all(isinstance(value, str) for value in texts):
            return "its kind or basis is no text"
        if not all(isinstance(value, dict) for value in mappings) or type(self.created) not in (int, float):
            return "leaves, meta or writer is no mapping, or its time no number"
        for tag in self.tags:
            check_name(tag)
        problems = (_blob_problem(name, blob) for name, blob in self.blobs.items())
        return next((problem for problem in problems if problem), None)


def _blob_problem(name: str, blob: Blob) -> str | None:
    if not _FILE.fullmatch(name):
        return f"the file name {name!r}"
    if not (_matches(_SHA, blob.sha256) and _matches(_XXH, blob.xxh3)):
        return f"the digest of {name!r}"
    return None if type(blob.size) is int and blob.size >= 0 else f"the size of {name!r}"


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
