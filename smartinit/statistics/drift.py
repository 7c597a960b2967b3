"""Notice when the data become of another kind: their variance leaves the directions that were found before."""

from __future__ import annotations

from dataclasses import dataclass

# Variance outside the basis, over that of the rows before, from which on rows count as another kind.
_THRESHOLD = 1.25
# Rows over which single batches are averaged.
_MEMORY_ROWS = 1024


@dataclass
class Drift:
    """Variance per row outside the basis.

    A block sees the data through its basis alone: a direction that is new, as at the border of two sorted domains,
    would never enter.

    Attributes:
        outside: of the last block, before the basis had seen it; 0 until something was seen.
        recent: of the last thousand rows.
    """

    outside: float = 0.0
    recent: float = 0.0

    def look(self, outside: float, rows: int, *, floor: float) -> bool:
        """Whether clearly more than usual lies outside.

        Args:
            outside: variance per row of these rows outside the basis.
            rows: their number; few of them move the average little.
            floor: round-off of ``outside``.
        """
        if self.outside == 0.0:  # rows that made the basis lie in it better than others will: start from these
            self.outside = self.recent = outside
        self.recent += min(1.0, rows / _MEMORY_ROWS) * (outside - self.recent)
        return self.recent > _THRESHOLD * self.outside + floor
