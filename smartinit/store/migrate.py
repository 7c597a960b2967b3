"""From the schema of an older version to that of this one, when it is asked for and never by the way."""

from __future__ import annotations

import json
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import filelock

from smartinit.errors import SmartinitError, StoreError
from smartinit.store import durable
from smartinit.store.keys import SCHEMA
from smartinit.store.regular import read_small

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from smartinit.store.layout import Layout

MIGRATIONS: Mapping[int, Callable[[Layout], None]] = MappingProxyType({})
"""Schema -> what makes a store of it one of the next schema. It may be killed at any point and is then run again, so
every step leaves alone what is done already. There is no older schema yet."""
_LONGEST = 1 << 16
_WAIT_SECONDS = 10.0


class Migrated(NamedTuple):
    """What was done: the schema before and now; the same if nothing was."""

    before: int
    now: int


def found_schema(layout: Layout) -> int | None:
    """The schema of a store; None if there is no store.

    Raises:
        StoreError: it does not say.
    """
    try:
        found = json.loads(read_small(layout.schema, _LONGEST))["schema"]
    except (FileNotFoundError, NotADirectoryError):
        return SCHEMA if layout.entries.is_dir() else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        found = None
    if type(found) is not int:
        raise StoreError(
            f"'{layout.schema}' does not say which schema the store has; if it is of this version, "
            "`smartinit cache verify --repair` makes it again"
        )
    return found


def migrate(
    layout: Layout,
    *,
    migrations: Mapping[int, Callable[[Layout], None]] = MIGRATIONS,
    target: int = SCHEMA,
    wait: float = _WAIT_SECONDS,
) -> Migrated:
    """Bring a store to this version's schema, one schema after the other.

    Args:
        layout: of the store; nothing else may use it meanwhile.
        migrations: see `MIGRATIONS`.
        target: the schema to reach.
        wait: seconds for another process that does the same.

    Raises:
        StoreError: a newer version has made the store, no way leads from its schema to this one, another process
            migrates it, or it cannot be written.
    """
    before = found_schema(layout)
    if before is None or before == target:
        return Migrated(target, target)
    if before > target:
        raise StoreError(
            f"the store '{layout.root}' has schema {before}, but this version knows {target}; upgrade smartinit, or "
            "name another store"
        )
    missing = next((schema for schema in range(before, target) if schema not in migrations), None)
    if missing is not None:
        raise StoreError(
            f"the store '{layout.root}' has schema {before}, and no way leads from {missing} to {missing + 1}; name "
            "another store, and compute again what is needed"
        )
    try:
        durable.make_folder(layout.locks)
        with filelock.FileLock(layout.locks / "migrate.lock", timeout=wait):
            for schema in range(found_schema(layout) or before, target):
                migrations[schema](layout)
                _write_schema(layout, schema + 1)
    except filelock.Timeout as error:
        raise StoreError(f"another process migrates the store '{layout.root}'; wait until it has ended") from error
    except OSError as error:
        if isinstance(error, SmartinitError):
            raise
        raise StoreError(
            f"cannot migrate the store '{layout.root}': {error.strerror or error}; run it again once that is mended"
        ) from error
    return Migrated(before, target)


def _write_schema(layout: Layout, schema: int) -> None:
    durable.make_folder(layout.unfinished)
    unfinished = layout.new_file()
    try:
        durable.write_new(unfinished, [json.dumps({"schema": schema}).encode() + b"\n"])
        durable.publish(unfinished, layout.schema)
    finally:
        durable.clear(unfinished)
