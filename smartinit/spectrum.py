"""The candidate directions of one layer, best first: the costly, rank-free half of every method."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch

from smartinit.errors import ConfigError


@dataclass(frozen=True)
class Certificate:
    """How far a spectrum can be trusted. ``None`` means: too little data to tell.

    Attributes:
        rows: activation rows (tokens) that went in.
        residual: ``‖C V - V (Vᵀ C V)‖_F / ‖C V‖_F`` of the kept directions, as they were before the last
            update; 0 is an exact eigenspace.
        captured: ``tr(Vᵀ C V) / tr C`` on the rows that were used, in 0..1.
        captured_held_out: the same share on rows that the directions had not seen yet.
        split_half_angle: root-mean-square principal angle, in degrees, between the estimates
            from two disjoint halves of the data: the sampling error of the subspace.
        similarity: smallest cosine between the last two consecutive estimates of a direction
            that is kept, the quantity which ``tau`` bounds.
        settled: whether ``tau`` was reached before the data or ``max_batches`` ran out.
        components: number of leading directions that the figures are for.
        damping: what was added to a singular second moment, as a share of its (mean) diagonal; 0: nothing.
    """

    rows: int
    residual: float | None = None
    captured: float | None = None
    captured_held_out: float | None = None
    split_half_angle: float | None = None
    similarity: float | None = None
    settled: bool | None = None
    components: int = 0
    damping: float | None = None

    def as_dict(self) -> dict[str, float | int | bool | None]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Spectrum:
    """Directions of one layer, best first.

    Attributes:
        directions: ``(k, in_features)``, rows: on the input side (orthonormal, unless the method says otherwise).
        left: ``(out_features, k)``, columns: their partners on the output side, for methods that have some.
        values: ``(k,)`` float64, the weight of each direction (for EVA: the summed squared
            projections of the centred rows, σ² of the centred data), descending.
        total: the sum of *all* values, kept or not (for EVA: the total centred sum of squares).
        shape: ``(out_features, in_features)`` of the layer's weight.
        certificate: accuracy of the directions.
        base: ``(out_features, in_features)`` quantised weight that a method found on the way.
    """

    directions: torch.Tensor
    values: torch.Tensor
    total: float
    shape: tuple[int, int]
    certificate: Certificate = field(default_factory=lambda: Certificate(rows=0))
    left: torch.Tensor | None = None
    base: torch.Tensor | None = None

    def __len__(self) -> int:
        """The number of candidate directions."""
        return int(self.values.numel())

    @property
    def ratios(self) -> torch.Tensor:
        """``(k,)`` share of the total which each direction explains; zeros when the total is 0."""
        return self.values / self.total if self.total > 0 else self.values * 0

    def require(self, rank: int) -> None:
        """Refuse a rank above the number of directions.

        Raises:
            ConfigError: see above.
        """
        if rank > len(self):
            msg = f"rank {rank} needs as many directions, but the spectrum has {len(self)}: raise its limit"
            raise ConfigError(msg)

    @classmethod
    def of_equals(
        cls, directions: torch.Tensor, shape: tuple[int, int], left: torch.Tensor | None = None, *, total: float
    ) -> Spectrum:
        """Directions that were not chosen by any data: each is worth ``total / in_features``.

        Args:
            directions: ``(k, in_features)``.
            shape: ``(out_features, in_features)``.
            left: ``(out_features, k)``.
            total: to be shared.
        """
        values = torch.full((directions.shape[0],), total / shape[1], dtype=torch.float64)
        return cls(directions, values, total, shape, left=left)

    def truncate(self, k: int) -> Spectrum:
        """The best ``k`` directions; the total stays that of the whole."""
        left = None if self.left is None else self.left[:, :k]
        return replace(self, directions=self.directions[:k], values=self.values[:k], left=left)
