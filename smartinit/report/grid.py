"""Where each target stands in a table of the model: a row per kind of module, a column per layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

MOST_ROWS = 24
"""Up to this many rows, numbered modules within one layer (``mlp.0``, ``mlp.2``) get a row each."""


@dataclass(frozen=True)
class Grid:
    """The table.

    Attributes:
        rows: label of each kind of module, in model order.
        columns: layer indices, ascending; None at the end stands for targets without a layer number.
        cells: (row, column) -> the targets there: one, or several where numbered modules (experts) share a row.
    """

    rows: tuple[str, ...]
    columns: tuple[int | None, ...]
    cells: Mapping[tuple[int, int], tuple[str, ...]]

    def __post_init__(self) -> None:
        """Freeze the mapping: a grid is a value."""
        object.__setattr__(self, "cells", MappingProxyType(dict(self.cells)))

    @cached_property
    def row_of(self) -> Mapping[str, int]:
        """Target name -> its row."""
        return MappingProxyType({name: row for (row, _), names in self.cells.items() for name in names})


class _Kind(NamedTuple):
    """What targets of different layers have in common: the path before and after the layer number."""

    prefix: tuple[str, ...]
    tail: tuple[str, ...]


def arrange(names: Iterable[str]) -> Grid:
    """Put targets into rows and columns.

    The first number in a path is its layer. A row's label is the end of the path, as short as tells it from the other
    rows (``q_proj``; ``output.dense`` and ``attention.output.dense``), led by what tells two stacks of layers apart
    (``encoder: fc1``). Where several modules of one layer differ by a number only, each gets its row if there are at
    most `MOST_ROWS` in all; otherwise they share one, with ``*`` for the number.

    Args:
        names: dotted module names, in model order.
    """
    names = list(names)
    cells = _cells(names, starred=True)
    if any(len(there) > 1 for there in cells.values()):
        apart = _cells(names, starred=False)
        if len({kind for kind, _ in apart}) <= MOST_ROWS:
            cells = apart
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = {layer for _, layer in cells}
    columns: list[int | None] = [*sorted(layer for layer in layers if layer is not None)]
    if None in layers:
        columns.append(None)
    row, column = ({value: i for i, value in enumerate(values)} for values in (kinds, columns))
    return Grid(
        _labels(kinds),
        tuple(columns),
        {(row[kind], column[layer]): tuple(there) for (kind, layer), there in cells.items()},
    )


def _cells(names: Sequence[str], *, starred: bool) -> dict[tuple[_Kind, int | None], list[str]]:
    found: dict[tuple[_Kind, int | None], list[str]] = {}
    for name in names:
        found.setdefault(_split(name, starred=starred), []).append(name)
    return found


def _split(name: str, *, starred: bool) -> tuple[_Kind, int | None]:
    """Kind and layer; with ``starred``, numbers after the layer's are no part of the kind."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if first is None:
        return _Kind((), tuple(parts)), None
    prefix, tail = parts[:first], parts[first + 1 :]
    if not tail:  # the numbered module is the target itself, as in a Sequential
        prefix, tail = prefix[:-1], [*prefix[-1:], "*"]
    return _Kind(tuple(prefix), tuple("*" if starred and p.isdecimal() else p for p in tail)), int(parts[first])


def _labels(kinds: Sequence[_Kind]) -> tuple[str, ...]:
    prefixes: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for kind in kinds:
        prefixes.setdefault(kind.tail, []).append(kind.prefix)
    short = {tail: _shortest_ending(tail, prefixes) for tail in prefixes}
    return tuple(f"{_stack(kind.prefix, prefixes[kind.tail])}{short[kind.tail]}" for kind in kinds)


def _shortest_ending(tail: tuple[str, ...], others: Iterable[tuple[str, ...]]) -> str:
    """The end of ``tail`` that no other has, not beginning with a number; all of it if another one ends like that."""
    rivals = [other for other in others if other != tail]
    for length in range(1, len(tail)):
        end = tail[-length:]
        if not (end[0] == "*" or end[0].isdecimal() or any(other[-length:] == end for other in rivals)):
            return ".".join(end)
    return ".".join(tail)


def _stack(prefix: tuple[str, ...], prefixes: Sequence[tuple[str, ...]]) -> str:
    """What tells this stack of layers from the others that have modules of the same name: nothing if there are none."""
    if len(prefixes) == 1 or not prefix:
        return ""
    same = 0
    while len({other[: same + 1] for other in prefixes}) == 1:
        same += 1
    heads = [other[same : same + 1] for other in prefixes]
    distinct = all(heads) and len(set(heads)) == len(heads)
    return f"{prefix[same] if distinct else '.'.join(prefix)}: "
