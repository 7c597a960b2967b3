"""Whether a safetensors file from elsewhere is one, and its numbers finite: from its bytes, without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.errors import VerificationError, shown
from smartinit.formats.safetensors_header import read_header

if TYPE_CHECKING:
    from pathlib import Path

# NaN and Inf are those numbers whose bits under the mask are all set (IEEE 754, and its formats of 8 and 16 bits).
_MASKS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "C64": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E4M3": ("<u1", 0x7F),  # it has NaN only
}
_PIECE = 16 << 20  # bytes


def check_tensors(path: Path, name: str, key: str, *, finite: bool) -> None:
    """Look at a file of an entry; one that does not end in ``.safetensors`` passes.

    Args:
        path: where it lies.
        name: in the entry.
        key: of the entry, for messages.
        finite: whether its numbers must be.

    Raises:
        VerificationError: no safetensors file, or it holds NaN or Inf.

    Cost: one read if ``finite``, else that of the header; memory for one piece.
    """
    if not name.endswith(".safetensors"):
        return
    try:
        header = read_header(path)
    except ValueError as error:
        what = str(error).replace(str(path), "it")
        raise VerificationError(f"'{name}' of the entry '{key}' is no safetensors file: {what}") from error
    if not finite:
        return
    with path.open("rb") as file:
        for tensor, entry in header.items():
            if entry.dtype not in _MASKS:
                continue
            file.seek(entry.start)
            left = entry.stop - entry.start
            while left:
                piece = file.read(min(_PIECE, left))
                if not piece:
                    raise VerificationError(f"'{name}' of the entry '{key}' became shorter while it was read")
                left -= len(piece)
                if not _all_finite(piece, entry.dtype):
                    raise VerificationError(f"{shown(tensor)} in '{name}' of the entry '{key}' holds NaN or Inf")


def _all_finite(piece: bytes, dtype: str) -> bool:
    import numpy as np

    kind, mask = _MASKS[dtype]
    bits = np.frombuffer(piece, kind)
    return not bool(((bits & mask) == mask).any())
