"""What names an entry: a digest of everything that its content depends on, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from smartinit.errors import ArgumentError, ConfigError, shown

SCHEMA = 1
"""Of stores; it is part of every key, so that a change of what keys mean never finds an old entry."""

# One plain file name on every file system: no separators, no leading dot, and no capitals, as some ignore case.
_NAME = re.compile(r"(?!(?:con|prn|aux|nul|com\d|lpt\d)$)[a-z0-9][a-z0-9_-]{0,127}", re.ASCII)
DEEPEST = 64
"""Mappings and lists within each other that a key or a manifest may have."""


@dataclass(frozen=True)
class Key:
    """A request in canonical form.

    Attributes:
        kind: ``"artefact"``, ``"spectrum"``, ``"statistic"``, or a word of the caller's own.
        leaves: nested mappings and lists of JSON values: all that the content depends on.
    """

    kind: str
    leaves: Mapping[str, Any]

    def __hash__(self) -> int:
        """Of the digest: mappings have no hash."""
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """Sha256 of the canonical JSON of kind, leaves and schema; 64 hexadecimal digits."""
        return hashlib.sha256(canonical({"schema": SCHEMA, "kind": self.kind, "leaves": self.leaves})).hexdigest()

    def __str__(self) -> str:
        return self.digest


def canonical(value: object) -> bytes:
    """JSON with sorted keys, no white space and only ASCII: equal values give equal bytes.

    Raises:
        ArgumentError: a value that JSON has no form for, a key that is no text, NaN, or too many lists in each other.
    """
    try:
        plain = _plain(value, DEEPEST)
        return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(f"keys, and what is kept beside tensors, hold JSON values only: {error}") from error


def check_name(key: Key | str) -> str:
    """The name of a key's files.

    Raises:
        ConfigError: text that is no plain file name, such as one with a separator in it.
        ArgumentError: neither a key nor text.
    """
    name = key.digest if isinstance(key, Key) else key
    if not isinstance(name, str):
        raise ArgumentError(f"a key is a Key or text, not a {type(name).__name__}")
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{shown(name)} is no key: expected 1 to 128 of a-z, 0-9, '_' and '-', beginning with a letter or digit"
        )
    return name


def differences(ours: object, theirs: object, path: str = "") -> list[tuple[str, object, object]]:
    """The leaves in which two values differ: dotted path, our value, their value; None where one has no such leaf."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        names = list(dict.fromkeys([*ours, *theirs]))
        parts = [
            differences(ours.get(name), theirs.get(name), f"{path}.{name}" if path else str(name)) for name in names
        ]
        return [leaf for part in parts for leaf in part]
    if _is_list(ours) and _is_list(theirs) and len(ours) == len(theirs):  # type: ignore[arg-type]
        pairs = enumerate(zip(ours, theirs, strict=True))  # type: ignore[call-overload]
        return [leaf for index, (one, two) in pairs for leaf in differences(one, two, f"{path}[{index}]")]
    # 1, 1.0 and True are equal to Python, but not as parts of a key
    return [] if canonical([ours]) == canonical([theirs]) else [(path, ours, theirs)]


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _plain(value: object, levels: int) -> object:
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if not levels:
        raise ValueError(f"there are more than {DEEPEST} lists or mappings in each other")
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("the keys of a mapping must be text")
        return {key: _plain(item, levels - 1) for key, item in value.items()}
    if _is_list(value):
        return [_plain(item, levels - 1) for item in value]  # type: ignore[attr-defined]
    raise TypeError(f"{type(value).__name__} is none")
