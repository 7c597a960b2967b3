"""Which file of a Megatron adapter folder holds which part of which tensor.

::

    {"shape": [48, 8], "dtype": "float32", "pieces": [
        {"file": "shard-00000-of-00002.safetensors", "ranges": [[0, 12], [0, 8]]},
        {"file": "shard-00000-of-00002.safetensors", "ranges": [[24, 36], [0, 8]], "at": [12, 0]}, …]}

A file holds a tensor under its key as one rank had it. ``ranges`` say, for each dimension, which part of the whole a
piece is; ``at``, where it starts in the file's tensor (left out where that is the beginning): of a gated layer a rank
has two pieces, of the gate and of the up projection. ``key``, if given, is the file's name for it: experts that share
an adapter have it under a key each, and in a file once. The pieces lie in a grid and cover the tensor exactly once.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smartinit.errors import ArtefactError
from smartinit.formats.rows import row_ranges

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Ranges = tuple[tuple[int, int], ...]
"""Start and stop along each dimension."""

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
FILE = re.compile(r"shard-\d{5}-of-\d{5}\.safetensors")
_MOST_DIMENSIONS, _LARGEST = 3, 2**40
_COLUMN = re.compile(r"linear_(qkv|fc1)\.adapter\.")


@dataclass(frozen=True)
class Piece:
    """A part of a tensor, in one file.

    Attributes:
        file: name of the file.
        ranges: which part of the whole.
        at: where it starts in the file's tensor, along each dimension.
        key: the file's key for it, where that is another tensor's; empty: the tensor's own.
    """

    file: str
    ranges: Ranges
    at: tuple[int, ...]
    key: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the piece."""
        return tuple(stop - start for start, stop in self.ranges)

    def values(self) -> dict[str, object]:
        """For JSON."""
        at = {"at": list(self.at)} if any(self.at) else {}
        key = {"key": self.key} if self.key else {}
        return {"file": self.file, "ranges": [list(pair) for pair in self.ranges], **at, **key}


@dataclass(frozen=True)
class Layout:
    """A tensor of a single process, and where its parts are.

    Attributes:
        shape: of the whole.
        dtype: of all of it.
        pieces: its parts.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def values(self) -> dict[str, object]:
        """For JSON."""
        dtype = str(self.dtype).removeprefix("torch.")
        return {"shape": list(self.shape), "dtype": dtype, "pieces": [piece.values() for piece in self.pieces]}

    def held_shape(self, held: Piece) -> tuple[int, ...]:
        """The least that the file's tensor with this piece must have along each dimension."""
        mine = [piece for piece in self.pieces if (piece.file, piece.key) == (held.file, held.key)]
        ends = [[a + n for a, n in zip(piece.at, piece.shape, strict=True)] for piece in mine]
        return tuple(max(column) for column in zip(*ends, strict=True))


def parts(
    shape: Sequence[int], dim: int | None, rank: int, size: int, *, gated: bool = False
) -> list[tuple[Ranges, tuple[int, ...]]]:
    """What one of ``size`` ranks holds of a tensor: ranges of the whole, and where they start in the rank's shard.

    Args:
        shape: of the whole.
        dim: along which the ranks share it; None: each has all of it.
        rank: which of them.
        size: how many there are.
        gated: see `smartinit.formats.rows`.

    Raises:
        ConfigError: it cannot be shared evenly.
    """
    whole = tuple((0, n) for n in shape)
    zeros = (0,) * len(whole)
    if dim is None or size == 1:
        return [(whole, zeros)]
    out, start = [], 0
    for rows in row_ranges(shape[dim], rank, size, gated=gated):
        ranges = (*whole[:dim], (rows.start, rows.stop), *whole[dim + 1 :])
        out.append((ranges, (*zeros[:dim], start, *zeros[dim + 1 :])))
        start += len(rows)
    return out


