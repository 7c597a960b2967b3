"""What a safetensors file holds, read from its header: no tensor is loaded, and torch is not needed."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from smartinit.errors import shown

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

LONGEST_HEADER = 100_000_000
"""Bytes; the format's own limit."""

# Bytes per element; of other dtypes (sub-byte ones among them) only the places are checked.
_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


class Entry(NamedTuple):
    """One tensor: its dtype as safetensors names it (``F32``, ``BF16``), its shape, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Tensor name -> `Entry`. Cost: the bytes of the header.

    Every entry lies within the file, on its own bytes, and has as many as its dtype and shape need.

    Raises:
        ValueError: no safetensors file, or not as long as its header says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > size - 8:
                raise ValueError(f"{path} has {size} bytes instead of {8 + length} and more")
            if length > LONGEST_HEADER:
                raise ValueError(f"{path} has a header of {length} bytes; at most {LONGEST_HEADER} are read")
            text = file.read(length)
    except struct.error as error:
        raise ValueError(f"{path} is no safetensors file, or a truncated one") from error
    entries = _parse(path, text, 8 + length)
    end = max((entry.stop for entry in entries.values()), default=8 + length)
    if size != end:
        raise ValueError(f"{path} has {size} bytes instead of {end}")
    return entries


def content_head(dtype: str, shape: Iterable[int]) -> bytes:
    """What is hashed of a tensor before its bytes: its sha256 is the same in every file and in memory."""
    return f"{dtype} {','.join(map(str, shape))}\n".encode()


def _parse(path: Path, text: bytes, origin: int) -> dict[str, Entry]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {name: _entry(entry, origin) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file, or a truncated one") from error
    reached = origin
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != reached:
            raise ValueError(
                f"{path} is no safetensors file: {shown(name)} begins at byte {entry.start}, not {reached}"
            )
        reached = entry.stop
    return entries


def _entry(value: dict[str, Any], origin: int) -> Entry:
    dtype, shape, (start, stop) = value["dtype"], value["shape"], value["data_offsets"]
    if not (isinstance(dtype, str) and isinstance(shape, list) and _counts([*shape, start, stop])):
        raise TypeError("another type than expected")
    if stop < start or (dtype in _SIZES and stop - start != _SIZES[dtype] * math.prod(shape)):
        raise ValueError("not the bytes that dtype and shape need")
    return Entry(dtype, tuple(shape), origin + start, origin + stop)


def _counts(values: Sequence[object]) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made
