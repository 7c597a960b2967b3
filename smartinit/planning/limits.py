"""What bounds a plan: a budget, and a range of ranks per target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Limits:
    """Bounds that every planner keeps.

    Attributes:
        budget: most ranks in total; None: the sum of the ranks asked for.
        params: most adapter parameters in total, ``Σ rank·(in + out)``, instead of ``budget``.
        multiple_of: every rank is a multiple of this.
        min_rank: every target gets at least this.
        max_rank: no target gets more than this.

    Raises:
        ConfigError: bounds that contradict each other.
    """

    budget: int | None = None
    params: int | None = None
    multiple_of: int = 1
    min_rank: int = 0
    max_rank: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.budget is not None and self.params is not None:
            msg = "give budget (ranks) or params (parameters), not both"
            raise ConfigError(msg)
        for name in ("budget", "params", "multiple_of", "max_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                msg = f"{name}={value}: expected at least 1"
                raise ConfigError(msg)
        if self.min_rank < 0:
            msg = f"min_rank={self.min_rank}: expected at least 0"
            raise ConfigError(msg)
        if self.max_rank is not None and self.min_rank > self.max_rank:
            msg = f"min_rank={self.min_rank} is above max_rank={self.max_rank}"
            raise ConfigError(msg)

    def floor(self, name: str, cap: int) -> int:
        """The least rank of a target: ``min_rank`` rounded up to the multiple.

        Raises:
            ConfigError: the target cannot hold it.
        """
        least = -(-self.min_rank // self.multiple_of) * self.multiple_of
        if least > self.ceiling(cap):
            msg = (
                f"min_rank={self.min_rank} (multiples of {self.multiple_of}) is above the most that '{name}' can hold, "
                f"{self.ceiling(cap)}; lower min_rank or raise rho, max_rank or the rank of that layer"
            )
            raise ConfigError(msg)
        return least

    def ceiling(self, cap: int) -> int:
        """The largest allowed rank of a target that can hold ``cap``: capped, and a multiple."""
        return min(cap, self.max_rank or cap) // self.multiple_of * self.multiple_of

    def allowance(self, ranks: Mapping[str, int], costs: Mapping[str, int]) -> tuple[int, dict[str, int]]:
        """The budget, and the price of one rank per target in the same unit."""
        if self.params is not None:
            return self.params, dict(costs)
        return (sum(ranks.values()) if self.budget is None else self.budget), dict.fromkeys(ranks, 1)
