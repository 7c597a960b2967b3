"""The start that a folder with Megatron's adapters keeps in its sub-folder ``start``, and names by its digests.

It is in PEFT's format where an adapter of PEFT was exported, and a Megatron folder of its own where the base of a
parallel model gave it up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.errors import ArtefactError, VerificationError
from smartinit.formats.megatron_folder import MARKER, ShardedFolder
from smartinit.formats.megatron_layout import FILE
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE
from smartinit.formats.record import START_FOLDER
from smartinit.formats.stamp import file_digest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

START_FILES = (CONFIG_FILE, TENSOR_FILE)


def start_digests(stored: ShardedFolder) -> Mapping[str, str] | None:
    """File of the start -> digest, as a folder says it; None where nothing was split.

    Raises:
        ArtefactError: it says something else.
    """
    said = stored.config.get("start")
    if said is None:
        return None
    names = set(said) if isinstance(said, dict) else set()
    known = names == set(START_FILES) or (MARKER in names and all(FILE.fullmatch(one) for one in names - {MARKER}))
    if not known:
        raise ArtefactError(f"'{stored.path / MARKER}' says start={said!r:.200}; expected its files and their digests")
    return {str(name): str(digest) for name, digest in said.items()}


def start_in(folder: Path) -> Path | None:
    """The start that a Megatron folder keeps; None where nothing was split.

    Raises:
        ArtefactError: it is lost.
        VerificationError: it is another one.

    Cost: one pass over its files.
    """
    said = start_digests(ShardedFolder.open(folder))
    if said is None:
        return None
    start = folder / START_FOLDER
    for name, digest in said.items():
        if not (start / name).is_file():
            raise ArtefactError(f"'{start / name}' is missing: '{folder}' has lost its start; copy the whole folder")
        if file_digest(start / name) != digest:
            raise VerificationError(f"'{start / name}' is not the file that '{folder / MARKER}' was written with")
    return start
