"""Checks of single values, each ending in one sentence that names the field, the value and what was expected."""

from __future__ import annotations

import difflib
import math
import numbers
import re
from collections.abc import Iterable, Mapping

from smartinit.errors import ArgumentError, ConfigError

_NAME = re.compile(r"[\w.]*")


def closest(word: str, known: Iterable[str]) -> str:
    """The remark ``"; closest: 'x'"`` for the end of an error message, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, sorted(set(known)), n=3, cutoff=0.6)
    return f"; closest: {', '.join(map(repr, near))}" if near else ""


def require(holds: bool, sentence: str) -> None:
    """Raise ``ConfigError(sentence)`` unless it holds."""
    if not holds:
        raise ConfigError(sentence)


def choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """One of a few values."""
    options = list(allowed)
    if value not in options:
        near = closest(value, map(str, options)) if isinstance(value, str) else ""
        raise ConfigError(f"{name}={value!r} is not known: expected one of {', '.join(map(repr, options))}{near}")


def integer(name: str, value: object, least: int) -> int:
    """An integer (numpy's included, booleans not) of at least ``least``, as a Python int."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
        raise ConfigError(f"{name}={value!r} cannot be: expected an integer of at least {least}")
    return int(value)


def indices(name: str, value: object) -> list[int]:
    """Integers from 0 upwards, each once and at least one, in the given order, never the caller's object."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Iterable):
        raise ArgumentError(f"{name} is a {type(value).__name__}, but a list of integers was expected")
    entries = [integer(f"an entry of {name}", entry, 0) for entry in value]
    require(bool(entries), f"{name} is empty: name at least one row, or leave it out")
    seen: set[int] = set()
    for entry in entries:
        require(entry not in seen, f"{name} names {entry} twice: each row can be trained once")
        seen.add(entry)
    return entries


def number(name: str, value: object, expected: str, low: float, high: float) -> None:
    """A finite number in ``[low, high]``; ``expected`` says that in words. NaN fails, as it compares false."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    require(
        is_number and math.isfinite(value) and low <= value <= high,  # type: ignore[arg-type, operator]
        f"{name}={value!r} cannot be: expected {expected}",
    )


def boolean(name: str, value: object) -> None:
    """True or false, and nothing that merely counts as one of them, such as the string "no"."""
    require(isinstance(value, bool), f"{name}={value!r} cannot be: expected True or False")


def finite(name: str, value: object) -> None:
    """Any finite number."""
    number(name, value, "a finite number", -math.inf, math.inf)


def positive(name: str, value: object) -> None:
    """A finite number above zero."""
    number(name, value, "a finite number above 0", math.nextafter(0, 1), math.inf)


def regex(name: str, pattern: str) -> None:
    """A regular expression that compiles."""
    if _NAME.fullmatch(pattern):  # as most are, of which a plan for a large model has a thousand
        return
    try:
        re.compile(pattern)
    except re.error as error:
        hint = "; a wildcard such as '*_proj' goes in a list: ['*_proj']" if "*" in pattern else ""
        raise ConfigError(f"{name}: {pattern!r} is not a regular expression ({error}){hint}") from error


def names(name: str, value: object) -> list[str]:
    """A list of names that are not empty, in the given order (sorted when it is a set), never the caller's object."""
    if isinstance(value, str):
        raise ArgumentError(f"{name}={value!r} is a string, but a list of names was expected: write [{value!r}]")
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise ArgumentError(f"{name} is a {type(value).__name__}, but a list of names was expected")
    entries = list(value)
    for entry in entries:
        if not isinstance(entry, str) or not entry:
            raise ArgumentError(f"{name} holds {entry!r}, but each of its entries must be a name that is not empty")
    return sorted(entries) if isinstance(value, (set, frozenset)) else entries
