from __future__ import annotations

from dataclasses import replace
from statistics import median

import pytest

pytest.importorskip("matplotlib")

import matplotlib.style

import smartinit as si
from smartinit.planning.gain import Gain
from smartinit.report.figure import STYLE
from smartinit.report.gain_panel import _ticks
from smartinit.report.layout import draw


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.style.context(["default", STYLE]):
        yield


def by_gid(figure, prefix):
    return {a.get_gid(): a for a in figure.findobj() if (a.get_gid() or "").startswith(prefix)}


def with_gains(artefact, gains):
    layers = {name: replace(layer, gain=gains.get(name)) for name, layer in artefact.layers.items()}
    return si.Artefact(**{**vars(artefact), "layers": layers})


def gain(relative, *, measured=True):
    return Gain(relative, 1.0, 0.0, relative**2, relative**2, measured=measured)


def test_a_dot_per_layer_and_the_median_of_each_kind(make):
    names = [f"h.{i}.{kind}" for i in range(5) for kind in ("q", "v")]
    gains = {name: gain(1.0 + i) for i, name in enumerate(names)}
    figure = draw(with_gains(make([(name,) for name in names]), gains))
    for row, kind in enumerate(("q", "v")):
        values = [gains[name].relative for name in names if name.endswith(kind)]
        assert list(by_gid(figure, "gain:")[f"gain:{row}"].get_xdata()) == pytest.approx(values)
        assert by_gid(figure, "median:")[f"median:{row}"].get_xdata()[0] == pytest.approx(median(values))
        assert f"{median(values):.2g}×" in [text.get_text() for text in figure.axes[2].texts]
    assert figure.axes[2].get_xlabel() == "times as far; with LoRA's learning rate × 0.18 the median is 1"
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == ["q", "v"]


def test_an_assumption_is_called_one(make):
    figure = draw(with_gains(make([("h.0.q",)]), {"h.0.q": gain(3.0, measured=False)}))
    assert "inputs without a preferred direction are assumed" in figure.axes[2].get_xlabel()


@pytest.mark.parametrize("gains", [{}, {"h.0.q": gain(0.0)}])
def test_without_gains_there_is_no_panel(make, gains):
    figure = draw(with_gains(make([("h.0.q",)]), gains))
    assert len(figure.axes) == 2
    assert not by_gid(figure, "own")


@pytest.mark.parametrize("values", [(1.0, 1.0), (0.97, 1.04), (2.7, 5.7), (0.2, 3e3), (1e-6, 1e9)])
def test_there_are_some_ticks_and_not_too_many(make, values):
    names = ["h.0.q", "h.1.q"]
    figure = draw(with_gains(make([(name,) for name in names]), dict(zip(names, map(gain, values), strict=True))))
    low, high = figure.axes[2].get_xlim()
    assert low < min(1.0, *values)
    assert high > max(1.0, *values)
    assert 2 <= len(_ticks(low, high)) <= 9
    shown = [label.get_text() for label in figure.axes[2].get_xticklabels()]
    assert len(shown) == len(set(shown))
