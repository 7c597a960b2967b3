"""The exact second moment ``Σ x xᵀ``: as cheap as a sketch for small d, and it serves every method."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from smartinit.linalg.signs import with_largest_positive
from smartinit.linalg.threads import small_eigh
from smartinit.spectrum import Certificate
from smartinit.statistics.cost import BLOCK_ROWS
from smartinit.statistics.energy import without_round_off
from smartinit.statistics.panels import Panels

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK_ROWS = 4096


class GramStatistic:
    """Second moments of rows ``(b, features)`` in float64, kept as two halves of the data.

    Chunks are multiplied in float32 about a fixed shift (the first batch's mean, so that a large mean costs no
    precision) and added in float64. Blocks go to the halves in turn: their difference is the sampling error, and
    the directions of one are scored on the rows of the other.

    Args:
        features: d.
        centred: remove the mean, in everything but `second_moment`, which has both.
        block_rows: rows after which the other half is fed and convergence is looked at.
        device: where the state lives.
        moments_only: one sum of all the data, and no look at convergence: half the memory, and no ``O(d³)`` work
            until directions are asked for. For methods that read `second_moment` alone.

    Cost: ``b d²`` flops per b rows; ``O(d³)`` whenever directions are asked for, and for every block unless
    ``moments_only``; memory ``d²`` doubles (half of it with ``moments_only``).
    """

    def __init__(
        self,
        features: int,
        *,
        centred: bool = True,
        block_rows: int = BLOCK_ROWS,
        device: torch.device | str = "cpu",
        moments_only: bool = False,
    ) -> None:
        self.features = features
        self.components = features
        self.centred = centred
        self.block_rows = block_rows
        self.moments_only = moments_only
        halves = 1 if moments_only else 2
        zeros = torch.zeros(features, dtype=torch.float64, device=device)
        self._panels = Panels(features)
        self._shift = zeros.float()
        self._counts = [0] * halves
        self._sums = zeros.repeat(halves, 1)
        self._moments = zeros.new_zeros(halves, self._panels.size)
        self._block = 0
        self._in_block = 0
        self._cosines: Tensor | None = None  # between the last two estimates
        self._basis = zeros.unsqueeze(1)
        self._decomposed_rows = self._compared_rows = -1
        self._half_bases: list[Tensor] = []
        self._values = zeros

    @property
    def rows(self) -> int:
        """How many rows went in."""
        return sum(self._counts)

    @property
    def mean(self) -> Tensor:
        """``(d,)`` float64 mean of the rows (zeros if not centred)."""
        if not self.centred or not self.rows:
            return torch.zeros_like(self._sums[0])
        return self._shift.double() + self._sums.sum(0) / self.rows

    @property
    def total(self) -> float:
        """Trace of `matrix`."""
        u, v = self._to_origin(self._sums.sum(0), self.rows, centred=self.centred)
        trace = sum(self._panels.trace(moment) for moment in self._moments) + 2 * float(u @ v)
        return without_round_off(max(0.0, trace), self.rows, self.mean)

    def matrix(self) -> Tensor:
        """``(d, d)`` float64: ``Σ (x-μ)(x-μ)ᵀ``, or ``Σ x xᵀ`` if not centred."""
        return self.second_moment(centred=self.centred)

    def second_moment(self, centred: bool = False) -> Tensor:
        """``(d, d)`` float64 ``Σ x xᵀ`` of all rows, or ``Σ (x-μ)(x-μ)ᵀ``, whatever the statistic itself does.

        Cost: ``O(d²)``; the matrix is made anew by every call.
        """
        moment = self._moments[0] if self.moments_only else self._moments.sum(0)
        return self._about(moment, self._sums.sum(0), self.rows, centred=centred)

    def update(self, rows: Tensor) -> None:
        """Add rows ``(b, d)``.

        Raises:
            FloatingPointError: NaN or Inf in the rows, or squares that overflow; nothing was added then.
        """
        if not rows.shape[0]:
            return
        shift = self._shift if self.rows else rows.mean(0, dtype=torch.float32)
        chunks = rows.split(_CHUNK_ROWS)
        shifted = chunks[0] - shift
        for i, chunk in enumerate(chunks):
            _refuse_overflow(chunk - shift if i else shifted)
        half = 0 if self.moments_only else self._block % 2
        self._shift = shift
        for i, chunk in enumerate(chunks):
            shifted = chunk - shift if i else shifted
            self._sums[half] += shifted.sum(0, dtype=torch.float64)
            self._panels.add_rows(self._moments[half], shifted)
        self._counts[half] += rows.shape[0]
        self._in_block += rows.shape[0]

    @property
    def full(self) -> bool:
        """Whether enough rows are pending for a new estimate."""
        return self._in_block >= self.block_rows

    def settle(self) -> None:
        """Close the block: look at the step from the last estimate, then feed the other half."""
        if not self._in_block:
            return
        if not self.moments_only:
            self._decompose()
        self._block += 1
        self._in_block = 0

    def explained(self, components: int) -> Tensor:
        """``(k,)`` float64 shares of the variance at the end of the last block, on the CPU."""
        return self._values[: min(components, self.features)].cpu() / float(self._values.sum().clamp_min(1e-300))

    def merge(self, other: GramStatistic) -> None:
        """Add the rows of ``other``: exact.

        Raises:
            ValueError: other features, centring or halves.
        """
        if (self.features, self.centred) != (other.features, other.centred):
            msg = (
                f"cannot merge statistics of {self.features} and {other.features} features "
                f"(centred: {self.centred}, {other.centred})"
            )
            raise ValueError(msg)
        if self.moments_only != other.moments_only:
            msg = "cannot merge a statistic that keeps halves of its data with one that has moments_only"
            raise ValueError(msg)
        if self.rows == 0:
            self._shift = other._shift.to(self._shift, copy=True)
        gap = (other._shift.to(self._shift) - self._shift).double()
        for half, count in enumerate(other._counts):
            total = other._sums[half].to(gap)
            self._moments[half] += other._moments[half].to(gap)
            self._panels.add_outer(self._moments[half], gap, total + count / 2 * gap)
            self._sums[half] += total + count * gap
            self._counts[half] += count
        self._block = max(self._block, other._block)

    def similarity(self, components: int) -> float:
        """Smallest cosine between the last two estimates of the leading directions."""
        if self._cosines is None:
            return 0.0
        k = min(components, self.features)
        return float(self._cosines[:k].min()) if k else 1.0

    def settled(self, tau: float, components: int) -> bool:
        """Whether `similarity` has reached ``tau``."""
        return self._cosines is not None and self.similarity(components) >= tau

    def principal(self, components: int) -> tuple[Tensor, Tensor]:
        """``(k, d)`` float32 orthonormal rows and ``(k,)`` float64 values, best first; sign: largest entry positive."""
        self._decompose()
        k = min(components, self.features)
        rows = self._basis[:, :k].mT
        return with_largest_positive(rows), self._values[:k].clone()

    def certificate(self, components: int) -> Certificate:
        """Accuracy of the leading directions: the eigenspace is exact, the sampling error is measured."""
        k = min(components, self.features)
        total = self.total
        _, values = self.principal(k)
        held_out, angle = self._compare_halves(k)
        return Certificate(
            rows=self.rows,
            residual=0.0,
            captured=min(1.0, float(values.sum()) / total) if total > 0 else None,
            captured_held_out=held_out,
            split_half_angle=angle,
            similarity=self.similarity(k) if self._cosines is not None else None,
            components=k,
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors that restore this statistic."""
        numbers = [self.features, self.centred, self.block_rows, self._block, self._in_block, self.moments_only]
        return {
            "meta": torch.tensor(numbers),
            "counts": torch.tensor(self._counts),
            "shift": self._shift,
            "sums": self._sums,
            "moments": self._moments,
            "cosines": torch.full((self.features,), -1.0).double() if self._cosines is None else self._cosines,
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> GramStatistic:
        """The inverse of `state`."""
        features, centred, block_rows, block, in_block, moments_only = (int(v) for v in state["meta"])
        new = cls(
            features,
            centred=bool(centred),
            block_rows=block_rows,
            device=state["sums"].device,
            moments_only=bool(moments_only),
        )
        new._block, new._in_block = block, in_block
        new._counts = [int(c) for c in state["counts"]]
        new._shift, new._sums, new._moments = (state[n].clone() for n in ("shift", "sums", "moments"))
        if new.rows and not moments_only:
            new._decompose()
        new._cosines = None if bool((state["cosines"] < 0).all()) else state["cosines"].clone()
        return new

    def _about(self, moment: Tensor, total: Tensor, rows: int, *, centred: bool) -> Tensor:
        """Dense second moment about the mean or about zero, from one about the shift."""
        return self._panels.dense(moment, self._to_origin(total, rows, centred=centred))

    def _to_origin(self, total: Tensor, rows: int, *, centred: bool) -> tuple[Tensor, Tensor]:
        """``u, v`` such that ``u vᵀ + v uᵀ`` takes a second moment from the shift to the mean or to zero."""
        if centred:
            return total / (-2 * max(rows, 1)), total
        shift = self._shift.double()
        return shift, total + rows / 2 * shift

    def _decompose(self) -> None:
        if self._decomposed_rows != self.rows:
            previous, known = self._basis, self._decomposed_rows >= 0
            self._values, self._basis = _eigh(self.matrix())
            if self.total == 0.0:  # constant rows: what the decomposition finds is round-off
                self._values = torch.zeros_like(self._values)
            self._cosines = (previous * self._basis).sum(0).abs().cpu() if known else None
            self._decomposed_rows = self.rows

    def _compare_halves(self, k: int) -> tuple[float | None, float | None]:
        """Captured variance of one half's directions on the other, and the angle between the two, in degrees."""
        if self.moments_only or not all(self._counts) or not k:
            return None, None
        scatters = [self._about(self._moments[i], self._sums[i], self._counts[i], centred=self.centred) for i in (0, 1)]
        if self._compared_rows != self.rows:
            self._half_bases, self._compared_rows = [_eigh(s)[1] for s in scatters], self.rows
        bases = [basis[:, :k] for basis in self._half_bases]
        shares = [
            float((bases[i] * (scatters[1 - i] @ bases[i])).sum()) / max(float(scatters[1 - i].trace()), 1e-300)
            for i in (0, 1)
        ]
        cosine = float((bases[0].mT @ bases[1]).square().sum() / k) ** 0.5
        return min(1.0, sum(shares) / 2), math.degrees(math.acos(min(1.0, cosine)))


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending, clamped at 0) and vectors of a symmetric matrix."""
    values, vectors = small_eigh(matrix)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _refuse_overflow(rows: Tensor) -> None:
    """No entry of ``Σ x xᵀ`` is larger than its trace: if that is finite in the rows' precision, all of it is.

    Raises:
        FloatingPointError: it is not.
    """
    energy = torch.linalg.vector_norm(rows, dim=1).square().sum()
    if not math.isfinite(float(energy)):
        raise FloatingPointError
