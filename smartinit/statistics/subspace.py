"""Streaming PCA with a small sketch: four skinny GEMM flops per entry, no tall SVD, mergeable.

State after n rows: mean μ, exact scatter about it, and a rank-q summary ``V diag(λ) Vᵀ`` of the scatter matrix.
A block X (b×d, mean m) is folded in through the current basis W = V only:

    Y = X̄ᵀ(X̄ W) + V diag(λ) VᵀW + c·(μ-m)((μ-m)ᵀW),   X̄ = X - 1mᵀ,   c = n·b/(n+b)

followed by a Nyström step (`smartinit.linalg.nystrom`). Everything that a batch adds to Y is a sum, so batches of a
block share one W and need not be kept. The mean correction is that of incremental PCA (Ross et al., IJCV 2008);
the sketch-and-Rayleigh-Ritz step replaces its SVD of the stacked ``(q + b + 1)×d`` matrix.
"""

# ruff: noqa: SLF001 - `settle_all` is part of the class: it steps many instances in one batched call

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from smartinit.linalg.nystrom import leading_directions, nystrom_step, random_basis
from smartinit.linalg.signs import with_largest_positive
from smartinit.spectrum import Certificate
from smartinit.statistics.block import Block
from smartinit.statistics.cost import BLOCK_ROWS, sketch_width
from smartinit.statistics.drift import Drift
from smartinit.statistics.energy import finite_energy, without_round_off
from smartinit.statistics.summary import Summary, angle_between, fit_width, merge_summaries

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from smartinit.linalg.nystrom import NystromStep

_CHUNK_ROWS = 4096
_WARM_UP_ROWS = 1024
_WARM_UP_BYTES = 4 << 20


