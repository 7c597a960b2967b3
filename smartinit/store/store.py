"""The store as its users see it: one folder that is written, and others, local or remote, that are read through."""

from __future__ import annotations

import os
from itertools import chain
from typing import TYPE_CHECKING, Any

from smartinit.errors import StoreError
from smartinit.store.flight import WAIT_SECONDS, single_flight
from smartinit.store.keys import Key, check_name
from smartinit.store.layers import Layer, is_remote, open_place
from smartinit.store.local import LocalStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch

    from smartinit.store.entry import Entry, Own
    from smartinit.store.layers import Place
    from smartinit.store.manifest import Manifest
    from smartinit.store.prune import PrunePlan
    from smartinit.store.transfer import Transfer
    from smartinit.store.verify import Unsound

DEFAULT = "cache"
VARIABLE = "SMARTINIT_CACHE"


class Store:
    """Results by what they were computed from.

    Args:
        path_or_url: the folder that is written; None: that of the environment variable ``SMARTINIT_CACHE``, or
            ``cache``. A URL is a layer, before the others, of that folder.
        layers: further stores that are read, in this order, where the first has nothing: folders, URLs such as
            ``s3://bucket/folder``, or `RemoteStore`. What they have is copied into the first; one that cannot be
            reached, or is broken, is left out with a warning.
        read_only: write nothing.
        locking: whether processes that want the same result wait for each other; correctness does not need it.
    """

    def __init__(
        self,
        path_or_url: Place | None = None,
        *layers: Place,
        read_only: bool = False,
        locking: bool = True,
    ) -> None:
        given: list[Place] = [] if path_or_url is None else [path_or_url]
        if not given or is_remote(given[0]):
            given.append(os.environ.get(VARIABLE) or DEFAULT)
        if is_remote(given[-1]):
            given.append(DEFAULT)
        *before, first = given
        local = open_place(first, read_only=read_only)
        if not isinstance(local, LocalStore):
            raise StoreError(f"'{first}' is no folder that could be written; name one as the first store")
        self.local = local
        self.layers = [Layer(place) for place in (*before, *layers)]
        self.locking = locking

    def put(
        self,
        key: Key | str,
        tensors: Mapping[str, torch.Tensor] | None = None,
        meta: Mapping[str, Any] | None = None,
        *,
        files: Mapping[str, bytes | Path] | None = None,
        tags: Iterable[str] = (),
        basis: str = "",
        replace: bool = False,
        compare: Iterable[str] | None = None,
    ) -> Manifest:
        """See `LocalStore.put`."""
        return self.local.put(key, tensors, meta, files=files, tags=tags, basis=basis, replace=replace, compare=compare)

    def get(self, key: Key | str, *, tensors: bool = True, own: Own = False) -> Entry | None:
        """See `LocalStore.get`; the layers are asked after the first store, which then has it too."""
        entry = self.local.get(key, tensors=tensors, own=own)
        if entry is not None or not self.layers:
            return entry
        name = check_name(key)
        taken = (layer.take(name, self.local, tensors=tensors) for layer in self.layers)
        return next(filter(None, taken), None)

    def peek(self, key: Key | str) -> Manifest | None:
        """See `LocalStore.peek`; the layers are asked after the first store."""
        manifest = self.local.peek(key)
        if manifest is not None or not self.layers:
            return manifest
        name = check_name(key)
        return next(filter(None, (layer.peek(name) for layer in self.layers)), None)

    def keys(self, tag: str | None = None) -> Iterator[str]:
        """See `LocalStore.keys`; those of all layers, each once. With layers: memory for all of them."""
        if not self.layers:
            yield from self.local.keys(tag)
            return
        seen: set[str] = set()
        for key in chain(self.local.keys(tag), *(layer.keys(tag) for layer in self.layers)):
            if key not in seen:
                seen.add(key)
                yield key

    def __contains__(self, key: object) -> bool:
        if key in self.local:
            return True
        return isinstance(key, (Key, str)) and any(layer.peek(check_name(key)) is not None for layer in self.layers)

    def single_flight(
        self, key: Key | str, *, timeout: float = WAIT_SECONDS, tell: Callable[[str], None] | None = None
    ) -> AbstractContextManager[bool]:
        """See `smartinit.store.flight.single_flight`."""
        return single_flight(self.local.layout, str(key), timeout=timeout, tell=tell, locking=self.locking)

    def explain(self, request: Any) -> str:  # noqa: ANN401 - a Key, a Recipe, or the name of an entry
        """Whether the store has a request, and if not, in what it differs from the nearest entry.

        See `smartinit.store.explain.explain`.
        """
        from smartinit.store.explain import explain

        return explain(self, request)

    def verify(self, *, repair: bool = False) -> list[Unsound]:
        """Read everything and check it against its sha256; see `smartinit.store.verify.verify`."""
        from smartinit.store.verify import verify

        return verify(self.local, repair=repair)

    def prune(
        self,
        max_bytes: int | None = None,
        *,
        max_age: float | None = None,
        unused_for: float | None = None,
        dry_run: bool = False,
    ) -> PrunePlan:
        """Plan what goes, and unless ``dry_run`` remove it; see `smartinit.store.prune.plan_prune`."""
        from smartinit.store.prune import plan_prune

        plan = plan_prune(self.local, max_bytes=max_bytes, max_age=max_age, unused_for=unused_for)
        if not dry_run:
            plan.execute()
        return plan

    def pin(self, key: Key | str) -> None:
        """Keep an entry whatever is pruned; see `smartinit.store.pins.pin`."""
        from smartinit.store.pins import pin

        pin(self.local, key)

    def unpin(self, key: Key | str) -> None:
        """Take a pin off; see `smartinit.store.pins.unpin`."""
        from smartinit.store.pins import unpin

        unpin(self.local, key)

    def push(self, target: Place, keys: Iterable[Key | str] | None = None, *, progress: bool = False) -> Transfer:
        """Copy entries (all of them if none are named) to another store; see `smartinit.store.transfer.push`."""
        from smartinit.store.transfer import push

        return push(self.local, target, keys, progress=progress)

    def pull(self, source: Place, keys: Iterable[Key | str] | None = None, *, progress: bool = False) -> Transfer:
        """Copy entries from another store; see `smartinit.store.transfer.pull`."""
        from smartinit.store.transfer import pull

        return pull(self.local, source, keys, progress=progress)


def as_store(place: Store | str | os.PathLike[str] | None) -> Store | None:
    """A store as it is given to functions: itself, its folder or URL, or None."""
    return place if place is None or isinstance(place, Store) else Store(place)
