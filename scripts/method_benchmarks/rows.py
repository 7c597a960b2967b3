"""One comparison of a benchmark: ours beside its rival, measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a figure makes no sense.

    Attributes:
        method: name of the initialisation, as registered.
        setting: shape, rank, dtype: what the line is for.
        ours_seconds: wall time of ours.
        theirs_seconds: wall time of the rival.
        ours_error: relative error of ``B A`` against the optimum in float64.
        theirs_error: the same of the rival.
        ours_mb: peak memory of ours above what the input takes, in 10^6 bytes.
        theirs_mb: the same of the rival.
        note: anything that the reader must know, such as the rival's options.
    """

    method: str
    setting: str
    ours_seconds: float | None = None
    theirs_seconds: float | None = None
    ours_error: float | None = None
    theirs_error: float | None = None
    ours_mb: float | None = None
    theirs_mb: float | None = None
    note: str = ""

    @property
    def speedup(self) -> float | None:
        """Their time over ours."""
        if self.ours_seconds is None or self.theirs_seconds is None:
            return None
        return self.theirs_seconds / self.ours_seconds
