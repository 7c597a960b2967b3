"""``smartinit.json``: how an adapter was computed, how far to trust it, and the digests of the files beside it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from smartinit.errors import ArtefactError, VerificationError
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE, read_file, read_object
from smartinit.formats.stamp import file_digest

if TYPE_CHECKING:
    from pathlib import Path

RECORD_FILE = "smartinit.json"
START_FOLDER = "start"
FORMAT = 2
_READABLE = (1, 2)  # 1 knew linear layers that keep their base
# The model card is not among them: people edit it, and it changes no result.
CHECKED_FILES = (CONFIG_FILE, TENSOR_FILE)
# A record is not trusted: it can make us read nothing but what an adapter folder may hold.
_MAY_HOLD = re.compile(
    rf"(?:{START_FOLDER}/)?(?:{re.escape(CONFIG_FILE)}|{re.escape(TENSOR_FILE)})|base-\d{{5}}-of-\d{{5}}\.safetensors"
)


def record_text(values: Mapping[str, object], folder: Path) -> bytes:
    """The file's content: ``values``, the format's number, and the digests of what ``folder`` holds.

    NaN and infinities (a rate over no time, say) become null, which JSON has a form for.
    """
    held = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: file_digest(folder / name) for name in held if _MAY_HOLD.fullmatch(name)}
    content = {"format": FORMAT, **values, "files": files}
    return json.dumps(_plain(content), indent=1, sort_keys=True, allow_nan=False).encode()


def read_record(folder: Path) -> tuple[dict[str, object], dict[str, bytes]]:
    """The record, and the content of the adapter's two files; everything is checked against its digests.

    Raises:
        MissingFileError: there is no such folder.
        ArtefactError: a file is missing or broken, or the format is unknown.
        VerificationError: a file is not the one that was written with the record.
    """
    record = read_record_only(folder)
    contents = {name: read_file(folder / name) for name in CHECKED_FILES}
    digests = _digests(folder, record)
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != digests.get(name):
            raise VerificationError(_changed(folder / name))
    check_digests(folder, record)
    return record, contents


def read_record_only(folder: Path) -> dict[str, object]:
    """The record; the files beside it are not looked at.

    Raises:
        MissingFileError: there is no such folder.
        ArtefactError: it is missing or broken, or its format is unknown.
    """
    path = folder / RECORD_FILE
    record = read_object(path, read_file(path))
    if record.get("format") not in _READABLE:
        raise ArtefactError(
            f"'{path}' has format {record.get('format')!r}, but this version reads formats up to {FORMAT}; upgrade "
            "smartinit, or load the folder with PEFT"
        )
    _digests(folder, record)
    return record


def check_digests(folder: Path, record: Mapping[str, object], *, below: str | None = None) -> None:
    """Hash the files of the record, in pieces, but for the adapter's own two; with ``below`` those in a sub-folder.

    Raises:
        ArtefactError: a file is missing.
        VerificationError: a file is not the one that was written with the record.
    """
    for name, digest in _digests(folder, record).items():
        if name in CHECKED_FILES or (below is not None and not name.startswith(f"{below}/")):
            continue
        if not (folder / name).is_file():
            raise ArtefactError(f"'{folder / name}' is missing; the folder is not whole, so copy it again")
        if file_digest(folder / name) != digest:
            raise VerificationError(_changed(folder / name))


def lists_start(record: Mapping[str, object]) -> bool:
    """Whether the record was written with a start in its own sub-folder."""
    digests = record.get("files")
    return isinstance(digests, dict) and f"{START_FOLDER}/{TENSOR_FILE}" in digests


def _digests(folder: Path, record: Mapping[str, object]) -> dict[str, object]:
    digests = record.get("files")
    if not isinstance(digests, dict) or not all(_MAY_HOLD.fullmatch(name) for name in digests):
        raise ArtefactError(f"'{folder / RECORD_FILE}' has no digests of the files beside it; it is broken")
    return digests


def _changed(path: Path) -> str:
    return (
        f"'{path}' is not the file that {RECORD_FILE} was written with: its sha256 differs; if it was "
        "trained since, load it with PEFT or LoraModel.from_pretrained, else compute it again"
    )


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
