"""Which statistic is the cheaper one for a layer, and what it will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Skinny products reach a lower share of a machine's peak than square ones.
_SKINNY_PENALTY = 2.0
# Measured on a CPU, in flops of a large float32 product: eigh of a d×d float64 matrix, and the small
# problems that end a block of the sketch.
_EIGH_WEIGHT = 50.0
_BLOCK_FLOPS = 5e7
# Most rows that share one sketch; more would save little and look at convergence too seldom.
BLOCK_ROWS = 4096


@dataclass(frozen=True)
class StatisticCost:
    """Estimate for one site.

    Attributes:
        kind: the cheaper statistic.
        width: columns of the sketch (``features`` for the exact Gram).
        flops_per_row: work per activation row.
        bytes: memory of the state.
    """

    kind: Literal["subspace", "gram"]
    width: int
    flops_per_row: float
    bytes: int


def sketch_width(features: int, components: int) -> int:
    """Columns of the sketch for ``components`` directions: twice as many, at most ``features``.

    With half as much oversampling, sites whose spectra decay slowly fell behind PEFT's incremental PCA by 1e-4 of
    the captured variance.
    With the column that collects the mean, the width is a multiple of 8: one column more than that makes a skinny
    product take twice as long.
    """
    wanted = components + max(15, components - 1)
    return min(features, -(-(wanted + 1) // 8) * 8 - 1)


def plan_statistic(features: int, components: int) -> StatisticCost:
    """Choose between the streaming subspace (``4dq`` flops per row) and the exact Gram (``2d²``).

    Args:
        features: d of the site.
        components: directions that will be asked for.

    Returns:
        The cheaper one, with its work and memory. The Gram's eigendecomposition once per block is counted.
    """
    width = sketch_width(features, components)
    sketch = 4.0 * features * width * _SKINNY_PENALTY + _BLOCK_FLOPS / BLOCK_ROWS
    gram = 2.0 * features**2 + _EIGH_WEIGHT * features**3 / BLOCK_ROWS
    if gram <= sketch:
        return StatisticCost("gram", features, gram, 2 * 8 * features**2)
    return StatisticCost("subspace", width, sketch, 4 * 5 * features * width)
