"""Signs of singular vectors, which mathematics leaves free."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def with_largest_positive(directions: Tensor) -> Tensor:
    """``(k, d)`` float32 rows, each with its entry of largest size positive, so that equal runs agree."""
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return (directions * torch.where(largest < 0, -1.0, 1.0)).float().contiguous()
