"""What merging does to one parameter of a base layer, as values: computed in blocks, rounded once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

# Numbers at a time, so that the work space does not grow with the layer. On a CPU it then also stays in the cache and
# is handed out again: with blocks of 4 million, fresh memory took longer than the arithmetic.
_BLOCK, _DEVICE_BLOCK = 1 << 18, 1 << 24


class WeightChange(Protocol):
    """What merging one adapter does to one parameter.

    Attributes:
        module: the base layer that holds the parameter.
        parameter: its name there.
        adapter_name: whose change it is, for messages.
    """

    @property
    def module(self) -> nn.Module:
        """The base layer."""

    @property
    def parameter(self) -> str:
        """The parameter's name."""

    @property
    def adapter_name(self) -> str:
        """The adapter."""

    def on(self, original: torch.Tensor, device: torch.device) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """The change as a function of some rows of the parameter: their values, in `wide`, and which they are.

        Args:
            original: the whole parameter as it is without adapters; it may lie elsewhere.
            device: where to compute.
        """

    def equals(self, other: WeightChange) -> bool:
        """Whether it does the same, whichever layer it is for."""


@dataclass(frozen=True, eq=False)
class LowRankChange:
    """``W += left @ right``; with a magnitude, every output of the sum is then scaled to its norm (DoRA).

    Attributes:
        module: the base layer.
        parameter: the name of W there.
        adapter_name: the adapter.
        left: ``(rows, r)`` of W as it is stored, ``s`` included; or ``(experts, rows, r)``.
        right: ``(r, columns)``, where columns are all further dimensions of W; or ``(experts, r, columns)``.
        magnitude: ``(out,)``; W becomes ``m ⊙ (W + Δ) / ‖W₀ + Δ‖`` with ``W₀`` the weight without adapters.
        by_columns: whether the outputs are the columns of the stored weight instead of its rows.
    """

    module: nn.Module
    parameter: str
    adapter_name: str
    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None = None
    by_columns: bool = False

    def on(self, original: torch.Tensor, device: torch.device) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """See `WeightChange.on`. With a magnitude this takes a pass over the weight."""
        dtype = wide(original.dtype, device)
        left, right = self.left.to(device, dtype), self.right.to(device, dtype)

        def add(values: torch.Tensor, rows: slice) -> torch.Tensor:
            if left.dim() == 2:  # noqa: PLR2004 - a matrix
                return torch.addmm(values.flatten(1), left[rows], right).view_as(values)
            return torch.baddbmm(values, left[rows], right[rows])

        if self.magnitude is None:
            return add
        factor = self._factor(original, self.magnitude.to(device, dtype), add)
        shape = (1, -1) if self.by_columns else (-1, *(1,) * (original.dim() - 1))

        def scale(values: torch.Tensor, rows: slice) -> torch.Tensor:
            return add(values, rows) * (factor if self.by_columns else factor[rows]).view(shape)

        return scale

    def _factor(
        self, original: torch.Tensor, magnitude: torch.Tensor, add: Callable[[torch.Tensor, slice], torch.Tensor]
    ) -> torch.Tensor:
        """``m / ‖W₀ + Δ‖``, ``(out,)``; one where there is nothing to scale."""
        norms = []
        for rows in blocks(original):
            block = add(original[rows].to(magnitude), rows).flatten(1)
            norms.append(torch.linalg.vector_norm(block, dim=0 if self.by_columns else 1))
        norm = torch.linalg.vector_norm(torch.stack(norms), dim=0) if self.by_columns else torch.cat(norms)
        return torch.where(norm > 0, magnitude.flatten() / norm, torch.ones_like(norm))

    def equals(self, other: WeightChange) -> bool:
        """Whether it has the very same factors and magnitude."""
        return (
            isinstance(other, LowRankChange)
            and _equal(self.left, other.left)
            and _equal(self.right, other.right)
            and (self.magnitude is None) == (other.magnitude is None)
            and (
                self.magnitude is None
                or other.magnitude is None
                or (self.by_columns == other.by_columns and _equal(self.magnitude, other.magnitude))
            )
        )


@dataclass(frozen=True, eq=False)
class Shift:
    """``b += values``, for biases.

    Attributes:
        module: the base layer.
        parameter: the name of b there.
        adapter_name: the adapter.
        values: the shape of b.
    """

    module: nn.Module
    parameter: str
    adapter_name: str
    values: torch.Tensor

    def on(self, original: torch.Tensor, device: torch.device) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """See `WeightChange.on`."""
        shift = self.values.to(device, wide(original.dtype, device))
        return lambda values, rows: values + shift[rows]

    def equals(self, other: WeightChange) -> bool:
        """Whether it adds the very same values."""
        return isinstance(other, Shift) and _equal(self.values, other.values)


@dataclass(frozen=True, eq=False)
class RowReplacement:
    """Some rows of a stored weight become others: trained tokens of an embedding, or of a head.

    Attributes:
        module: the base layer.
        parameter: the name of the weight there.
        adapter_name: the adapter.
        index: which rows, each once.
        values: ``(len(index), …)``, what they become.
    """

    module: nn.Module
    parameter: str
    adapter_name: str
    index: Sequence[int]
    values: torch.Tensor

    def on(self, original: torch.Tensor, device: torch.device) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        """See `WeightChange.on`."""
        index = torch.tensor(list(self.index), device=device)
        new = self.values.to(device, wide(original.dtype, device))

        def replace(values: torch.Tensor, rows: slice) -> torch.Tensor:
            here = (index >= rows.start) & (index < rows.stop)
            return values.index_copy(0, index[here] - rows.start, new[here])

        return replace

    def equals(self, other: WeightChange) -> bool:
        """Whether it gives the same rows the same values."""
        return (
            isinstance(other, RowReplacement)
            and list(self.index) == list(other.index)
            and _equal(self.values, other.values)
        )


@torch.no_grad()
def write_changed(out: torch.Tensor, original: torch.Tensor, changes: Sequence[WeightChange]) -> None:
    """Let ``out`` be ``original`` after all changes, in their order, rounded once to its dtype.

    Args:
        out: the parameter to write to, which may be the original itself.
        original: the parameter without adapters.
        changes: what happens to it.

    Cost: ``2·rank·rows·columns`` per low-rank change, twice that with a magnitude; work space for a block of numbers.
    """
    dtype = wide(original.dtype, out.device)
    steps = [change.on(original, out.device) for change in changes]
    for rows in blocks(original):
        values = original[rows].to(out.device, dtype)
        for step in steps:
            values = step(values, rows)
        out[rows] = values


def blocks(stored: torch.Tensor) -> Iterator[slice]:
    """Slices of a tensor's first dimension, of so many numbers that a block is neither slow nor large."""
    numbers = _BLOCK if stored.device.type == "cpu" else _DEVICE_BLOCK
    step = max(1, numbers // max(1, stored[:1].numel()))
    return (slice(first, min(first + step, len(stored))) for first in range(0, len(stored), step))


def wide(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a weight of some dtype is computed with: digits to spare, if the device has them."""
    if dtype in (torch.float32, torch.float64) and device.type != "mps":
        return torch.float64
    return torch.float32


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.to(one.device, one.dtype))
