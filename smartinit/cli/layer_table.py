"""The table of layers that `compute` and `inspect` print: a row per kind of layer."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from smartinit.cli.output import human_count, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from smartinit.planning.gain import Gain, GainSummary


class KnownLayer(Protocol):
    """What is asked of a layer: a `LayerSummary`, or what a record says of one."""

    @property
    def certificate(self) -> Any:  # noqa: ANN401 - a Certificate, or its fields
        """How far it can be trusted."""

    @property
    def gain(self) -> Gain | None:
        """Of its first step."""


class _Column(NamedTuple):
    """One column: its head, and a row's cell."""

    head: str
    key: str
    text: Callable[[Any], str] = str


def percent(share: float) -> str:
    """0.1234 → ``12.3 %``."""
    return f"{100 * share:.1f} %"


def times(factor: float) -> str:
    """12.345 → ``12×``, 1.2345 → ``1.2×``."""
    return f"{factor:.2g}×" if factor < 100 else f"{factor:.0f}×"  # noqa: PLR2004 - two digits


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g}–{values[-1]:g}"


# In the order in which they stand; a column is shown if the rows have it.
_COLUMNS = (
    _Column("layers", "type"),
    _Column("count", "count"),
    _Column("rank min", "rank_min"),
    _Column("median", "rank_median", "{:g}".format),
    _Column("max", "rank_max"),
    _Column("scaling", "scaling", _range),
    _Column("parameters", "parameters", human_count),
    _Column("dtype", "dtype", "/".join),
    _Column("variance", "captured", percent),
    _Column("held out", "captured_held_out", percent),
    _Column("settled", "settled"),
    _Column("gain", "gain", times),
)


def layer_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of `describe_ranks`, and more keys of the columns above, as text; what no row knows has no column."""
    columns = [column for column in _COLUMNS if any(row.get(column.key) is not None for row in rows)]
    return table([column.head for column in columns], [[_cell(column, row) for column in columns] for row in rows])


def _cell(column: _Column, row: Mapping[str, Any]) -> str:
    value = row.get(column.key)
    if value is None:
        return "–"
    return f"{value}/{row['count']}" if column.key == "settled" else column.text(value)


def layer_type(name: str) -> str:
    """``model.layers.3.self_attn.q_proj`` → ``self_attn.q_proj``: from the first number on, later ones as ``*``."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    rest = parts[first + 1 :] or parts
    return ".".join("*" if part.isdigit() else part for part in rest)


def by_type(names: Iterable[str]) -> dict[str, list[str]]:
    """Kind of layer -> its layers, both in the order in which they come."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(layer_type(name), []).append(name)
    return groups


def describe_ranks(kind: str, ranks: Sequence[int]) -> dict[str, Any]:
    """How many layers of a kind there are, and which ranks they have."""
    return {
        "type": kind,
        "count": len(ranks),
        "rank_min": min(ranks),
        "rank_median": statistics.median(ranks),
        "rank_max": max(ranks),
    }


def describe_known(layers: Sequence[KnownLayer]) -> dict[str, Any]:
    """Means and medians of what an artefact knows of layers; None where it knows nothing."""
    gains = gain_of_layers(layers)
    return {
        "captured": mean(layer.certificate.captured for layer in layers),
        "gain": None if gains is None or not math.isfinite(gains.median) else gains.median,
    }


def gain_of_layers(layers: Iterable[KnownLayer]) -> GainSummary | None:
    """Gains of the layers that have one."""
    from smartinit.planning.gain import summarise_gains

    return summarise_gains(layer.gain for layer in layers if layer.gain is not None)


def gain_line(gain: Mapping[str, Any]) -> str:
    """A sentence about `GainSummary.as_dict`."""
    spread = f"median; {times(gain['lowest'])} to {times(gain['highest'])}" if gain["layers"] > 1 else "one layer"
    learning_rate = (
        "" if gain["matching_lr"] is None else f"; multiply a learning rate made for it by {gain['matching_lr']:.2g}"
    )
    assumed = "" if gain["measured"] else " (assuming inputs without a preferred direction)"
    step = f"Adam's first step goes {times(gain['median'])} as far as from LoRA's own start"
    return f"gain: {step} ({spread}){learning_rate}{assumed}"


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
