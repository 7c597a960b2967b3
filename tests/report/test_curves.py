from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smartinit.report.curves import variance_curves
from smartinit.report.grid import arrange


def curves_of(artefact):
    return variance_curves(artefact, arrange(artefact.plan.ranks))


def test_one_curve_per_site_of_the_embedded_model(demo_artefact):
    curves = curves_of(demo_artefact)
    assert len(curves) == len(demo_artefact.sites) == 24
    assert [curve.names for curve in curves[:2]] == [
        tuple(f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"),
        ("model.layers.0.self_attn.o_proj",),
    ]
    for curve in curves:
        ratios = demo_artefact.layers[curve.names[0]].ratios
        np.testing.assert_allclose(curve.percent, 100 * np.concatenate([[0], np.cumsum(ratios)]), atol=1e-9)
        assert curve.percent[-1] <= 100
        assert set(curve.ranks) == {demo_artefact.plan.ranks[name] for name in curve.names}


def test_the_longest_of_a_site_and_targets_without_one(make):
    names = ("h.0.q", "h.0.k", "h.0.o")
    artefact = make([names], ranks=dict(zip(names, (3, 1, 3), strict=True)))
    short = replace(artefact.layers["h.0.q"], ratios=artefact.layers["h.0.q"].ratios[:5])
    artefact = replace(artefact, layers={**artefact.layers, "h.0.q": short}, sites=(("h.0.q", "h.0.k"),))
    first, second = curves_of(artefact)
    assert first.names == ("h.0.q", "h.0.k")
    assert (first.rows, first.ranks) == ((0, 1), (1, 3))
    assert len(first.percent) == 33
    assert second.names == ("h.0.o",)


def test_round_off_does_not_pass_100_percent(make):
    artefact = make([("h.0.q",)])
    whole = replace(artefact.layers["h.0.q"], ratios=(0.1,) * 10 + (1e-15,))
    (curve,) = curves_of(replace(artefact, layers={"h.0.q": whole}))
    assert max(curve.percent) == pytest.approx(100, abs=1e-9)
    assert max(curve.percent) <= 100


def test_no_curve_where_no_shares_are_known(make):
    artefact = make([("h.0.q",), ("h.0.k",)])
    unknown = replace(artefact.layers["h.0.q"], ratios=())
    artefact = replace(artefact, layers={**artefact.layers, "h.0.q": unknown}, sites=())
    assert [curve.names for curve in curves_of(artefact)] == [("h.0.k",)]
