"""The smallest singular triplets of the thin decomposition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.linalg.triplets import Triplets, dense_triplets

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def bottom_triplets(weight: Tensor, k: int, *, seeds: Sequence[int]) -> Triplets:
    """The k smallest of the ``min(out, in)`` singular triplets of s matrices, ascending.

    Args:
        weight: ``(s, out, in)``.
        k: at most ``min(out, in)``.
        seeds: one for every matrix.
    """
    del seeds
    return dense_triplets(weight, k, smallest=True)
