"""A symmetric ``(d, d)`` sum in half the memory and half the work: only panels of its upper triangle are kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

# Wide enough that a product of one panel keeps a machine busy; narrow enough that the diagonal blocks, of which
# one half is redundant, weigh little.
_PANEL = 256


@dataclass(frozen=True)
class Panels:
    """Where the entries of a symmetric matrix lie in a flat tensor ``(size,)``.

    Panel i holds rows ``start..stop`` from column ``start`` on. The flat tensor is one piece, so that a state is
    saved, sent and added up without unpacking it.

    Attributes:
        features: d.

    Cost: ``d² + 256 d`` over 2 entries; ``b d (d + 256)`` flops for b rows.
    """

    features: int

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """``(start, stop, offset)`` of every panel."""
        spans, offset = [], 0
        for start in range(0, self.features, _PANEL):
            stop = min(start + _PANEL, self.features)
            spans.append((start, stop, offset))
            offset += (stop - start) * (self.features - start)
        return tuple(spans)

    @property
    def size(self) -> int:
        """Entries of the flat tensor."""
        start, stop, offset = self.spans[-1]
        return offset + (stop - start) * (self.features - start)

    def views(self, flat: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """``(start, stop, panel)``; the panel ``(stop - start, d - start)`` shares the memory of ``flat``."""
        for start, stop, offset in self.spans:
            shape = (stop - start, self.features - start)
            yield start, stop, flat[offset : offset + shape[0] * shape[1]].view(shape)

    def add_rows(self, flat: Tensor, rows: Tensor) -> None:
        """Add ``Σ x xᵀ`` of rows ``(b, d)``: multiplied in their precision, added in that of ``flat``."""
        for start, stop, panel in self.views(flat):
            panel.add_(rows[:, start:stop].mT @ rows[:, start:])

    def add_outer(self, flat: Tensor, u: Tensor, v: Tensor) -> None:
        """Add ``u vᵀ + v uᵀ``."""
        for start, stop, panel in self.views(flat):
            panel.add_(torch.outer(u[start:stop], v[start:])).add_(torch.outer(v[start:stop], u[start:]))

    def trace(self, flat: Tensor) -> float:
        """Sum of the diagonal."""
        return sum(float(panel.diagonal().sum()) for _, _, panel in self.views(flat))

    def dense(self, flat: Tensor, outer: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """The whole ``(d, d)`` matrix, exactly symmetric; plus ``u vᵀ + v uᵀ`` for ``outer = (u, v)``."""
        whole = flat.new_empty(self.features, self.features)
        for start, stop, panel in self.views(flat):
            rows = panel
            if outer is not None:
                u, v = outer
                rows = panel + torch.outer(u[start:stop], v[start:]) + torch.outer(v[start:stop], u[start:])
            block = rows[:, : stop - start]
            whole[start:stop, start:] = rows
            whole[start:, start:stop] = rows.mT
            whole[start:stop, start:stop] = (block + block.mT) / 2
        return whole
