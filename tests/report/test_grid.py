from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartinit.report.grid import MOST_ROWS, arrange


def names(sites):
    return [name for site in sites for name in site]


def test_rows_are_kinds_in_model_order_and_columns_are_layers():
    grid = arrange(f"model.layers.{i}.self_attn.{kind}" for i in (10, 2, 0) for kind in ("q_proj", "k_proj"))
    assert grid.rows == ("q_proj", "k_proj")
    assert grid.columns == (0, 2, 10)
    assert grid.cells[1, 2] == ("model.layers.10.self_attn.k_proj",)
    assert grid.row_of["model.layers.2.self_attn.q_proj"] == 0


def test_equal_last_names_are_told_apart_by_their_parents(shapes):
    grid = arrange(names(shapes["BERT"]))
    assert grid.rows == (
        "query",
        "key",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "pooler.dense",
    )


def test_targets_without_a_layer_number_stand_in_the_last_column():
    grid = arrange(["lm_head", "h.0.fc", "h.1.fc", "pooler"])
    assert grid.columns == (0, 1, None)
    assert grid.rows == ("lm_head", "fc", "pooler")
    assert grid.cells[0, 2] == ("lm_head",)
    assert arrange(["lm_head"]).columns == (None,)


@pytest.mark.parametrize(
    ("modules", "rows"),
    [
        # two stacks of layers
        (["encoder.layers.0.fc1", "decoder.layers.0.fc1"], ("encoder: fc1", "decoder: fc1")),
        (["m.text.layers.0.fc1", "m.vision.layers.0.fc1", "m.vision.layers.0.k"], ("text: fc1", "vision: fc1", "k")),
        (["m.0.fc", "m.m.0.fc"], ("m: fc", "m.m: fc")),
        (["a.x.0.fc", "a.y.0.fc", "b.x.0.fc"], ("a.x: fc", "a.y: fc", "b.x: fc")),
        (["m.0.fc", "m.sub.0.fc"], ("m: fc", "m.sub: fc")),
        # numbers after the layer's that tell nothing apart are left out, others stay
        (["enc.0.layer.0.att.q", "enc.0.layer.1.ff.wi"], ("q", "wi")),
        (
            ["enc.0.layer.0.q", "dec.0.layer.0.q", "dec.0.layer.1.cross.q"],
            ("enc: layer.*.q", "dec: layer.*.q", "cross.q"),
        ),
        (["h.0.mlp.0", "h.0.mlp.2"], ("mlp.0", "mlp.2")),
        # the number is the last part, or all of the name
        (["net.0", "net.2", "head"], ("net.*", "head")),
        (["0", "2"], ("*",)),
    ],
)
def test_labels(modules, rows):
    assert arrange(modules).rows == rows


def test_experts_share_a_row_where_there_are_too_many(shapes):
    grid = arrange(names(shapes["experts"]))
    assert grid.rows == (
        *(f"experts.*.{kind}_proj" for kind in ("gate", "up", "down")),
        *(f"shared_expert.{kind}_proj" for kind in ("gate", "up", "down")),
    )
    assert len(grid.cells[0, 3]) == 16
    few = arrange(f"layers.0.experts.{e}.w" for e in range(MOST_ROWS))
    assert len(few.rows) == MOST_ROWS


def test_every_target_has_one_cell_and_every_row_its_own_label(shapes):
    for sites in shapes.values():
        grid = arrange(names(sites))
        assert sorted(name for cell in grid.cells.values() for name in cell) == sorted(names(sites))
        assert len(set(grid.rows)) == len(grid.rows)


@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", "0", "1"]), min_size=1, max_size=6), min_size=1, max_size=12))
def test_no_two_rows_have_the_same_label_whatever_the_names(paths):
    modules = list(dict.fromkeys(".".join(path) for path in paths))
    grid = arrange(modules)
    assert len(set(grid.rows)) == len(grid.rows)
    assert sorted(grid.row_of) == sorted(modules)
    assert all(grid.rows)
