"""PyTorch's distributed tensors, without importing their module where nobody else has: that takes a second."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_dtensor(x: object) -> bool:
    """Whether something is a ``torch.distributed.tensor.DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's numbers of a DTensor; any other tensor itself."""
    local: torch.Tensor = tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return local
