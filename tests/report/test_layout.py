"""What is in the figure, and whether it can be read: nothing overlaps, nothing is too small."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib.style
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from smartinit.report.cells import SMALLEST
from smartinit.report.figure import STYLE
from smartinit.report.layout import draw


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.style.context(["default", STYLE]):
        yield


def by_gid(figure, prefix):
    """Artists by their ids."""
    return {a.get_gid(): a for a in figure.findobj() if (a.get_gid() or "").startswith(prefix)}


def visible_texts(figure):
    """Texts with their boxes in inches, as they come out."""
    figure.canvas.draw()
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text()]
    # an axis keeps the labels of ticks outside its limits, which it does not draw
    hidden = set()
    for axes in figure.findobj(matplotlib.axes.Axes):
        for axis in (axes.xaxis, axes.yaxis):
            drawn = axis._update_ticks()
            ticks = [tick for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if tick not in drawn]
            hidden |= {id(label) for tick in ticks for label in (tick.label1, tick.label2)}
    return [(t, t.get_window_extent().padded(-1)) for t in texts if id(t) not in hidden]


def test_no_two_texts_overlap_and_none_is_too_small(artefact):
    texts = visible_texts(
        draw(artefact, "A title that is long enough to need two lines in a narrow figure of one cell")
    )
    assert len(texts) > 10
    assert min(text.get_size() for text, _ in texts) >= SMALLEST
    boxes = np.array([box.extents for _, box in texts])
    order = np.argsort(boxes[:, 0])
    for at, i in enumerate(order):
        for j in order[at + 1 :]:
            if boxes[j, 0] >= boxes[i, 2]:
                break
            apart = boxes[j, 1] >= boxes[i, 3] or boxes[i, 1] >= boxes[j, 3]
            assert apart, f"{texts[i][0].get_text()!r} and {texts[j][0].get_text()!r} overlap"


def test_numbers_stay_in_their_cells(artefact):
    figure = draw(artefact)
    figure.canvas.draw()
    cells = [patch.get_window_extent() for patch in by_gid(figure, "rank:").values()]
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert any(
            c.x0 <= box.x0 and box.x1 <= c.x1 and c.y0 <= box.y0 + 2 and box.y1 - 2 <= c.y1
            for c in cells
            if c.x0 <= (box.x0 + box.x1) / 2 <= c.x1
        )


def test_a_cell_per_target_with_its_rank(artefact):
    figure = draw(artefact)
    cells = by_gid(figure, "rank:")
    if len(cells) == len(artefact.plan.ranks):
        assert sorted(int(text.get_text()) for text in figure.axes[0].texts) == sorted(artefact.plan.ranks.values())
    columns = len(figure.axes[0].get_yticks()) and max(int(gid.split(":")[2]) for gid in cells) + 1
    assert len(cells) + len(by_gid(figure, "missing:")) == columns * len(figure.axes[0].get_yticks())


def test_experts_show_their_mean(make, shapes):
    sites = shapes["experts"]
    ranks = {name: 3 for site in sites for name in site}
    ranks["model.layers.0.mlp.experts.0.gate_proj"] = 19
    figure = draw(make(sites, ranks=ranks))
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("4.0") == 1
    assert texts.count("3.0") == 11
    assert texts.count("3") == 12
    assert "several modules in a cell: their mean" in legend(figure)


def legend(figure, axes=0):
    found = figure.axes[axes].get_legend()
    return [text.get_text() for text in found.get_texts()] if found else []


def test_rank_0_and_no_target_look_different(make):
    ranks = {"h.0.q": 0, "h.0.k": 1, "h.1.q": 2}
    figure = draw(make([(name,) for name in ranks], ranks=ranks))
    assert legend(figure) == ["rank 0: no adapter", "not a target"]
    figure.canvas.draw()
    gap = figure.axes[0].get_legend().get_window_extent().y0 - figure.axes[1]._left_title.get_window_extent().y1
    assert gap > 0.1 * figure.dpi
    cells = by_gid(figure, "rank:")
    assert to_rgb(cells["rank:0:0"].get_facecolor()) == (1, 1, 1)
    faces = {to_rgb(cells[gid].get_facecolor()) for gid in ("rank:0:0", "rank:1:0", "rank:0:1")}
    assert len(faces) == 3
    (missing,) = by_gid(figure, "missing:").values()
    assert missing.get_hatch()
    assert to_rgb(missing.get_facecolor()) not in faces


def test_ranks_above_0_are_darker_the_higher_even_in_grey(make):
    ranks = {f"h.{i}.q": i + 1 for i in range(8)}
    cells = by_gid(draw(make([(name,) for name in ranks], ranks=ranks)), "rank:")
    grey = [np.dot(to_rgb(cells[f"rank:0:{i}"].get_facecolor()), (0.299, 0.587, 0.114)) for i in range(8)]
    assert grey == sorted(grey, reverse=True)
    assert min(a - b for a, b in pairwise(grey)) > 0.02


def test_no_colour_bar_for_a_single_rank(make):
    ranks = {"h.0.q": 4, "h.1.q": 4}
    figure = draw(make([(name,) for name in ranks], ranks=ranks))
    assert [axes.get_ylabel() for axes in figure.findobj(matplotlib.axes.Axes)] == ["", "captured variance [%]", ""]
    assert not legend(figure)


def test_curves_markers_and_the_rank_asked_for(make):
    sites = [("h.0.q", "h.0.k"), ("h.1.q", "h.1.k"), ("h.0.o",)]
    ranks = {"h.0.q": 5, "h.0.k": 2, "h.1.q": 3, "h.1.k": 3, "h.0.o": 0}
    artefact = make(sites, r=4, ranks=ranks)
    figure = draw(artefact)
    lines = by_gid(figure, "curve:")
    assert set(lines) == {"curve:h.0.q", "curve:h.1.q", "curve:h.0.o"}
    x, y = lines["curve:h.0.q"].get_data()
    assert list(x) == list(range(9))
    np.testing.assert_allclose(y, [0, *100 * np.cumsum(artefact.layers["h.0.q"].ratios)])
    assert legend(figure, 1) == ["q, k", "o"]
    assert lines["curve:h.0.q"].get_color() == lines["curve:h.1.q"].get_color() != lines["curve:h.0.o"].get_color()
    given = by_gid(figure, "given:")
    assert list(given["given:0"].get_xdata()) == [2, 5, 3]
    assert list(given["given:0"].get_ydata()[:2]) == [y[2], y[5]]
    assert list(given["given:1"].get_xdata()) == [0]
    assert {line.get_linestyle() for line in given.values()} == {"None"}
    assert list(by_gid(figure, "asked")["asked"].get_xdata()) == [4, 4]
    assert figure.axes[1].get_ylim() == (0, 100)
    assert "rank asked for: 4" in [text.get_text() for text in figure.axes[1].texts]


def test_kinds_differ_by_more_than_colour(make):
    figure = draw(make([(f"h.0.part{i}",) for i in range(40)]))
    found = figure.axes[1].get_legend()
    assert found.get_window_extent().y0 >= figure.axes[1].bbox.y0, "the page is high enough for it"
    handles = found.legend_handles
    looks = [(h.get_color(), h.get_marker(), h.get_linestyle()) for h in handles]
    assert len(set(looks)) == len(looks) == 29
    assert legend(figure, 1)[-1] == "12 others"
    for a, b in combinations(looks[:28], 2):
        assert a[1] != b[1] or a[2] != b[2] or a[0] != b[0]
    assert all(a[:1] + a[2:] != b[:1] + b[2:] for a, b in combinations(looks[:28], 2)), "without their markers too"


def test_without_shares_of_variance_there_are_no_curves(make):
    artefact = make([("h.0.q",)])
    figure = draw(replace(artefact, layers={"h.0.q": replace(artefact.layers["h.0.q"], ratios=())}))
    assert not by_gid(figure, "curve:")
    assert "no shares of variance are known" in [text.get_text() for text in figure.axes[1].texts]


def test_as_many_layers_are_labelled_as_there_is_room_for(make, shapes):
    def labels(shape):
        return [label.get_text() for label in draw(make(shapes[shape])).axes[0].get_xticklabels()]

    assert labels("sparse") == ["0", "1", "15", "30", "31"]
    assert labels("wide") == [*(str(i) for i in range(0, 121, 5)), "other"]
    assert labels("large") == [*(str(i) for i in range(0, 80, 2)), "other"]
    assert labels("BERT") == [*(str(i) for i in range(12)), "other"]
    many = draw(make([(f"h.{2 * i}.q",) for i in range(80)])).axes[0].get_xticklabels()
    assert [label.get_text() for label in many] == [str(2 * i) for i in range(0, 80, 2)]


def test_a_page_grows_with_the_model(make, shapes):
    sizes = {shape: draw(make(shapes[shape])).get_size_inches() for shape in ("tiny", "BERT", "large")}
    assert sizes["tiny"][0] < sizes["BERT"][0] < sizes["large"][0] < 16
    assert max(size[1] for size in sizes.values()) < 10
