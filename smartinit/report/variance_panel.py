"""The curves: how much of each input's variance the leading directions capture."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

    from smartinit.report.curves import Curve
    from smartinit.report.grid import Grid

# Okabe and Ito's colours, but for the yellow, too pale for a line. Kinds also differ by marker, past seven by dashes.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES = ("-", "--", ":", "-.")
MOST_KINDS = len(PALETTE) * len(DASHES)
REST: dict[str, Any] = {"color": "#999999", "marker": ".", "linestyle": "-"}
FEW, MANY = 12, 200  # curves: from solid to see-through
LABEL_LENGTH = 30  # characters of a line in the legend
LINE_HEIGHT = 0.155  # of the legend, in inches


@dataclass(frozen=True)
class VariancePanel:
    """What the curves show.

    Attributes:
        curves: see `variance_curves`.
        grid: the names of the kinds.
        asked: the rank asked for.
        shared: whether a curve is that of an input, which several modules may read.
    """

    curves: Sequence[Curve]
    grid: Grid
    asked: int
    shared: bool

    @property
    def legend_height(self) -> float:
        """What the legend needs, in inches."""
        return LINE_HEIGHT * (1 + sum(1 + label.count("\n") for label in self._labels))

    def draw(self, axes: Axes, width: float) -> None:
        """Draw curves, the ranks that were given, and the rank that was asked for, into axes of a width in inches."""
        for curve in self.curves:
            self._draw_curve(axes, curve)
        for i in range(len(self._labels)):
            self._draw_ranks(axes, i)
        axes.axvline(self.asked, color="#333333", linestyle=(0, (4, 3)), linewidth=0.9, zorder=1.5, gid="asked")
        axes.annotate(
            f"rank asked for: {self.asked}",
            (self.asked, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 2),
            textcoords="offset points",
            size=7,
            ha="center",
            va="bottom",
            color="#333333",
        )
        longest = max([self.asked, *(len(curve.percent) - 1 for curve in self.curves)])
        axes.set(xlim=(0, longest * 1.02), ylim=(0, 100))
        axes.set(xlabel="number of directions (markers: rank given)", ylabel="captured variance [%]")
        axes.set_title("(b) Variance captured by the leading directions", pad=15)
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.grid(visible=True, color="#e4e4e4", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if self.curves:
            self._draw_legend(axes, width)
        else:
            axes.text(0.5, 0.5, "no shares of variance are known", transform=axes.transAxes, ha="center")

    @cached_property
    def _kinds(self) -> dict[tuple[int, ...], int]:
        """The rows whose modules read one input -> number of the style; in model order."""
        kinds = sorted({curve.rows for curve in self.curves})
        return {rows: min(i, MOST_KINDS) for i, rows in enumerate(kinds)}

    @cached_property
    def _labels(self) -> list[str]:
        """By number of the style."""
        labels = [", ".join(self.grid.rows[row] for row in rows) for rows in self._kinds]
        if len(labels) > MOST_KINDS:
            labels[MOST_KINDS:] = [f"{len(labels) - MOST_KINDS} others"]
        return [textwrap.fill(label, LABEL_LENGTH, break_long_words=False) for label in labels]

    @cached_property
    def _crowd(self) -> float:
        """From 0 (few curves) to 1 (many)."""
        return min(1.0, max(0.0, (len(self.curves) - FEW) / (MANY - FEW)))

    def _draw_curve(self, axes: Axes, curve: Curve) -> None:
        style = _style(self._kinds[curve.rows])
        axes.plot(
            range(len(curve.percent)),
            curve.percent,
            color=style["color"],
            linestyle=style["linestyle"],
            linewidth=0.9 - 0.45 * self._crowd,
            alpha=0.9 - 0.45 * self._crowd,
            gid=f"curve:{curve.names[0]}",
        )

    def _draw_ranks(self, axes: Axes, kind: int) -> None:
        given = [
            (rank, curve.percent[rank])
            for curve in self.curves
            if self._kinds[curve.rows] == kind
            for rank in curve.ranks
            if rank < len(curve.percent)
        ]
        axes.plot(
            [rank for rank, _ in given],
            [percent for _, percent in given],
            **_style(kind) | {"linestyle": "none"},
            markersize=5.0 - 1.5 * self._crowd,
            markeredgewidth=0.0,
            zorder=3,
            clip_on=False,
            gid=f"given:{kind}",
        )

    def _draw_legend(self, axes: Axes, width: float) -> None:
        axes.legend(
            handles=[
                Line2D([], [], **_style(kind), linewidth=1.2, markersize=4.8, markeredgewidth=0.0, label=label)
                for kind, label in enumerate(self._labels)
            ],
            title="input of" if self.shared else "module",
            loc="upper left",
            bbox_to_anchor=(1 + 0.12 / width, 1),
            borderaxespad=0,
            borderpad=0,
            frameon=False,
            handlelength=2.4,
            alignment="left",
        )


def _style(kind: int) -> dict[str, Any]:
    if kind == MOST_KINDS:
        return REST
    return {
        "color": PALETTE[kind % len(PALETTE)],
        "marker": MARKERS[kind % len(MARKERS)],
        "linestyle": DASHES[kind // len(PALETTE)],
    }
