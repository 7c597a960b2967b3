"""One comparison of a benchmark: ours beside its rival, measured in the same run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of the table; None where a figure makes no sense.

    Attributes:
        what: what was done.
        setting: shapes, rank, dtype.
        ours_ms: wall time of ours, in milliseconds.
        theirs_ms: wall time of PEFT's.
        bare_ms: wall time without any adapter.
        ours_mb: peak memory of ours above what was there before, in 10^6 bytes.
        theirs_mb: the same of PEFT's.
        note: anything that the reader must know.
    """

    what: str
    setting: str
    ours_ms: float
    theirs_ms: float | None = None
    bare_ms: float | None = None
    ours_mb: float | None = None
    theirs_mb: float | None = None
    note: str = ""

    @property
    def speedup(self) -> float | None:
        """Their time over ours."""
        return None if self.theirs_ms is None else self.theirs_ms / self.ours_ms
