"""A store that never stops a computation: what cannot be read is missing, what cannot be written is not kept."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

from smartinit.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

    from smartinit.store import Key, Store
    from smartinit.store.entry import Entry
    from smartinit.store.manifest import Manifest

LOG = logging.getLogger("smartinit.store")


class Keeper:
    """A store in the hands of one computation.

    Args:
        store: itself.
        writes: whether this process writes; of several ranks one does.
        replace: whether nothing is looked up, and results that are there make room (a refresh).
    """

    def __init__(self, store: Store, *, writes: bool, replace: bool = False) -> None:
        self.store = store
        self._writes = writes and not store.local.read_only
        self._replace = replace
        self._warned = False

    def peek(self, key: Key) -> Manifest | None:
        """See `Store.peek`."""
        if self._replace:
            return None
        try:
            return self.store.peek(key)
        except StoreError as error:
            self._warn(error)
            return None

    def whole(self, key: Key) -> Manifest | None:
        """The manifest of an entry that has all its files: what has lost some must be put again."""
        manifest = self.peek(key)
        if manifest is None:
            return None
        try:
            return None if self.store.local.peek(key) is not None and key not in self.store.local else manifest
        except StoreError as error:
            self._warn(error)
            return None

    def meta(self, name: str) -> Mapping[str, Any]:
        """What an entry says; nothing if there is none."""
        try:
            manifest = None if self._replace else self.store.peek(name)
        except StoreError as error:
            self._warn(error)
            return {}
        return {} if manifest is None else manifest.meta

    def get(self, key: Key) -> Entry | None:
        """See `Store.get`."""
        if self._replace:
            return None
        try:
            return self.store.get(key)
        except StoreError as error:
            self._warn(error)
            return None

    def keys(self, tag: str) -> list[str]:
        """See `Store.keys`."""
        if self._replace:
            return []
        try:
            return sorted(self.store.keys(tag))
        except (StoreError, OSError) as error:
            self._warn(error)
            return []

    def put(
        self,
        key: Key,
        tensors: Mapping[str, torch.Tensor] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        files: Mapping[str, bytes | Path] | None = None,
        tags: Iterable[str] = (),
        basis: str = "",
        replace: bool = False,
        compare: Iterable[str] | None = None,
    ) -> Manifest | None:
        """See `LocalStore.put`; None where nothing was written.

        Warns:
            UserWarning: once, if the store cannot be written.
        """
        if not self._writes:
            return None
        try:
            return self.store.put(
                key,
                tensors or None,
                meta,
                files=files,
                tags=tags,
                basis=basis,
                replace=replace or self._replace,
                compare=compare,
            )
        except StoreError as error:
            self._warn(error)  # where statistics have no room an artefact may have some
            return None

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{error}; the computation goes on without what the store cannot do", stacklevel=7)
