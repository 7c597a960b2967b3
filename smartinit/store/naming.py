"""From what a person types, the beginning of a key, to the key."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from smartinit.errors import ConfigError, NotStoredError
from smartinit.store.keys import check_name

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smartinit.store.manifest import Manifest

SHORTEST = 6
"""Letters of a key that are enough, if only one key begins with them."""
_NAMED = 5


class Names(Protocol):
    """What is asked of a store: `smartinit.store.Store` and `LocalStore` have it."""

    def peek(self, key: str) -> Manifest | None:
        """The manifest of a key, if there is one."""

    def keys(self, tag: str | None = None) -> Iterator[str]:
        """All keys."""


def find_key(store: Names, text: str) -> str:
    """The key that is named by itself or by its first letters.

    Args:
        store: to look in.
        text: a key, or at least six letters with which only one key begins.

    Raises:
        ConfigError: text that can be no key, too few letters, or letters with which several keys begin.
        NotStoredError: there is none.

    Cost: one small file for a whole key, else one listing of the store's keys.
    """
    name = check_name(text)
    if store.peek(name) is not None:
        return name
    if len(name) < SHORTEST:
        raise ConfigError(f"'{name}' is too short for a key; give at least its first {SHORTEST} letters")
    found = sorted({key for key in store.keys(None) if key.startswith(name)})
    if not found:
        raise NotStoredError(f"the store has no entry '{name}'; `smartinit cache ls` lists what it has")
    if len(found) > 1:
        shown = ", ".join(key[:16] for key in found[:_NAMED]) + (", …" if len(found) > _NAMED else "")
        raise ConfigError(f"{len(found)} keys begin with '{name}': {shown}; give more letters")
    return found[0]
