"""Why a request is a hit or a miss: the leaves in which it differs from what is stored."""

from __future__ import annotations

import heapq
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from smartinit.errors import ArgumentError, ConfigError, NotStoredError
from smartinit.store.keys import Key, differences
from smartinit.store.naming import Names, find_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from smartinit.store.local import LocalStore
    from smartinit.store.manifest import Manifest

MOST = 2000
"""Entries that are compared: those which were used last."""
Difference = tuple[str, object, object]
_SHOWN, _LENGTH = 8, 40
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Store(Names, Protocol):
    """What is asked of a `smartinit.store.Store`, which uses this module."""

    @property
    def local(self) -> LocalStore:
        """The one that is written."""


def explain(store: Store, request: Any) -> str:  # noqa: ANN401 - see Args
    """Whether the store has a request; if not, the nearest entry and the leaves in which that differs.

    Args:
        store: to look in.
        request: a `Key`; a `Recipe` (or its mapping), which says nothing of model and data; or the name of an entry.

    Raises:
        ArgumentError: something else.

    Cost: that of `nearest`.
    """
    if isinstance(request, str):
        return _explain_name(store, request)
    if isinstance(request, Key):
        return _explain_key(store, request)
    recipe = request.as_dict() if hasattr(request, "as_dict") else request
    if not isinstance(recipe, Mapping):
        raise ArgumentError(f"a request is a Key, a Recipe or a name, not a {type(request).__name__}")
    return _explain_recipe(store, recipe)


def nearest(store: Store, key: Key, *, but: str | None = None) -> tuple[Manifest, list[Difference]] | None:
    """The entry of the same kind that differs in the fewest leaves, and these: path, our value, its value.

    None if there is no entry of that kind among the `MOST` that were used last. Of equals the one used last; the entry
    named ``but`` does not count.

    Cost: one listing of the store's times of use, and `MOST` small files; memory for one of them.
    """
    best: tuple[Manifest, list[Difference]] | None = None
    for manifest in recent(store, key.kind):
        if manifest.key == but:
            continue
        found = differences(key.leaves, manifest.leaves)
        if best is None or len(found) < len(best[1]):
            best = manifest, found
    return best


def nearest_recipe(store: Store, recipe: Mapping[str, Any]) -> tuple[Manifest, list[Difference]] | None:
    """The same for a recipe: of an artefact's leaves only those count that a recipe has."""
    best: tuple[Manifest, list[Difference]] | None = None
    asked = keyed(recipe)
    for manifest in recent(store, "artefact"):
        found = differences(asked, {name: manifest.leaves.get(name) for name in asked})
        if best is None or len(found) < len(best[1]):
            best = manifest, found
    return best


def keyed(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe stands in the key of its artefact: not the version, nor how many batches might be read."""
    kept = {name: value for name, value in recipe.items() if name != "version"}
    if isinstance(kept.get("sampling"), Mapping):
        kept["sampling"] = {name: value for name, value in kept["sampling"].items() if name != "max_batches"}
    return kept


def recent(store: Store, kind: str) -> Iterator[Manifest]:
    """Manifests of a kind in the first store (no other one is asked), the last used first, at most `MOST`.

    If entries were tagged with their kind, only these are looked at; else `MOST` of all kinds.
    """
    tagged = next(store.local.keys(kind), None) is not None if kind else False
    wanted = set(store.local.keys(kind)) if tagged else None
    layout = store.local.layout
    times = _times(layout.used, "")
    if wanted is None:  # an entry that was never read has only the time at which it was written
        times = {**_times(layout.entries, ".json"), **times}
    else:
        times = {key: times.get(key, 0.0) for key in wanted}
    for key in heapq.nlargest(MOST, times, key=times.__getitem__):
        with suppress(ConfigError):
            manifest = store.local.peek(key)
            if manifest is not None and manifest.kind == kind:
                yield manifest


def describe(found: list[Difference], *, most: int = _SHOWN) -> str:
    """Differing leaves in words: ``plan.rank (8, there 16), data (…)``."""
    rows = folded(found)
    parts = [f"{path or 'everything'} ({shown(ours)}, there {shown(theirs)})" for path, ours, theirs in rows[:most]]
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(parts) + more


def folded(found: list[Difference]) -> list[Difference]:
    """The same with one path for leaves of many layers that differ in the same way, the shortest paths first."""
    groups: dict[tuple[str, str, str], list[Difference]] = {}
    for path, ours, theirs in found:
        groups.setdefault((_NUMBER.sub("*", path), shown(ours), shown(theirs)), []).append((path, ours, theirs))
    rows = [
        group[0] if len(group) == 1 else (f"{general} ({len(group)}×)", *group[0][1:])
        for (general, _, _), group in groups.items()
    ]
    return sorted(rows, key=lambda row: row[0].count("."))


def shown(value: object) -> str:
    """A value on one line, cut where it is long; nothing in it can reach the terminal as more than text."""
    text = json.dumps(value, sort_keys=True, default=str)
    if isinstance(value, str) and len(value) == 64 and value.isalnum():  # noqa: PLR2004 - a digest
        return f"{value[:12]}…" if value.isascii() else text[:_LENGTH]
    return text if len(text) <= _LENGTH else f"{text[:_LENGTH]}…"


def _explain_name(store: Store, name: str) -> str:
    try:
        manifest = store.peek(find_key(store, name))
    except NotStoredError as error:
        return str(error)
    if manifest is None:
        return f"the store has no sound entry '{name}'"
    files = "1 file" if len(manifest.blobs) == 1 else f"{len(manifest.blobs)} files"
    return f"the store has {_named(manifest.kind, manifest.key)}: {manifest.size:,} bytes in {files}"


def _explain_key(store: Store, key: Key) -> str:
    if store.peek(key.digest) is not None:
        return f"the store has {_named(key.kind, key.digest)}"
    found = nearest(store, key)
    start = f"the store does not have {_named(key.kind, key.digest)}"
    return f"{start}, and no other entry of that kind" if found is None else f"{start}; {_sentence(*found)}"


def _explain_recipe(store: Store, recipe: Mapping[str, Any]) -> str:
    found = nearest_recipe(store, recipe)
    if found is None:
        return "the store has no artefact to compare the recipe with"
    if not found[1]:
        return f"the store has artefact {found[0].key[:12]} of the same recipe (which names neither model nor data)"
    return f"the store has no artefact of this recipe; {_sentence(*found)}"


def _sentence(manifest: Manifest, found: list[Difference]) -> str:
    count = "1 leaf" if len(found) == 1 else f"{len(found)} leaves"
    return f"the nearest, {manifest.key[:12]}, differs in {count}: {describe(found)}"


def _named(kind: str, key: str) -> str:
    return f"{kind or 'entry'} {key[:12]}"


def _times(folder: Path, suffix: str) -> dict[str, float]:
    """Name without suffix -> modification time. Cost: one listing."""
    found = {}
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        for item in items:
            if item.name.endswith(suffix):
                with suppress(OSError):
                    found[item.name[: len(item.name) - len(suffix)]] = item.stat().st_mtime
    return found
