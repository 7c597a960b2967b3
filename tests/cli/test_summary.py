from __future__ import annotations

import statistics

import pytest

from smartinit.artefact import Artefact
from smartinit.cli.layer_table import gain_line, layer_table, layer_type, times
from smartinit.cli.summary import render, summarise


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
    gains = [layer.gain.relative for layer in artefact.layers.values()]
    assert summary["gain"]["median"] == pytest.approx(statistics.median(gains))
    rows = {row["type"]: row for row in summary["layers"]}
    queries = [layer.gain.relative for name, layer in artefact.layers.items() if name.endswith("q_proj")]
    assert rows["self_attn.q_proj"]["gain"] == pytest.approx(statistics.median(queries))
    assert f"gain: Adam's first step goes {times(statistics.median(gains))}" in render(summary)


def test_what_is_not_known_has_no_column():
    row = {"type": "a", "count": 2, "rank_min": 1, "rank_median": 1.5, "rank_max": 2, "captured": None, "gain": 3.0}
    other = {**row, "type": "b", "gain": None, "settled": 1}
    lines = [line.split() for line in layer_table([row, other]).splitlines()]
    assert lines[0] == ["layers", "count", "rank", "min", "median", "max", "settled", "gain"]
    assert lines[2][-2:] == ["–", "3×"]
    assert lines[3][-2:] == ["1/2", "–"]


@pytest.mark.parametrize(
    ("gain", "words"),
    [
        ({}, "goes 12× as far as from LoRA's own start (median; 0.5× to 340×)"),
        ({}, "; multiply a learning rate made for it by 0.081"),
        ({"layers": 1}, "(one layer)"),
        ({"measured": False}, "(assuming inputs without a preferred direction)"),
    ],
)
def test_the_line_of_the_gain(gain, words):
    known = {"layers": 3, "median": 12.34, "lowest": 0.5, "highest": 340.4, "matching_lr": 0.081, "measured": True}
    assert words in gain_line({**known, **gain})


def test_a_dead_start_has_no_matching_learning_rate():
    assert "multiply" not in gain_line(
        {"layers": 1, "median": 0.0, "lowest": 0.0, "highest": 0.0, "matching_lr": None, "measured": True}
    )
