"""Stores that are read where the first has nothing. Whatever happens to one, it is only a layer less, and a warning.

A remote layer is asked little, however many keys a run looks for: what it said holds for a minute, the first few
missing keys are asked for one by one, and then its keys are listed once. One that cannot be reached is left alone for
a minute, then longer.
"""

from __future__ import annotations

import re
import time
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from smartinit.errors import ConfigError, SmartinitError, StoreError, VerificationError
from smartinit.store.adoption import copy_entry
from smartinit.store.local import LocalStore
from smartinit.store.remote import RemoteStore
from smartinit.store.transport import RemoteError, is_url, without_secrets

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator

    from smartinit.store.adoption import Copied
    from smartinit.store.entry import Entry
    from smartinit.store.manifest import Manifest

    Place = str | os.PathLike[str] | LocalStore | RemoteStore

_RELATIVE = re.compile(r"file:(?!//)", re.IGNORECASE)
T = TypeVar("T")
V = TypeVar("V")

HOLDS_SECONDS = 60.0
"""How long an answer of a remote layer is believed."""
_SINGLY = 16  # missing keys that are asked for one by one, before all keys are listed
_MOST_LISTED = 500_000  # keys of a listing that are kept: about 100 MB
_MOST_KEPT = 1024  # manifests, and listings of tags
_PAUSES = (60.0, 900.0)  # seconds without a layer that could not be reached: the first time, and the longest
_told: set[str] = set()  # each trouble is told once per process


def open_place(place: Place, *, read_only: bool = False) -> LocalStore | RemoteStore:
    """The store at a folder or URL; an open one is returned as it is.

    Raises:
        StoreError, ConfigError: there cannot be one.
    """
    if isinstance(place, (LocalStore, RemoteStore)):
        return place
    if isinstance(place, str):
        check_place(place)
    if isinstance(place, str) and "::" in place.partition("://")[0] and "://" in place:
        raise StoreError(f"'{without_secrets(place)}' chains protocols, which a store cannot; give a plain address")
    if not is_url(place):
        return LocalStore(place, read_only=read_only)
    parts = urlsplit(str(place))
    if parts.scheme.lower() == "file":
        if parts.netloc not in ("", "localhost"):
            raise StoreError(f"'{place}' names another machine; file:/// has three slashes")
        return LocalStore(unquote(parts.path), read_only=read_only)
    return RemoteStore(str(place))


def check_place(place: str) -> None:
    """Refuse text that names no place.

    Raises:
        ConfigError: it is empty, or says ``file:`` and no address.
    """
    if not place.strip():
        raise ConfigError("the name of a store is empty; give a folder or a URL")
    if _RELATIVE.match(place):
        raise ConfigError(f"'{place}' is no address of a folder; write file:/// and the whole path, or a path")


def is_remote(place: object) -> bool:
    """Whether a place is on another machine."""
    if isinstance(place, RemoteStore):
        return True
    return isinstance(place, str) and is_url(place) and urlsplit(place).scheme.lower() != "file"


