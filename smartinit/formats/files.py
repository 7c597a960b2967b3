"""Writing so that a reader never sees half of it: a new name first, then one rename.

A file or folder gets a name that no one else uses, beside its final place (a rename is atomic within one file
system only), is flushed to disk, and is then renamed. Whatever goes wrong before the rename, Ctrl-C included,
removes the new name again and leaves what was there before.
"""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from smartinit.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator


def write_file(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path``, replacing what is there in one step.

    Raises:
        OutputError: it cannot be written.
    """
    with new_file(path) as unfinished, unfinished.open("xb") as file:
        file.write(content)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write, in place of what is at ``path``: it takes that name when the with-block ends without an error.

    Raises:
        OutputError: it cannot be written.
    """
    unfinished = _unused_sibling(path)
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        with suppress(FileNotFoundError, NotADirectoryError):
            unfinished.unlink()


@contextmanager
def new_folder(folder: str | os.PathLike[str], *, force: bool = False, marker: str) -> Iterator[Path]:
    """A folder to fill, which takes its final name when the with-block ends without an error.

    Args:
        folder: the final name; missing parents are made.
        force: replace an existing folder, as a whole: files in it that are not written again are gone.
        marker: name of a file that shows that a folder is one of ours. A folder that holds other things and not
            this file is never replaced.

    Raises:
        OutputError: the folder exists (without ``force``), holds other things, or cannot be written.
    """
    path = Path(os.path.realpath(folder))  # through links: what they point to is replaced, not the link
    _check_free(path, force=force, marker=marker)
    unfinished = _unused_sibling(path)
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.mkdir()
            yield unfinished
            _flush_folder(unfinished)
            _check_free(path, force=force, marker=marker)  # someone else may have been faster
            _move_into_place(unfinished, path)
        except OSError as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"cannot write folder '{path}': {error.strerror or error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone already when all went well


def _check_free(path: Path, *, force: bool, marker: str) -> None:
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise OutputError(f"'{path}' is a file; name a folder to write to")
    if not force:
        raise OutputError(f"folder '{path}' exists already; name another one, or replace it with force=True (--force)")
    if any(path.iterdir()) and not (path / marker).is_file():
        raise OutputError(
            f"folder '{path}' is not replaced, because it holds other files and no {marker}; name another folder"
        )


def _move_into_place(unfinished: Path, path: Path) -> None:
    """Rename; the former folder, if any, steps aside whole, and comes back whole if that fails."""
    former = _unused_sibling(path)
    try:
        if path.exists():
            path.rename(former)
        unfinished.rename(path)
    except BaseException:
        if former.exists() and not path.exists():
            former.rename(path)
        raise
    finally:
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
    _flush_folder(path.parent)


def _unused_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _flush_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power failure; some file systems have no such thing."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