class SubspacePCA:
    """Streaming PCA of rows ``(b, features)``; see the module docstring and `Statistic`.

    Args:
        features: d.
        components: directions that will be asked for, at most.
        centred: remove the mean.
        block_rows: rows that share one sketch, at most; a block ends with the batch that reaches it.
        seed: of the random starting sketch.
        device: where the state lives; rows are expected there.

    Cost: ``4 b d q`` flops per b rows and ``O(d q² + q³)`` per block; memory ``5 d q`` floats.
    """

    def __init__(
        self,
        features: int,
        components: int,
        *,
        centred: bool = True,
        block_rows: int = BLOCK_ROWS,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.features = features
        self.components = min(components, features)
        self.centred = centred
        self.block_rows = block_rows
        self.seed = seed
        self.width = sketch_width(features, self.components)
        self.half_width = max(self.components, (self.width + 1) // 2)  # all that the certificate asks of a half
        self._warm_up_rows = max(2 * self.width, min(_WARM_UP_ROWS, _WARM_UP_BYTES // (4 * features)))
        self._scatter = 0.0
        self._drift = Drift()
        self._blocks = 0
        self._cosines = torch.zeros(self.width, dtype=torch.float64)
        self._residuals = torch.full_like(self._cosines, -1.0)  # negative: not known yet
        self._unseen = torch.zeros(self.width + 1, dtype=torch.float64)  # captured by k directions; last: the total
        self._buffer: list[Tensor] = []
        self._buffered = 0
        self._generator = torch.Generator().manual_seed(seed)
        zeros = torch.zeros(features, dtype=torch.float64, device=device)
        empty = Summary(0, zeros, random_basis(features, self.width, seed).to(device), zeros[: self.width])
        self._whole, self._halves = empty, [empty.leading(self.half_width)] * 2
        self._clear_pending()

    @property
    def rows(self) -> int:
        """How many rows went in, pending ones included."""
        return self._whole.rows + self._block.rows + self._buffered

    @property
    def mean(self) -> Tensor:
        """``(d,)`` float64 mean of the rows (zeros if not centred)."""
        self.settle()
        return self._whole.mean

    @property
    def total(self) -> float:
        """Exact sum of squares about the mean (about zero if not centred)."""
        self.settle()
        return self._scatter

    def update(self, rows: Tensor) -> None:
        """Add rows ``(b, d)``. Blocks that are full are folded in by `settle_all` or by the next update.

        Raises:
            FloatingPointError: NaN or Inf in the rows; nothing was added then.
        """
        if self.full:
            settle_all([self])
        if self._whole.rows == 0 and self._buffered + rows.shape[0] < self._warm_up_rows:
            # The first basis comes from rows at hand: keep them until there are enough for a good one.
            finite_energy(rows.float())
            self._buffer.append(rows.detach().float().clone())
            self._buffered += rows.shape[0]
            return
        if self._whole.rows == 0:
            taken = max(self._warm_up_rows, self.block_rows // 2) - self._buffered
            if rows.shape[0] > taken:
                finite_energy(rows.float())  # all or nothing
            first = rows[:taken].float()
            self._warm_up(torch.cat([*self._buffer, first]) if self._buffer else first)
            rows = rows[taken:]
            if not rows.shape[0]:
                return
        shifted = (
            rows if rows.dtype != torch.float64 else rows.float()
        ) - self._block.shift  # one fused cast and subtraction
        energy = finite_energy(shifted)
        for start in range(0, shifted.shape[0], _CHUNK_ROWS):
            if start and self.full:
                # A later chunk needs a shift and basis of its own only if the block ends here; re-centre it.
                settle_all([self])
                self.update(rows[start:])
                return
            chunk = shifted[start : start + _CHUNK_ROWS]
            part = energy if chunk.shape[0] == shifted.shape[0] else finite_energy(chunk)
            projected, captured = self._block.project(chunk)
            outside = max(0.0, part - float(captured.sum())) / chunk.shape[0]
            drifted = self._drift.look(outside, chunk.shape[0], floor=1e-5 * part / chunk.shape[0])
            if drifted and chunk.shape[0] >= 2 * self.width:
                self._restart(rows[start:], captured, part)
                return
            self._block.absorb(chunk, projected, captured, part)

    @property
    def full(self) -> bool:
        """Whether the pending block has all its rows."""
        # A block is as long as all before it: early ones are short, when the estimate still moves much.
        return self._block.rows >= min(self.block_rows, max(self._whole.rows, self._warm_up_rows))

    def settle(self) -> None:
        """Fold buffered and pending rows into the estimate."""
        if self._buffer:
            self._warm_up(torch.cat(self._buffer))
        settle_all([self])

    def explained(self, components: int) -> Tensor:
        """``(k,)`` float64 shares of the variance at the last estimate, on the CPU; what is pending is not in it."""
        return self._whole.values[: min(components, self.width)].cpu() / max(self._scatter, 1e-300)

    def merge(self, other: SubspacePCA) -> None:
        """Add the rows of ``other``: exact on the two rank-q summaries, means and scatters.

        Raises:
            ValueError: other features or centring.
        """
        if (self.features, self.centred) != (other.features, other.centred):
            raise ValueError(
                f"cannot merge statistics of {self.features} and {other.features} features "
                f"(centred: {self.centred}, {other.centred})"
            )
        self.settle()
        other.settle()
        if other.rows == 0:
            return
        a, b = self._whole, other._whole
        if a.rows:
            offset = a.mean - b.mean.to(a.mean)
            self._scatter += other._scatter + a.rows * b.rows / (a.rows + b.rows) * float(offset @ offset)
        else:
            self._scatter = other._scatter
        merged = merge_summaries(a, b, self.width)
        overlap = (a.basis.mT @ merged.basis).double()
        self._cosines = overlap.diagonal().abs().cpu() if a.rows else fit_width(other._cosines, self.width)
        self._whole = merged
        self._halves = [
            merge_summaries(*pair, self.half_width) for pair in zip(self._halves, other._halves, strict=True)
        ]
        self._blocks += other._blocks
        self._residuals = torch.maximum(self._residuals, fit_width(other._residuals, self.width))
        self._unseen = self._unseen + torch.cat([fit_width(other._unseen[:-1], self.width), other._unseen[-1:]])
        self._whole = self._whole.revived(self._generator)
        self._clear_pending()

    def similarity(self, components: int) -> float:
        """Smallest cosine between the last two estimates of the leading directions."""
        k = min(components, self.width)
        return float(self._cosines[:k].min()) if k else 1.0

    def settled(self, tau: float, components: int) -> bool:
        """Whether `similarity` has reached ``tau``."""
        return self._blocks > 1 and self.similarity(components) >= tau

    def principal(self, components: int) -> tuple[Tensor, Tensor]:
        """``(k, d)`` float32 orthonormal rows and ``(k,)`` float64 values, best first; sign: largest entry positive."""
        self.settle()
        k = min(components, self.width)
        # Rows of a product are orthonormal to fp32 round-off only after one QR; R's diagonal carries the sign.
        factor = torch.linalg.qr(self._whole.basis.double())
        basis = (factor.Q * factor.R.diagonal().sign())[:, :k].mT
        return with_largest_positive(basis), self._whole.values[:k].clone()

    def certificate(self, components: int) -> Certificate:
        """Accuracy of the ``components`` leading directions; see `Certificate`. No further pass over data."""
        self.settle()
        k = min(components, self.width)
        captured = min(1.0, float(self._whole.values[:k].sum()) / self._scatter) if self._scatter > 0 else None
        angle = None
        first, second = self._halves
        if first.rows and second.rows and k:
            angle = angle_between(first, second, k)
        return Certificate(
            rows=self.rows,
            residual=float(self._residuals[k - 1]) if k and float(self._residuals[k - 1]) >= 0 else None,
            captured=captured,
            captured_held_out=min(1.0, float(self._unseen[k - 1] / self._unseen[-1]))
            if k and self._unseen[-1] > 0
            else None,
            split_half_angle=angle,
            similarity=self.similarity(k) if self._blocks > 1 else None,
            components=k,
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors that restore this statistic, at a block boundary."""
        self.settle()
        numbers = [self.features, self.components, self.centred, self.block_rows, self.seed, self._blocks]
        out = {
            "meta": torch.tensor(numbers),
            "scatter": torch.tensor([self._scatter, self._drift.outside, self._drift.recent], dtype=torch.float64),
            "cosines": self._cosines,
            "residuals": self._residuals,
            "unseen": self._unseen,
        }
        for name, summary in (("whole", self._whole), ("first", self._halves[0]), ("second", self._halves[1])):
            out[f"{name}.rows"] = torch.tensor(summary.rows)
            out[f"{name}.mean"] = summary.mean
            out[f"{name}.basis"] = summary.basis.contiguous()
            out[f"{name}.values"] = summary.values
        return {name: tensor.clone() for name, tensor in out.items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> SubspacePCA:
        """The inverse of `state`."""
        features, components, centred, block_rows, seed, blocks = (int(v) for v in state["meta"])
        device = state["whole.basis"].device
        new = cls(features, components, centred=bool(centred), block_rows=block_rows, seed=seed, device=device)
        new._whole, *new._halves = (
            Summary(int(state[f"{n}.rows"]), *(state[f"{n}.{part}"].clone() for part in ("mean", "basis", "values")))
            for n in ("whole", "first", "second")
        )
        new._scatter, *drift = state["scatter"].tolist()
        new._drift, new._blocks = Drift(*drift), blocks
        new._cosines, new._residuals, new._unseen = (state[n].clone() for n in ("cosines", "residuals", "unseen"))
        new._clear_pending()
        return new

    def _clear_pending(self) -> None:
        self._block = Block(self._whole.basis, self._whole.mean.float())

    def _restart(self, rows: Tensor, captured: Tensor, energy: float) -> None:
        """Summarise the rows at hand by themselves, as at the start, and merge: exact for what either knows."""
        taken = min(rows.shape[0], _CHUNK_ROWS)
        settle_all([self])
        blocks = self._blocks
        fresh = SubspacePCA(
            self.features,
            self.components,
            centred=self.centred,
            block_rows=self.block_rows,
            seed=self.seed + self._whole.rows,
            device=self._whole.basis.device,
        )
        fresh._warm_up(rows[:taken].float())
        if blocks % 2:
            fresh._halves.reverse()
        self._score_unseen(captured, taken, energy)
        self.merge(fresh)
        self._drift = Drift()
        # A merge of a few rows moves little, which says nothing about how settled the directions are.
        self._cosines = torch.zeros_like(self._cosines)
        if rows.shape[0] > taken:
            self.update(rows[taken:])

    def _warm_up(self, rows: Tensor) -> None:
        """First block: the rows are at hand, so the random sketch is improved by subspace iteration on them."""
        shift = rows.mean(0) if self.centred else torch.zeros_like(rows[0])
        shifted = rows - shift
        energy = finite_energy(shifted)
        # Float32 twice is as exact as float64, and faster.
        gap = shifted.mean(0).double() if self.centred else shift.double()
        mean = shift.double() + gap
        scatter = energy - rows.shape[0] * float(gap @ gap)
        self._scatter = without_round_off(scatter, rows.shape[0], mean)
        if self._scatter == 0.0:
            shifted = torch.zeros_like(shifted)
        basis, values = leading_directions(shifted, self._whole.basis, self._generator)
        self._whole = Summary(rows.shape[0], mean, basis.contiguous(), values)
        self._whole = self._whole.revived(self._generator)
        half = self._whole.leading(self.half_width)
        self._halves = [half, replace(half, rows=0, values=torch.zeros_like(half.values))]
        self._blocks = 1
        self._buffer, self._buffered = [], 0
        self._clear_pending()

    def _score_unseen(self, captured: Tensor, rows: int, energy: float) -> None:
        """Keep what the basis captured of the block before it had seen it; a short block joins the one before."""
        self._drift.outside = max(0.0, energy - float(captured.sum())) / rows
        scores = torch.cat([captured.cumsum(0).cpu(), torch.tensor([energy], dtype=torch.float64)])
        self._unseen = self._unseen + scores if 2 * rows < self.block_rows else scores


def settle_all(statistics: Iterable[SubspacePCA]) -> None:
    """Fold the pending block of every statistic into its estimate, equal shapes in one batched call.

    Args:
        statistics: each settled in place; those with nothing pending are left alone.
    """
    groups: dict[tuple[int, int, torch.device], list[SubspacePCA]] = defaultdict(list)
    for statistic in statistics:
        if statistic._block.rows:
            groups[statistic.features, statistic.width, statistic._block.product.device].append(statistic)
    for group in groups.values():
        _settle_group(group)


def _settle_group(group: list[SubspacePCA]) -> None:
    products, sketches, offsets = [], [], []
    for s in group:
        sketch, whole, rows = s._whole.basis, s._whole, s._block.rows
        product, offset = s._block.product[:-1].mT, s._block.offset
        if not s.centred:
            offset = torch.zeros_like(offset)
        # Sketch = basis, so the old summary times the sketch is a scaling of its columns.
        seen = whole.rows / (whole.rows + rows)
        shrink = rows * (seen - 1)  # n·b/(n+b) - b: about the block's own mean, then towards the common one
        inner = (sketch.mT @ offset.float()) * shrink
        offsets.append(offset)
        products.append(product + sketch * whole.values.float() + torch.outer(offset.float(), inner))
        sketches.append(sketch)
    stacked = torch.stack(sketches)
    step = nystrom_step(torch.stack(products), stacked)
    halves = _half_steps(group, stacked, offsets)
    for i, s in enumerate(group):
        _finish(s, step, i, offsets[i])
        s._halves[s._blocks % 2] = halves[i]
        s._blocks += 1
        s._clear_pending()


def _finish(s: SubspacePCA, step: NystromStep, i: int, offset: Tensor) -> None:
    """Write one problem's result back: basis, values, mean, scatter and the figures of the certificate."""
    rows, whole = s._block.rows, s._whole
    together = whole.rows + rows
    block_energy = s._block.energy
    s._scatter = max(0.0, s._scatter + block_energy - rows * rows / together * float(offset @ offset))
    gram, small = step.gram[i], step.small[i]
    # ‖Y_k - W_k M_k‖² and ‖Y_k‖² for every k at once: the residual of the directions before this update.
    size = gram.diagonal().cumsum(0)
    inside = small.square().cumsum(0).cumsum(1).diagonal()
    s._residuals = ((size - inside).clamp_min(0) / size.clamp_min(1e-300)).sqrt().cpu()
    s._cosines = step.overlap[i].diagonal().abs().cpu()
    s._score_unseen(s._block.captured, rows, block_energy)
    moved = s._block.shift.double() - whole.mean + offset  # the shift is the mean rounded to float32
    mean = whole.mean + moved * (rows / together)
    s._scatter = without_round_off(s._scatter, together, mean)
    values = step.values[i] * min(1.0, s._scatter / max(float(step.values[i].sum()), 1e-300))
    s._whole = Summary(together, mean, step.basis[i].contiguous() * (values > 0), values)
    s._whole = s._whole.revived(s._generator)


def _half_steps(group: list[SubspacePCA], sketches: Tensor, offsets: list[Tensor]) -> list[Summary]:
    """The block's own share goes to one of two halves, through the same products: no second look at rows."""
    products, means, counts = [], [], []
    width = group[0].half_width
    sketches = sketches[..., :width]
    for i, s in enumerate(group):
        rows, offset, half = s._block.rows, offsets[i], s._halves[s._blocks % 2]
        product = s._block.product[:width].mT - rows * torch.outer(offset.float(), sketches[i].mT @ offset.float())
        product, mean = half.joined_by(product, sketches[i], s._whole.mean + offset, rows)
        counts.append(half.rows + rows)
        means.append(mean)
        products.append(product)
    step = nystrom_step(torch.stack(products), sketches)
    return [Summary(counts[i], means[i], step.basis[i].contiguous(), step.values[i]) for i in range(len(group))]
