"""Eigenproblems of the size of a sketch, on as many CPU threads as help."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_ONE_THREAD_BELOW = 160


def small_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh`` that runs small problems on one CPU thread.

    LAPACK takes five times longer for a 48×48 matrix with two threads than with one: they wait for each other.

    Args:
        matrix: ``(..., q, q)`` symmetric.

    Returns:
        Eigenvalues ``(..., q)`` ascending and eigenvectors ``(..., q, q)``.
    """
    threads = torch.get_num_threads()
    if threads == 1 or matrix.device.type != "cpu" or matrix.shape[-1] >= _ONE_THREAD_BELOW:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    torch.set_num_threads(1)
    try:
        values, vectors = torch.linalg.eigh(matrix)
    finally:
        torch.set_num_threads(threads)
    return values, vectors
