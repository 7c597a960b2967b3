"""Say exactly where a data file is broken: file and line, in a user's words."""

from __future__ import annotations

import codecs
import gzip
import json
from typing import IO, TYPE_CHECKING

from smartinit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_CHUNK = 1 << 20


def require_utf8(path: Path) -> None:
    """Raise `DataError` naming line and byte where a text file is not UTF-8; about 1 s per GB.

    Arrow's JSON reader keeps invalid bytes, and they would only surface as an error on access.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    with _open(path) as file:
        try:
            while chunk := file.read(_CHUNK):
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            _raise_at_line(path)
        except (EOFError, OSError) as error:  # a damaged .gz
            raise DataError(f"the data file {path} cannot be read: {_first_line(error)}") from error


def explain(name: str, files: Sequence[Path], builder: str, error: BaseException) -> DataError:
    """The `DataError` for files which `datasets` could not read. Reads JSON files again, up to the broken line."""
    for path in files if builder == "json" else ():
        if (broken := _broken_json(path)) is not None:
            number, why = broken
            return DataError(f"line {number} of {path} is not valid JSON ({why}); every line must be one JSON object")
    where = files[0] if len(files) == 1 else name
    return DataError(f"the data {where} cannot be read as {builder}: {_first_line(error.__cause__ or error)}")


def _raise_at_line(path: Path) -> None:
    offset = 0
    for number, line in _lines(path):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            byte, at = line[error.start], offset + error.start
            raise DataError(
                f"line {number} of {path} is not UTF-8 (byte 0x{byte:02x} at offset {at}); convert the file first"
            ) from None
        offset += len(line)
    raise DataError(f"the data file {path} is not UTF-8; convert it first")


def _broken_json(path: Path) -> tuple[int, str] | None:
    """1-based line and reason of the first thing that is not a JSON object; ``None`` when all is well."""
    for number, line in _lines(path):
        text = line.decode("utf-8-sig").strip()
        if number == 1 and text.startswith("[") and ".jsonl" not in path.name:
            return _broken_array(path)
        why = _why_no_object(text) if text else None
        if why is not None:
            return number, why
    return None


def _why_no_object(text: str) -> str | None:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return f"{error.msg}, column {error.colno}"
    except RecursionError:
        return "nested too deeply"
    return None if isinstance(row, dict) else f"it holds a {type(row).__name__}"


def _broken_array(path: Path) -> tuple[int, str] | None:
    """The same for a .json file that is one array of objects."""
    with _open(path) as file:
        try:
            rows = json.loads(file.read())
        except json.JSONDecodeError as error:
            return error.lineno, f"{error.msg}, column {error.colno}"
    other = next((type(row).__name__ for row in rows if not isinstance(row, dict)), None)
    return None if other is None else (1, f"the array holds a {other}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with _open(path) as file:
        yield from enumerate(file, start=1)


def _open(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
