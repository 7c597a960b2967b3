"""Which of many patterns is the first to match a module's name, without trying them all."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection


_REMEMBERED = 1 << 14


# Python's own cache holds 512 patterns; with more, as in a plan of a large model, each match would compile again.
@lru_cache(maxsize=1 << 16)
def compiled(pattern: str) -> re.Pattern[str]:
    """The expression, compiled once.

    Raises:
        ConfigError: it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"the pattern {pattern!r} is not a regular expression ({error})") from error


class PatternIndex:
    r"""The keys of a pattern mapping, so that finding the first that matches does not try them all.

    PEFT matches ``(.*\.)?(<key>)$``, key after key: with a key per layer that is quadratic in the layers. But most
    keys are names, without or with escapes, alone or in an anchored alternation, and a name can be looked up: by its
    length and by where its dots are, which as a pattern stand for any one character.

    Args:
        keys: regular expressions, in the order in which they are tried.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = keys
        self._answers: dict[tuple[str, ...], str | None] = {}
        # (whole name?, length, where any character may be) -> text with those taken out -> number of the first key
        self._names: dict[tuple[bool, int, tuple[int, ...]], dict[str, int]] = {}
        self._others: list[int] = []
        for number, key in enumerate(keys):
            names = _as_names(key)
            if names is None:
                self._others.append(number)
                continue
            for whole, text, anything in names:
                kept = self._names.setdefault((whole, len(text), anything), {})
                kept.setdefault(_without(text, anything), number)
        self._by_length: dict[int, list[tuple[bool, tuple[int, ...], dict[str, int]]]] = {}
        for (whole, length, anything), found in self._names.items():
            self._by_length.setdefault(length, []).append((whole, anything, found))

    def first(self, names: Collection[str]) -> str | None:
        """The first key that matches any of these names; it is remembered, as ranks and alphas often have one index."""
        asked = tuple(names)
        if asked not in self._answers:
            if len(self._answers) >= _REMEMBERED:
                self._answers.clear()
            self._answers[asked] = self._first(asked)
        return self._answers[asked]

    def _first(self, names: tuple[str, ...]) -> str | None:
        best = len(self._keys)
        for name in names:
            if "\n" in name:  # which `.` does not match, and `$` may stand before
                return self._slowly(names)
            start = 0
            while True:
                ending = name[start:]
                for whole, anything, found in self._by_length.get(len(ending), ()):
                    if not (whole and start):
                        best = min(best, found.get(_without(ending, anything), best))
                dot = name.find(".", start)
                if dot < 0:
                    break
                start = dot + 1
        for number in self._others:
            if number > best:
                break
            pattern = _key_pattern(self._keys[number])
            if any(pattern.match(name) for name in names):
                return self._keys[number]
        return self._keys[best] if best < len(self._keys) else None

    def _slowly(self, names: Collection[str]) -> str | None:
        return next((key for key in self._keys if any(_key_pattern(key).match(name) for name in names)), None)


@lru_cache(maxsize=64)
def pattern_index(keys: tuple[str, ...]) -> PatternIndex:
    """The index of some keys, made once."""
    return PatternIndex(keys)


def _key_pattern(key: str) -> re.Pattern[str]:
    return compiled(rf"(.*\.)?({key})$")


_NAME = re.compile(r"(?:[\w.-]|\\[^\w\s])+", re.ASCII)
_GROUP = re.compile(r"(\^?)(?:\(\?:(?P<several>.*)\)|(?P<one>.*?))(\$?)", re.DOTALL)


def _as_names(key: str) -> list[tuple[bool, str, tuple[int, ...]]] | None:
    r"""A key as what it matches: whether only a whole name, its characters, and where any character will do.

    ``a.b``, ``a\.b``, ``^a\.b$`` and ``^(?:a\.b|a\.c)$`` are understood; None for any other expression.
    """
    group = _GROUP.fullmatch(key)
    if group is None:
        return None
    text = group["several"] if group["several"] is not None else group["one"]
    alternatives = text.split("|") if group["several"] is not None else [text]
    names = []
    for alternative in alternatives:
        if not _NAME.fullmatch(alternative):
            return None
        characters = re.findall(r"\\?.", alternative)
        anything = tuple(place for place, character in enumerate(characters) if character == ".")
        names.append((bool(group[1]), "".join(character[-1] for character in characters), anything))
    return names


def _without(text: str, places: tuple[int, ...]) -> str:
    """A text without the characters at some places, which are in order."""
    pieces, start = [], 0
    for place in places:
        pieces.append(text[start:place])
        start = place + 1
    pieces.append(text[start:])
    return "".join(pieces)
