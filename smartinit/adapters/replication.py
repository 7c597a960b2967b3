"""Blocks of a model used several times, each with adapters of its own: ``layer_replication``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn


def replicate_layers(root: nn.Module, spans: Sequence[tuple[int, int]]) -> Callable[[], None]:
    """Replace a model's list of blocks by copies that share the weights.

    Args:
        root: the model.
        spans: ``(first, end)`` of the blocks to line up, as in PEFT.

    Returns:
        What undoes it.

    Raises:
        ConfigError: no list of blocks was found, or a span is outside of it.
    """
    raise NotImplementedError
