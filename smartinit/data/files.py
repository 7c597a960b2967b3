"""Rows from files or from the hub, through `datasets`."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import datasets

from smartinit.data.diagnose import explain, require_utf8
from smartinit.data.source import Source, find_source
from smartinit.errors import DataError, MissingFileError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_IN_MEMORY = 256 << 20
_TEXT_BUILDERS = frozenset({"json", "csv", "tsv", "text"})


def load_rows(
    source: str | Path | Source, *, split: str = "train", config_name: str | None = None, limit: int | None = None
) -> datasets.Dataset:
    """Read rows; local files never touch the network, and nothing is written beside them.

    Args:
        source: jsonl, json, csv, tsv, txt (each also ``.gz``), parquet, a folder of one of these kinds, a folder of
            ``Dataset.save_to_disk``, or a dataset id of the hub. A text file gives one row per paragraph in the
            column ``text``; one row per line when it has no blank line.
        split: the split of a hub dataset; of a folder, the files named after it.
        config_name: the configuration of a hub dataset.
        limit: stop after so many rows without reading the rest.

    Raises:
        MissingFileError: the path or the hub id does not exist or cannot be reached.
        DataError: no rows, a broken row (naming file and line), not UTF-8, an unsupported suffix.

    Cost: one pass over the files. Up to 256 MB are kept in memory; larger ones are mapped from a temporary Arrow file.
    """
    found = source if isinstance(source, Source) else find_source(source, split=split)
    with _quiet_datasets():
        if found.builder == "hub":
            rows = _from_hub(found.name, split, config_name, limit)
        elif found.builder == "saved":
            rows = _from_saved(found, split)
        else:
            rows = _from_files(found, limit)
    if len(rows) == 0:
        raise DataError(f"the data {found.name} holds no rows")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _from_files(source: Source, limit: int | None) -> datasets.Dataset:
    if source.builder in _TEXT_BUILDERS:
        for path in source.files:
            require_utf8(path)
    if source.builder != "text":
        return _read(source, limit, **_READER.get(source.builder, {"path": source.builder}))
    rows = _read(source, limit, path="text", sample_by="paragraph")
    if len(rows) == len(source.files):  # no blank line anywhere: a paragraph would be the whole file
        return _read(source, limit, path="text", sample_by="line")
    return rows


# keep_default_na: without it a cell that says "null" or "None" is lost.
_READER: dict[str, dict[str, Any]] = {
    "csv": {"path": "csv", "keep_default_na": False},
    "tsv": {"path": "csv", "sep": "\t", "keep_default_na": False},
}


def _read(source: Source, limit: int | None, **reader: object) -> datasets.Dataset:
    # The folder goes at once: what is mapped stays readable on POSIX, and not even a killed process leaves it behind.
    with tempfile.TemporaryDirectory(prefix="smartinit-data-", ignore_cleanup_errors=True) as folder:
        given = {**reader, "data_files": [str(path) for path in source.files], "split": "train", "cache_dir": folder}
        try:
            if limit is not None:
                return datasets.Dataset.from_list(list(datasets.load_dataset(**given, streaming=True).take(limit)))
            in_memory = os.name == "nt" or source.size <= _IN_MEMORY
            return datasets.load_dataset(**given, keep_in_memory=in_memory)
        except Exception as error:
            if "corresponds to no data" in str(error):
                raise DataError(f"the data file {source.files[0]} holds no rows") from error
            raise explain(source.name, source.files, source.builder, error) from error


def _from_saved(source: Source, split: str) -> datasets.Dataset:
    try:
        saved = datasets.load_from_disk(source.name)
    except Exception as error:
        raise DataError(f"the folder {source.name} cannot be read as a saved dataset: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"the saved dataset {source.name} has no split '{split}', only {', '.join(saved)}")
        return saved[split]
    return saved


def _from_hub(name: str, split: str, config_name: str | None, limit: int | None) -> datasets.Dataset:
    try:
        if limit is None:
            return datasets.load_dataset(name, config_name, split=split)
        stream = datasets.load_dataset(name, config_name, split=split, streaming=True)
        return datasets.Dataset.from_list(list(stream.take(limit)))
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise MissingFileError(
            f"'{name}' is neither a file or folder here nor a dataset of the hub that can be reached; check --data"
        ) from error
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the hub dataset '{name}' cannot be read: {reason}") from error


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Keep progress bars, log lines and usage counts of `datasets` out of the way, and put them back."""
    bars, level = datasets.are_progress_bars_disabled(), datasets.utils.logging.get_verbosity()
    counts = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it calls a server even for a local file
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        datasets.utils.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()