class Layer:
    """One store that is read through.

    Args:
        place: a folder, a URL, or an open store.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._store: LocalStore | RemoteStore | None = None
        self._remote = is_remote(place)
        self.shown = _shown(place)
        self._until, self._pause = 0.0, _PAUSES[0]
        self._manifests: OrderedDict[str, tuple[float, Manifest]] = OrderedDict()
        self._missing: set[str] = set()
        self._refused: set[str] = set()
        self._tags: OrderedDict[str, frozenset[str]] = OrderedDict()
        self._all: frozenset[str] | None = None
        self._listable, self._began = True, 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.shown!r})"

    @property
    def folder(self) -> LocalStore | None:
        """Its store, if that is a folder and was asked already."""
        return self._store if isinstance(self._store, LocalStore) else None

    def peek(self, key: str) -> Manifest | None:
        """The manifest of a key, if the layer has it, can be reached, and is in order."""
        now = time.monotonic()
        self._forget(now)
        kept = self._manifests.get(key)
        if kept is not None and now - kept[0] < HOLDS_SECONDS:
            return kept[1]
        if key in self._refused or not self._may_have(key):
            return None
        answered, manifest = self._ask(lambda store: store.peek(key), key)
        if self._remote and manifest is not None:
            _keep(self._manifests, key, (now, manifest))
        elif self._remote and answered:
            self._missing.add(key)
        return manifest

    def keys(self, tag: str | None = None) -> Iterator[str]:
        """Its keys, or those with a tag; none if it cannot be reached."""
        self._forget(time.monotonic())
        if not self._remote:
            yield from self._ask(lambda store: list(store.keys(tag)))[1] or ()
        elif tag is None:
            yield from self._list_all() or ()
        else:
            if tag not in self._tags:
                found = self._ask(lambda store: frozenset(store.keys(tag)))[1]
                if found is None:
                    return
                _keep(self._tags, tag, found)
            yield from self._tags[tag]

    def take(self, key: str, into: LocalStore, *, tensors: bool) -> Entry | None:
        """An entry, if the layer has it, in order: copied into a folder and from there; else from where it lies.

        Args:
            key: its name.
            into: gets a copy, unless it is read-only or full.
            tensors: see `LocalStore.get`.
        """
        manifest = self.peek(key)
        if manifest is None:
            return None

        def copy(store: LocalStore | RemoteStore) -> Copied | None:
            if isinstance(store, LocalStore):
                return copy_entry(store, into, key)
            return store.fetch(key, into, manifest)

        def serve(store: LocalStore | RemoteStore) -> Entry | None:
            return store.get(key, tensors=tensors) if isinstance(store, LocalStore) else None

        if not into.read_only and self._ask(copy, key, into)[1] is not None:
            entry = into.get(key, tensors=tensors)
            if entry is not None:
                return entry
        return None if key in self._refused else self._ask(serve, key)[1]

    def _may_have(self, key: str) -> bool:
        """Whether the layer must be asked for a key."""
        if not self._remote:
            return True
        if self._all is None and len(self._missing) >= _SINGLY:
            self._list_all()
        return key not in self._missing and (self._all is None or key in self._all)

    def _list_all(self) -> frozenset[str] | None:
        """All its keys; None if they cannot be listed."""
        if self._all is not None or not self._listable:
            return self._all
        found = self._ask(lambda store: frozenset(store.keys()))[1]
        if found is None or len(found) > _MOST_LISTED:
            self._listable = False  # until the next minute
        else:
            self._all = found
        return found

    def _forget(self, now: float) -> None:
        if now - self._began >= HOLDS_SECONDS:
            self._began, self._all, self._listable = now, None, True
            for answers in (self._missing, self._refused, self._tags):
                answers.clear()

    def _ask(
        self, question: Callable[[LocalStore | RemoteStore], T | None], key: str = "", into: LocalStore | None = None
    ) -> tuple[bool, T | None]:
        """Whether there was an answer, and which; in place of every trouble there is none, and a warning."""
        if time.monotonic() < self._until:
            return False, None
        try:
            if self._store is None:
                self._store = open_place(self._place, read_only=True)
            answer = question(self._store)
        except VerificationError as error:
            self._refused.add(key)
            self._manifests.pop(key, None)
            _tell(f"{self.shown}\n{key}", f"{error}; it counts as missing")
            return False, None
        except (SmartinitError, OSError) as error:
            if into is not None and isinstance(error, StoreError) and not isinstance(error, RemoteError):
                # the folder that should take it is to blame
                _tell(f"{into.layout.root}\n", f"what '{self.shown}' has cannot be copied: {error}")
                return False, None
            self._until = time.monotonic() + self._pause
            self._pause = min(4 * self._pause, _PAUSES[1])
            _tell(self.shown, f"{error}; going on without this layer")
            return False, None
        self._pause = _PAUSES[0]
        return True, answer


def _keep(answers: OrderedDict[str, V], name: str, answer: V) -> None:
    """Note an answer; the oldest makes room."""
    answers[name] = answer
    if len(answers) > _MOST_KEPT:
        answers.popitem(last=False)


def _tell(which: str, what: str) -> None:
    if which not in _told:
        _told.add(which)
        warnings.warn(what, stacklevel=5)


def _shown(place: Place) -> str:
    if isinstance(place, RemoteStore):
        return place.transport.shown
    if isinstance(place, LocalStore):
        return str(place.layout.root)
    return without_secrets(str(place)) if is_url(place) else str(Path(place))
