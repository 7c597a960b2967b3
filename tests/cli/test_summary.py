from __future__ import annotations

import pytest

from smartinit.artefact import Artefact
from smartinit.cli.summary import layer_type, render, summarise


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.12.self_attn.q_proj", "self_attn.q_proj"),
        ("encoder.layer.0.attention.output.dense", "attention.output.dense"),
        ("model.layers.3.mlp.experts.7.w1", "mlp.experts.*.w1"),
        ("pooler.dense", "pooler.dense"),
        ("lm_head", "lm_head"),
        ("net.0", "net.*"),
    ],
)
def test_layer_types(name, kind):
    assert layer_type(name) == kind


def test_figures_add_up(adapter):
    artefact = Artefact.load(adapter)
    summary = summarise(artefact)
    assert summary["ranks"] == sum(artefact.plan.ranks.values())
    assert sum(row["count"] for row in summary["layers"]) == summary["targets"] == len(artefact.factors)
    assert summary["parameters"] == sum(pair.a.numel() + pair.b.numel() for pair in artefact.factors.values())
    assert "ranks: 56 of 56 used" in render(summary)
