"""Tables of the benchmarks, as markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: Sequence[str]) -> str:
    """Rows of cells under a head; columns named in ``words`` are aligned to the left, all others to the right."""
    head = [f"| {' | '.join(columns)} |", f"|{'|'.join('---' if name in words else '--:' for name in columns)}|"]
    return "\n".join([*head, *(f"| {' | '.join(cells)} |" for cells in rows)])


def number(value: float | None, form: str) -> str:
    """A number as ``form`` has it; nothing for None."""
    return "" if value is None else form.format(value)
