"""What a safetensors file holds, read from its header: no tensor is loaded, and torch is not needed."""

from __future__ import annotations

import json
import math
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path


class Entry(NamedTuple):
    """One tensor: its dtype as safetensors names it (``F32``, ``BF16``), and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, Entry]:
    """Tensor name -> `Entry`.

    Raises:
        ValueError: no safetensors file, or not as long as its header says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        entries = {name: Entry(str(entry["dtype"]), tuple(entry["shape"])) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no safetensors file, or a truncated one") from error
    if size != 8 + length + end:
        raise ValueError(f"{path} has {size} bytes instead of {8 + length + end}")
    return entries
