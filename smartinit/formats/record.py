"""``smartinit.json``: how an adapter was computed, how far to trust it, and the digests of the files beside it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from smartinit.errors import ArtefactError, VerificationError
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE, read_file, read_object

if TYPE_CHECKING:
    from pathlib import Path

RECORD_FILE = "smartinit.json"
FORMAT = 1
# The model card is not among them: people edit it, and it changes no result.
CHECKED_FILES = (CONFIG_FILE, TENSOR_FILE)


def record_text(values: Mapping[str, object], folder: Path) -> bytes:
    """The file's content: ``values``, the format's number, and the digests of what ``folder`` holds.

    NaN and infinities (a rate over no time, say) become null, which JSON has a form for.
    """
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in CHECKED_FILES}
    content = {"format": FORMAT, **values, "files": files}
    return json.dumps(_plain(content), indent=1, sort_keys=True, allow_nan=False).encode()


def read_record(folder: Path) -> tuple[dict[str, object], dict[str, bytes]]:
    """The record, and the content of the files that it vouches for, checked against their digests.

    Raises:
        MissingFileError: there is no such folder.
        ArtefactError: a file is missing or broken, or the format is unknown.
        VerificationError: a file is not the one that was written with the record.
    """
    path = folder / RECORD_FILE
    record = read_object(path, read_file(path))
    if record.get("format") != FORMAT:
        raise ArtefactError(
            f"'{path}' has format {record.get('format')!r}, but this version reads format {FORMAT}; upgrade smartinit, "
            "or load the folder with PEFT"
        )
    digests = record.get("files")
    if not isinstance(digests, dict):
        raise ArtefactError(f"'{path}' has no digests of the files beside it; it is broken")
    contents = {name: read_file(folder / name) for name in CHECKED_FILES}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != digests.get(name):
            raise VerificationError(
                f"'{folder / name}' is not the file that {RECORD_FILE} was written with: its sha256 differs; if it was "
                "trained since, load it with PEFT or LoraModel.from_pretrained, else compute it again"
            )
    return record, contents


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
