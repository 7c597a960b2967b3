"""What `--data` names: local files of one kind, a folder saved by `datasets`, or a dataset of the hub.

Nothing here reads a row or imports `datasets`, so that a mistyped path fails at once.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from smartinit.errors import DataError, MissingFileError

if TYPE_CHECKING:
    from collections.abc import Mapping

BUILDERS: Mapping[str, str] = MappingProxyType(
    {
        ".jsonl": "json",
        ".ndjson": "json",
        ".json": "json",
        ".csv": "csv",
        ".tsv": "tsv",
        ".parquet": "parquet",
        ".txt": "text",
    }
)
SUPPORTED = ", ".join([*BUILDERS, "each of the text formats also with .gz"])

_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"})
_SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        name: what the user gave.
        builder: ``json``, ``csv``, ``tsv``, ``parquet``, ``text``; ``saved`` for a folder
            of ``Dataset.save_to_disk``; ``hub`` for a dataset id.
        files: the local files, sorted; empty for the hub.
    """

    name: str
    builder: str
    files: tuple[Path, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all local files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def sha256(self) -> str | None:
        """One digest over names and contents of the local files; ``None`` for the hub. Reads every byte."""
        if not self.files:
            return None
        whole = hashlib.sha256()
        for path in self.files:
            content = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    content.update(chunk)
            whole.update(f"{path.name}\0{content.hexdigest()}\n".encode())
        return whole.hexdigest()


def find_source(name: str | Path, *, split: str = "train") -> Source:
    """Resolve a path or a hub id without reading any row.

    Raises:
        MissingFileError: a path that does not exist.
        DataError: an empty file, a suffix that is not supported, or a folder without data or with several kinds.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(str(name), path, split)
    if path.exists():
        builder = _builder(path)
        if builder is None:
            raise DataError(f"the data file {path} has a suffix that is not read; supported are {SUPPORTED}")
        _refuse_empty(path)
        return Source(str(name), builder, (path,))
    if _looks_like_path(str(name), path):
        raise MissingFileError(f"the data file {path} does not exist; check --data")
    return Source(str(name), "hub")


def _folder(name: str, folder: Path, split: str) -> Source:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Source(name, "saved", tuple(sorted(folder.rglob("*.arrow"))))
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and _is_data(path.relative_to(folder))]
    if not found:
        raise DataError(f"the data folder {folder} holds no data file; supported are {SUPPORTED}")
    files = _of_split(found, folder, split)
    if not files:
        names = ", ".join(str(path.relative_to(folder)) for path in found[:5])
        raise DataError(f"the data folder {folder} holds no file of the split '{split}', only {names}; see --split")
    builders = sorted({str(_builder(path)) for path in files})
    if len(builders) > 1:
        kinds = " and ".join(builders)
        raise DataError(f"the data folder {folder} mixes {kinds} files; name one file, or keep one kind per folder")
    for path in files:
        _refuse_empty(path)
    return Source(name, builders[0], tuple(files))


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """Files named after the split; if there are none, those which are named after no split at all."""

    def names(path: Path, word: str) -> bool:
        return re.search(rf"(?<![a-z]){word}(?![a-z])", str(path.relative_to(folder)).lower()) is not None

    wanted = [path for path in files if names(path, re.escape(split.lower()))]
    others = [word for word in _SPLITS if word != split]
    return wanted or [path for path in files if not any(names(path, word) for word in others)]


def _builder(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        builder = BUILDERS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if builder == "parquet" else builder  # parquet compresses by itself
    return BUILDERS.get(suffixes[-1]) if suffixes else None


def _is_data(relative: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    return not hidden and relative.name not in _METADATA and _builder(relative) is not None


def _refuse_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"the data file {path} is empty; it must hold at least one row")


def _looks_like_path(name: str, path: Path) -> bool:
    if name.startswith(("/", "./", "../", "~")) or "\\" in name or _HUB_NAME.fullmatch(name) is None:
        return True
    # "data/train" beside an existing folder "data" is a typo, not the hub's user "data".
    return _builder(path) is not None or (len(path.parts) > 1 and path.parent.is_dir())
