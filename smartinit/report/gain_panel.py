"""The dots: how much further than from LoRA's own start the first step of training goes, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from smartinit.planning.gain import summarise_gains

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes

    from smartinit.planning.gain import Gain
    from smartinit.report.grid import Grid

ROW_HEIGHT = 0.19  # inches
HEADING = 0.8  # above it: its title, and the labels of the panel above
DOT, MEDIAN, OWN = "#0072B2", "#D55E00", "#333333"
MANY_TICKS = 9
NARROW, MARGIN = 3.0, 1.2


@dataclass(frozen=True)
class GainPanel:
    """What the dots show.

    Attributes:
        grid: the names of the kinds.
        gains: target name -> its gain; those without an adapter are left out.
    """

    grid: Grid
    gains: Mapping[str, Gain]

    @property
    def height(self) -> float:
        """Of the axes, in inches; 0.0 if there is nothing to show."""
        return ROW_HEIGHT * len(self.grid.rows) if self._values else 0.0

    @property
    def below_the_others(self) -> float:
        """What it adds to the height of a figure, in inches."""
        return self.height + HEADING if self._values else 0.0

    def draw(self, axes: Axes) -> None:
        """A row of dots per kind of module, its median, and the line of LoRA's own start."""
        rows = self.grid.rows
        for row, values in self._values.items():
            axes.plot(
                values,
                [row + 0.5] * len(values),
                linestyle="none",
                marker="o",
                markersize=4.0,
                markeredgewidth=0.0,
                color=DOT,
                alpha=max(0.3, min(0.75, 6 / len(values))),
                gid=f"gain:{row}",
            )
            middle = median(values)
            axes.plot([middle] * 2, [row + 0.15, row + 0.85], color=MEDIAN, linewidth=1.6, gid=f"median:{row}")
            axes.annotate(
                _times(middle),
                (1, row + 0.5),
                xycoords=("axes fraction", "data"),
                xytext=(5, 0),
                textcoords="offset points",
                size=7,
                va="center_baseline",
                color=MEDIAN,
            )
        axes.axvline(1.0, color=OWN, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1.5, gid="own")
        low, high = self._limits
        axes.set(xscale="log", xlim=(low, high), ylim=(len(rows), 0), xlabel=self._label)
        axes.set_title("(c) Adam's first step against that from LoRA's own start (dashed)", pad=5)
        axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
        axes.xaxis.set_major_locator(FixedLocator(_ticks(low, high)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _times(value)))
        axes.tick_params(axis="y", length=0, pad=3)
        axes.grid(visible=True, axis="x", color="#e4e4e4", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)

    @cached_property
    def _values(self) -> dict[int, list[float]]:
        """Row -> gains above 0, which alone have a place on a logarithmic axis; in model order."""
        found: dict[int, list[float]] = {}
        for name, gain in self.gains.items():
            if gain.reference > 0 and gain.relative > 0:
                found.setdefault(self.grid.row_of[name], []).append(gain.relative)
        return found

    @property
    def _limits(self) -> tuple[float, float]:
        everything = [1.0, *(value for values in self._values.values() for value in values)]
        low, high = min(everything), max(everything)
        if high < low * NARROW:  # so that there are ticks beside 1, and small differences look small
            low, high = min(low, 0.5), max(high, 2.0)
        return low / MARGIN, high * MARGIN

    @property
    def _label(self) -> str:
        """What the axis shows, and what to do about it."""
        together = summarise_gains(self.gains.values())
        if together is None or not math.isfinite(together.matching_lr):
            return "times as far"
        assumed = "" if together.measured else "; inputs without a preferred direction are assumed"
        return f"times as far; with LoRA's learning rate × {together.matching_lr:.2g} the median is 1{assumed}"


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 of every decade; 1 alone where those would be too many, every other decade and so on."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
    coarse = [10.0**decade for decade in decades]
    for step in (fine, coarse, *(coarse[:: 2**power] for power in range(1, 6))):
        inside = [tick for tick in step if low <= tick <= high]
        if len(inside) <= MANY_TICKS:
            break
    return inside


def _times(value: float) -> str:
    return f"{value:.2g}×" if value < 100 else f"{value:.0f}×"  # noqa: PLR2004 - two digits