def shared_dim(key: str, shape: Sequence[int], size: int, *, gated: bool) -> int | None:
    """Along which dimension Megatron's tensor-parallel ranks share a tensor; None: not at all, or not evenly.

    Args:
        key: of the tensor, with the name of the layer in it.
        shape: of the whole.
        size: how many ranks.
        gated: whether it is a layer of gate and up projection.
    """
    column = _COLUMN.search(key) is not None
    if key.endswith(".linear_out.weight"):
        dim = len(shape) - 2
    elif key.endswith(".linear_in.weight"):
        dim = len(shape) - (2 if column else 1)
    else:
        dim = 0 if column else -1
    if dim < 0 or shape[dim] % ((2 if gated else 1) * size):
        return None
    return dim


def is_gated(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor has rows of a gate and of an up projection; ``config`` is the folder's."""
    fused = "linear_fc1.adapter." in key and key.endswith((".adapter.linear_out.weight", ".adapter.weight_magnitude"))
    return fused and bool(config.get("gated_linear_unit", False))


def layout_of(key: str, value: object, where: str) -> Layout:
    """An entry of the folder's JSON.

    Args:
        key: of the tensor.
        value: the entry.
        where: the file's path, for messages.

    Raises:
        ArtefactError: it says anything but how the pieces make up a tensor.
    """

    def broken(what: str) -> ArtefactError:
        return ArtefactError(f"'{where}' {what} '{key}'; the folder is broken or was edited, so save it again")

    entry = value if isinstance(value, dict) else {}
    shape, dtype = _whole_numbers(entry.get("shape")), entry.get("dtype")
    if shape is None or not 0 < len(shape) <= _MOST_DIMENSIONS or 0 in shape or math.prod(shape) > _LARGEST:
        raise broken(f"gives {entry.get('shape')!r} as the shape of")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise broken(f"gives {dtype!r} (expected one of {', '.join(DTYPES)}) as the dtype of")
    pieces: list[Piece] = []
    listed = entry.get("pieces")
    for one in listed if isinstance(listed, list) else ():
        piece = _piece(one, len(shape))
        if piece is None:
            raise broken(f"has an entry {one!r}, which is no piece, for")
        pieces.append(piece)
    if (what := _not_covered([piece.ranges for piece in pieces], shape)) is not None:
        raise broken(f"lists pieces that {what} of")
    return Layout(tuple(shape), DTYPES[dtype], tuple(pieces))


def _piece(value: object, dimensions: int) -> Piece | None:
    entry = value if isinstance(value, dict) else {}
    listed = entry.get("ranges")
    pairs = [_whole_numbers(pair) for pair in listed] if isinstance(listed, list) else []
    at = _whole_numbers(entry.get("at", [0] * dimensions))
    file, key = entry.get("file"), entry.get("key", "")
    if not isinstance(file, str) or FILE.fullmatch(file) is None or at is None or len(at) != dimensions:
        return None
    if len(pairs) != dimensions or not isinstance(key, str):
        return None
    ranges = tuple((pair[0], pair[1]) for pair in pairs if pair is not None and len(pair) == 2)  # noqa: PLR2004
    if len(ranges) != dimensions or any(start >= stop for start, stop in ranges):
        return None
    return Piece(file, ranges, tuple(at), key)


def _whole_numbers(value: object) -> list[int] | None:
    """A list of integers from 0 to the largest; None: something else."""
    if not isinstance(value, list):
        return None
    fine = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _LARGEST for n in value)
    return value if fine else None


def _not_covered(ranges: Sequence[Ranges], shape: Sequence[int]) -> str | None:
    """What is wrong with parts that should cover a tensor exactly once, in a grid; None: nothing. O(p·log p)."""
    if not shape:
        return None if len(ranges) == 1 else "cover a part twice"
    groups: dict[tuple[int, int], list[Ranges]] = {}
    for one in ranges:
        groups.setdefault(one[0], []).append(one[1:])
    end = 0
    for start, stop in sorted(groups):
        if start != end:
            return "leave out a part" if start > end else "cover a part twice"
        end = stop
    if end != shape[0]:
        return "leave out a part" if end < shape[0] else "reach beyond the end"
    found = (_not_covered(group, shape[1:]) for group in groups.values())
    return next((what for what in found if what is not None), None)
