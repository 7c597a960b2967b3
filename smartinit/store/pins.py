"""Entries that stay whatever is pruned."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING

from smartinit.errors import NotStoredError, StoreError
from smartinit.store import durable
from smartinit.store.keys import check_name

if TYPE_CHECKING:
    from smartinit.store.keys import Key
    from smartinit.store.layout import Layout
    from smartinit.store.local import LocalStore


def pin(local: LocalStore, key: Key | str) -> None:
    """Keep an entry until it is unpinned.

    Raises:
        NotStoredError: there is no such entry.
        StoreError: the store cannot be written.
    """
    name = check_name(key)
    refuse_read_only(local)
    if local.peek(name) is None:
        raise NotStoredError(f"'{name}' is not in the store '{local.layout.root}'; `smartinit cache ls` shows what is")
    try:
        durable.touch(local.layout.pins / name)
    except OSError as error:
        raise StoreError(f"cannot pin '{name}' in '{local.layout.root}': {error.strerror or error}") from error


def unpin(local: LocalStore, key: Key | str) -> bool:
    """Take a pin off; whether there was one.

    Raises:
        StoreError: the store cannot be written.
    """
    name = check_name(key)
    refuse_read_only(local)
    try:
        return durable.remove(local.layout.pins / name)
    except OSError as error:
        raise StoreError(f"cannot unpin '{name}' in '{local.layout.root}': {error.strerror or error}") from error


def pinned_keys(layout: Layout) -> set[str]:
    """Every pin, also of entries that are not there. Cost: one listing."""
    found = set()
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(layout.pins) as items:
        for item in items:
            with suppress(ValueError):
                found.add(check_name(item.name))
    return found


def refuse_read_only(local: LocalStore) -> None:
    """For whatever changes a store.

    Raises:
        StoreError: it was opened read-only.
    """
    if local.read_only:
        raise StoreError(
            f"the store '{local.layout.root}' was opened read-only; open it without read_only to change it"
        )
