"""What an entry is: one small JSON file that names its blobs, and answers for its own bytes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smartinit.errors import ArgumentError, StoreError, VerificationError, shown
from smartinit.store.blobs import Blob
from smartinit.store.keys import DEEPEST, SCHEMA, canonical, check_name

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_BYTES = 16 << 20
"""Longest manifest that is read or written; more could take seconds to parse."""
_SHA = re.compile(r"[0-9a-f]{64}")
_XXH = re.compile(r"[0-9a-f]{32}")
# Names of an entry's files: at most one folder, no leading dots, nothing that any file system takes for more.
_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]{0,99}/)?[A-Za-z0-9_][A-Za-z0-9._-]{0,149}")
_END = re.compile(rb',"check":"([0-9a-f]{64})"}\n')
_LARGEST = 2**63  # bytes of a blob
_YEAR_10000 = 253_402_300_800  # in seconds since the epoch
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
            ArgumentError: ``meta`` or ``leaves`` hold something that is no JSON value, or are too long.
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["blobs"] = {name: blob.as_dict() for name, blob in self.blobs.items()}
        body = canonical(values)[:-1]
        if len(body) + _END_LENGTH > MAX_BYTES:
            raise ArgumentError(
                f"what describes '{self.key}' has {len(body)} bytes; at most {MAX_BYTES} are read, so make a file of it"
            )
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
            values = _DECODER.decode(content.decode())
            values.pop("check")
            schema = values.get("schema")
            if type(schema) is not int or schema != SCHEMA:
                raise StoreError(
                    f"'{key}' was written with schema {shown(schema)}, but this version reads {SCHEMA}; upgrade "
                    "smartinit, or use another store"
                )
            if type(values["tags"]) is not list or (_brackets(content) > DEEPEST and _is_deep(values)):
                raise ValueError("tags that are no list, or too many lists in each other")  # noqa: TRY301
            blobs = {name: Blob(**blob) for name, blob in values.pop("blobs").items()}
            manifest = cls(blobs=blobs, **{**values, "tags": tuple(values["tags"])})
            problem = manifest.problem(key)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {shown(str(error))}"
        if problem:
            raise VerificationError(f"the manifest of '{key}' is not sound: {problem}")
        return manifest

    def problem(self, key: str) -> str | None:
        """What is wrong with what it says; None if nothing is."""
        texts: tuple[Any, ...] = (self.kind, self.basis)
        mappings: tuple[Any, ...] = (self.leaves, self.meta, self.writer)
        if self.key != key:
            return f"it is of the key {shown(self.key)}"
        if not all(isinstance(value, str) for value in texts):
            return "its kind or basis is no text"
        if not all(isinstance(value, dict) for value in mappings):
            return "leaves, meta or writer is no mapping"
        if type(self.created) not in (int, float) or not -_YEAR_10000 / 4 < self.created < _YEAR_10000:
            return "its time is none"
        for tag in self.tags:
            check_name(tag)
        problems = (_blob_problem(name, blob) for name, blob in self.blobs.items())
        return next((problem for problem in problems if problem), None)


def _blob_problem(name: str, blob: Blob) -> str | None:
    if not _FILE.fullmatch(name):
        return f"the file name {shown(name)}"
    if not (_matches(_SHA, blob.sha256) and _matches(_XXH, blob.xxh3)):
        return f"the digest of {name!r}"
    return None if type(blob.size) is int and 0 <= blob.size < _LARGEST else f"the size of {name!r}"


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _brackets(content: bytes) -> int:
    """A bound on the depth of JSON, at no cost: most manifests need no further look."""
    return content.count(b"{") + content.count(b"[")


def _is_deep(value: object) -> bool:
    """Whether mappings and lists lie in each other more often than any writer's do; whoever walks them may recurse."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
