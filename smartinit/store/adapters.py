"""Stored artefacts as adapter folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from smartinit.errors import NotStoredError
from smartinit.formats.files import new_folder
from smartinit.store.keys import check_name

if TYPE_CHECKING:
    import os

    from smartinit.store.keys import Key
    from smartinit.store.local import LocalStore

_MARKER = "adapter_config.json"


def adapter_folder(local: LocalStore, key: Key | str, *, out: str | os.PathLike[str] | None = None) -> Path:
    """An artefact's files as a folder that PEFT reads: ``adapters/<key>/`` in the store, or ``out``.

    Raises:
        NotStoredError: there is no such artefact, or it is not sound.
        OutputError: the folder cannot be written.
    """
    folder = local.layout.adapters / check_name(key) if out is None else Path(out)
    copy_adapter(local, key, folder, force=True)
    return folder


def copy_adapter(local: LocalStore, key: Key | str, out: str | os.PathLike[str], force: bool = False) -> Path:
    """The same as an independent copy.

    Raises:
        NotStoredError, OutputError: as above; without ``force`` also if the folder exists.
    """
    entry = local.get(key, tensors=False)
    if entry is None or _MARKER not in entry.files:
        raise NotStoredError(f"the store has no artefact '{check_name(key)}'")
    with entry, new_folder(out, force=force, marker=_MARKER) as unfinished:
        for name, blob in entry.files.items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(blob, unfinished / name)
    return Path(out)
