"""What every statistic of activation rows can do. A leaf: knows none of its implementers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from smartinit.spectrum import Certificate


class Statistic(Protocol):
    """A summary of rows ``(b, d)`` that can be updated, merged, stored, and asked for principal directions.

    Attributes:
        features: d, the number of columns.
        components: most directions that can be asked for.
        centred: whether the mean is removed.
    """

    features: int
    components: int
    centred: bool

    @property
    def rows(self) -> int:
        """How many rows went in."""
        ...

    @property
    def mean(self) -> Tensor:
        """``(d,)`` float64 mean of the rows."""
        ...

    @property
    def total(self) -> float:
        """Exact sum of squares, about the mean if centred: ``tr C``."""
        ...

    def update(self, rows: Tensor) -> None:
        """Add rows ``(b, d)``, any float dtype.

        Raises:
            FloatingPointError: a row holds NaN or Inf; the statistic is unchanged then.
        """
        ...

    @property
    def full(self) -> bool:
        """Whether enough rows are pending for a new estimate."""
        ...

    def settle(self) -> None:
        """Fold what is pending into the estimate."""
        ...

    def explained(self, components: int) -> Tensor:
        """``(k,)`` float64 shares of the variance at the last estimate, on the CPU; what is pending is not in it."""
        ...

    def merge(self, other: Self) -> None:
        """Add all rows of ``other``, which is left as it is."""
        ...

    def similarity(self, components: int) -> float:
        """Smallest cosine between the last two estimates of the leading directions; 0.0 before there are two."""
        ...

    def settled(self, tau: float, components: int) -> bool:
        """Whether `similarity` has reached ``tau`` (PEFT's stopping rule: a step size, not an error)."""
        ...

    def principal(self, components: int) -> tuple[Tensor, Tensor]:
        """``(k, d)`` orthonormal directions and ``(k,)`` float64 values, best first."""
        ...

    def certificate(self, components: int) -> Certificate:
        """How far the leading directions can be trusted."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors for a safetensors file."""
        ...

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Self:
        """The inverse of `state`."""
        ...
