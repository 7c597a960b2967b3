"""The start that an adapter's folder keeps in the sub-folder ``start``, which trainers leave alone.

Others may put adapters of their own there, or write another adapter above it. So a start names the layers of its
adapter, and the adapter its start, until somebody else saves it: see `smartinit.formats.stamp`. A start that
`smartinit.Artefact.save` has written is known by its digest in ``smartinit.json``.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import TYPE_CHECKING

from smartinit.errors import ArtefactError, OutputError, SmartinitError
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE, read_adapter
from smartinit.formats.record import RECORD_FILE, START_FOLDER, check_digests, lists_start, read_record_only
from smartinit.formats.stamp import CONFIG_STAMP, OWNER_STAMP, START_STAMP, file_digest, layers_digest
from smartinit.formats.tensors import mapped_file

if TYPE_CHECKING:
    from pathlib import Path

    from smartinit.formats.peft import StoredAdapter


def kept_start(stored: StoredAdapter) -> StoredAdapter | None:
    """The start that an adapter's folder keeps; None where there is none, and another adapter in its place is left be.

    Args:
        stored: the adapter.

    Raises:
        ArtefactError: the adapter says that it has a start, and that is missing or another one; or it is broken.
        VerificationError: it is not the start that ``smartinit.json`` was written with.

    Warns:
        UserWarning: a start is there, but of an adapter with other layers, which was written over.

    Cost: one pass over the start's file.
    """
    folder = stored.folder / START_FOLDER
    there = (folder / CONFIG_FILE).is_file() and (folder / TENSOR_FILE).is_file()
    said = stored.metadata.get(START_STAMP)
    if said is not None and (not there or file_digest(folder / TENSOR_FILE) != said):
        raise ArtefactError(
            f"the adapter in '{stored.folder}' is for a base that gave its start up, and has lost that start: "
            f"'{folder}' {'holds another adapter' if there else 'is not there'}; copy the whole folder again, or "
            "save the adapter again"
        )
    return read_adapter(folder) if there and (said is not None or _belongs(folder, stored)) else None


def _belongs(start: Path, stored: StoredAdapter) -> bool:
    """Whether an adapter in the place of a start is the start of one that does not name it."""
    owner = owner_of(start)
    if owner is None:
        if _recorded(stored.folder):
            check_digests(stored.folder, read_record_only(stored.folder), below=START_FOLDER)
            return True
        return False
    if CONFIG_STAMP in stored.metadata:  # written here, without a start
        return False
    if owner != layers_digest(stored.factors):  # a trainer changes values only
        warnings.warn(
            f"'{start}' keeps the start of another adapter than the one in '{stored.folder}', which was written over "
            "that one: it is passed over; remove it",
            stacklevel=3,
        )
        return False
    return True


def start_is_ours(folder: Path) -> bool:
    """Whether what lies in the place of an adapter's start was put there by this package."""
    start = folder / START_FOLDER
    if owner_of(start) is not None:
        return True
    try:
        if not (start / TENSOR_FILE).is_file() or not _recorded(folder):
            return False
        check_digests(folder, read_record_only(folder), below=START_FOLDER)
    except SmartinitError:
        return False
    return True


def require_free_start(folder: Path) -> None:
    """Refuse to put a start where someone else's adapter lies.

    Raises:
        OutputError: one does.
    """
    start = folder / START_FOLDER
    if any((start / name).exists() for name in (CONFIG_FILE, TENSOR_FILE)) and not start_is_ours(folder):
        raise OutputError(
            f"'{start}' holds an adapter of its own, but the start of the one in '{folder}' belongs there; name "
            "another folder"
        )


def remove_start(folder: Path) -> None:
    """Remove the start beside an adapter that was written over, if this package put it there.

    Raises:
        OutputError: it cannot be removed.
    """
    if not start_is_ours(folder):
        return
    start = folder / START_FOLDER
    try:
        for name in (TENSOR_FILE, CONFIG_FILE):
            (start / name).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot remove '{start}', which is of a former adapter: {error.strerror or error}"
        ) from error
    with suppress(OSError):  # something else is in there
        start.rmdir()


def owner_of(start: Path) -> str | None:
    """The layers that a start says it belongs to; None for any other adapter, and for none at all."""
    try:
        return mapped_file(start / TENSOR_FILE)[1].get(OWNER_STAMP)
    except (OSError, ArtefactError):
        return None


def _recorded(folder: Path) -> bool:
    return (folder / RECORD_FILE).is_file() and lists_start(read_record_only(folder))
