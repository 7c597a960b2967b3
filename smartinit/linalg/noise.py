"""Random rows that do not depend on how many there are: a start at rank 8 is the first half of one at rank 16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 16


def uniform_rows(rows: int, width: int, *, seed: int) -> Tensor:
    """``(rows, width)`` float32 from U(±1), on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(rows, width, dtype=torch.float32, device="cpu").uniform_(-1.0, 1.0, generator=generator)


def normal_rows(rows: int, width: int, *, seed: int) -> Tensor:
    """``(rows, width)`` float32 from N(0, 1), on the CPU."""
    # torch draws normals in blocks of 16, and draws a last block that is not full anew: whole blocks only.
    generator = torch.Generator().manual_seed(seed)
    whole = -(-width // _BLOCK) * _BLOCK
    drawn = torch.randn(rows, whole, generator=generator, dtype=torch.float32, device="cpu")
    return drawn[:, :width].contiguous()
