"""What is worked out from a statistic once and used by every layer that reads the same input."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class _Counted(Protocol):
    @property
    def rows(self) -> int: ...


class Derived(Generic[T]):
    """A function of a statistic that remembers its last result.

    q, k and v ask for the same matrix one after the other. Only one result is kept, since it may be as large as the
    statistic, and only as long as its statistic is alive and has seen no further row.

    Args:
        function: of the statistic alone.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self._function = function
        self._kept: tuple[weakref.ref[_Counted], int, T] | None = None

    def __call__(self, statistic: _Counted) -> T:
        """The function's value, computed at most once in a row for one statistic."""
        kept = self._kept  # one read: another thread may replace it at any time
        if kept is not None and kept[0]() is statistic and kept[1] == statistic.rows:
            return kept[2]
        self._kept = None  # its memory is free before more is asked for
        value = self._function(statistic)
        self._kept = (weakref.ref(statistic, self._forget), statistic.rows, value)
        return value

    def clear(self) -> None:
        """Forget the result."""
        self._kept = None

    def _forget(self, reference: weakref.ref[_Counted]) -> None:
        kept = self._kept
        if kept is not None and kept[0] is reference:
            self._kept = None
