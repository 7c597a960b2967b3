"""The folder of a store: made when it is first written to, refused if a newer version has made it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

from smartinit.errors import SmartinitError, StoreError, shown
from smartinit.store import durable
from smartinit.store.keys import SCHEMA
from smartinit.store.regular import read_small

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smartinit.store.layout import Layout

_TAG = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This folder holds what smartinit can compute again; backups may leave it out.\n"
)
_MARGIN = 8 << 20  # bytes that are left free on the disk
_LONGEST = 1 << 16


def make_store(layout: Layout) -> None:
    """The store's own files and folders, where they are missing.

    Raises:
        OSError: they cannot be written.
    """
    durable.make_folder(layout.root, follow=True)
    for folder in (layout.entries, layout.blobs, layout.unfinished):
        durable.make_folder(folder)
    schema = json.dumps({"schema": SCHEMA}).encode() + b"\n"
    for path, content in ((layout.tag, _TAG), (layout.schema, schema)):
        if not path.exists():
            durable.write_once(layout.new_file(), path, content)


def check_store(layout: Layout) -> None:
    """Whether this version may use what is there; nothing may be there.

    Raises:
        StoreError: the folder is a file or cannot be looked at, one of the folders in it is a link, or a newer version
            has made it.
    """
    try:
        if layout.root.exists() and not layout.root.is_dir():
            raise StoreError(f"'{layout.root}' is a file; a store is a folder: name another place")
        for folder in layout.folders:  # what is removed in them would be removed elsewhere
            if folder.is_symlink():
                raise StoreError(
                    f"'{folder}' is a link; in a store only its outermost folder may be one, so move the whole store"
                )
        _check_schema(layout, json.loads(read_small(layout.schema, _LONGEST)).get("schema"))
    except FileNotFoundError:
        return
    except PermissionError as error:
        raise StoreError(f"the store '{layout.root}' may not be read: see to its permissions") from error
    except (ValueError, AttributeError, RecursionError):  # it says nothing; keys and manifests have the number too
        return
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"the store '{layout.root}' cannot be read: {error.strerror or error}") from error


def _check_schema(layout: Layout, found: object) -> None:
    if type(found) is int and found < SCHEMA:
        raise StoreError(
            f"the store '{layout.root}' has schema {found}, but this version knows {SCHEMA}; `smartinit cache migrate` "
            "makes it one of this version"
        )
    if found is not None and found != SCHEMA:
        raise StoreError(
            f"the store '{layout.root}' has schema {shown(found)}, but this version knows {SCHEMA}; upgrade smartinit, "
            "or name another store"
        )


def check_space(layout: Layout, needed: int) -> None:
    """Before anything is written.

    Raises:
        StoreError: the disk has less than ``needed`` bytes.
        OSError: it cannot be asked.
    """
    free = durable.free_bytes(layout.root)
    if needed + _MARGIN > free:
        raise StoreError(
            f"the store '{layout.root}' needs {_amount(needed + _MARGIN)}, but its disk has {_amount(free)} free; "
            "free some with `smartinit cache gc`, or name another store"
        )


def _amount(count: int) -> str:
    for size, unit in ((10**6, "MB"), (10**3, "kB")):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count} bytes"


@contextmanager
def writing(layout: Layout) -> Iterator[None]:
    """What the operating system says while a store is written to, as a sentence.

    Raises:
        StoreError: in place of every other OSError.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, SmartinitError):
            raise
        where = f" ('{error.filename}')" if error.filename else ""
        raise StoreError(
            f"cannot write to the store '{layout.root}': {error.strerror or error}{where}; free some space, see to its "
            "permissions, or name another store"
        ) from error
