"""The whole second moment of rows: exact about the mean and about zero, whatever the batches; in panels."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smartinit.statistics import panels
from smartinit.statistics.derived import Derived
from smartinit.statistics.gram import GramStatistic
from smartinit.statistics.panels import Panels

_SPEC = importlib.util.spec_from_file_location("pca_oracle", Path(__file__).parent.parent / "oracles" / "pca.py")
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

KINDS = [dict(centred=c, moments_only=m) for c in (True, False) for m in (True, False)]


def fed(rows, sizes=(300,), **options):
    statistic = GramStatistic(rows.shape[1], **options)
    sizes = list(sizes) if sum(sizes) == rows.shape[0] else sizes[0]
    for part in rows.split(sizes):
        statistic.update(part)
        if statistic.full:
            statistic.settle()
    return statistic


def close(found, expected, tolerance):
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    return np.abs(found.numpy() - expected).max() <= tolerance * scale.max() and np.array_equal(found, found.T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_both_moments_whatever_the_flag(kind, offset, seed):
    rows = oracle.decaying_rows(5000, 96, offset=offset, seed=seed)
    statistic = fed(rows, **kind)
    for centred in (False, True):
        expected = oracle.scatter(rows, centred=centred)
        # The mean costs no precision: the error is of the size of the rows about it.
        spread = oracle.scatter(rows).diagonal().max() / expected.diagonal().max()
        found = statistic.second_moment(centred=centred)
        assert found.dtype == torch.float64
        assert close(found, expected, 2e-6 * spread if not centred else 2e-6)
    assert statistic.total == pytest.approx(np.trace(oracle.scatter(rows, centred=kind["centred"])), rel=1e-6)


@pytest.mark.parametrize("sizes", [[1000], [1] * 1000, [17, 583, 400]])
def test_any_batches_give_the_same(sizes, seed):
    rows = oracle.decaying_rows(1000, 40, offset=3.0, seed=seed)
    statistic = fed(rows, sizes, centred=False, moments_only=True)
    assert close(statistic.second_moment(), oracle.scatter(rows, centred=False), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_exact(kind, seed):
    rows = oracle.decaying_rows(3000, 64, offset=5.0, seed=seed)
    parts = [fed(part, **kind) for part in rows.split([100, 2400, 500])]
    merged = GramStatistic(64, **kind)
    for part in parts:
        merged.merge(part)
    assert merged.rows == 3000
    for centred in (False, True):
        assert close(merged.second_moment(centred=centred), oracle.scatter(rows, centred=centred), 1e-6)
    assert parts[0].rows == 100
    with pytest.raises(ValueError, match="halves"):
        merged.merge(GramStatistic(64, centred=kind["centred"], moments_only=not kind["moments_only"]))


@pytest.mark.parametrize("kind", KINDS)
def test_state_survives_a_file(kind, tmp_path, seed):
    rows = oracle.decaying_rows(600, 48, offset=1.0, seed=seed)
    statistic = fed(rows[:400], **kind)
    save_file(statistic.state(), tmp_path / "s.safetensors")
    again = GramStatistic.from_state(load_file(tmp_path / "s.safetensors"))
    for one in (statistic, again):
        one.update(rows[400:])
    assert again.moments_only == kind["moments_only"]
    assert torch.equal(again.second_moment(), statistic.second_moment())


def test_moments_only_halves_the_state_and_never_decomposes(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)
    both, one = (fed(torch.randn(9000, 600), (3000,), moments_only=m, block_rows=10**9) for m in (False, True))
    sizes = [sum(t.nbytes for t in s.state().values()) for s in (both, one)]
    assert sizes[1] < 0.51 * sizes[0]
    assert sizes[1] < 0.75 * 8 * 600**2, "panels of the upper triangle: well below a whole float64 matrix"
    one.settle()
    assert not one.settled(0.0, 4)
    assert one.explained(4).tolist() == [0.0] * 4


def test_moments_only_still_has_directions(seed):
    rows = oracle.decaying_rows(3000, 64, decay=1.0, seed=seed)
    statistic = fed(rows, moments_only=True)
    directions, _ = statistic.principal(8)
    assert oracle.captured(oracle.scatter(rows), directions) > 0.999
    certificate = statistic.certificate(8)
    assert (certificate.captured_held_out, certificate.split_half_angle) == (None, None)
    assert certificate.captured > 0.5


@pytest.mark.parametrize("width", [1, 7, 64, 100])
def test_panels_hold_a_symmetric_matrix(width, monkeypatch, seed):
    monkeypatch.setattr(panels, "_PANEL", width)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(30, 50, generator=generator, dtype=torch.float64)
    u, v = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    layout = Panels(50)
    flat = torch.zeros(layout.size, dtype=torch.float64)
    layout.add_rows(flat, rows[:20])
    layout.add_rows(flat, rows[20:])
    assert torch.allclose(layout.dense(flat), rows.mT @ rows, atol=1e-12)
    assert layout.trace(flat) == pytest.approx(float(rows.square().sum()))
    plus = rows.mT @ rows + torch.outer(u, v) + torch.outer(v, u)
    assert torch.allclose(layout.dense(flat, (u, v)), plus, atol=1e-12)
    layout.add_outer(flat, u, v)
    dense = layout.dense(flat)
    assert torch.allclose(dense, plus, atol=1e-12)
    assert torch.equal(dense, dense.mT)


@pytest.mark.parametrize("already", [0, 10])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_rows_whose_squares_are_not_finite_leave_no_trace(bad, already, seed):
    """A large batch in which only the last chunk is bad, and float32 rows whose squares overflow."""
    statistic = GramStatistic(8, centred=False, moments_only=True)
    if already:
        statistic.update(oracle.decaying_rows(already, 8, seed=seed))
    before = statistic.second_moment()
    rows = oracle.decaying_rows(5000, 8, seed=seed)
    rows[4999, 2] = bad
    with pytest.raises(FloatingPointError):
        statistic.update(rows)
    assert statistic.rows == already
    assert torch.equal(statistic.second_moment(), before)
    statistic.update(rows[:100])
    assert torch.isfinite(statistic.second_moment()).all()


def test_large_features_cost_small_ones_no_digit(seed):
    rows = oracle.decaying_rows(5000, 32, seed=seed)
    rows[:, 3] *= 1e5
    found = fed(rows, centred=False, moments_only=True).second_moment().numpy()
    expected = oracle.scatter(rows, centred=False)
    scale = np.sqrt(np.outer(expected.diagonal(), expected.diagonal()))
    assert (np.abs(found - expected) / scale).max() < 1e-6


def test_derived_values_are_kept_for_one_living_unchanged_statistic():
    calls = []
    derived = Derived(lambda s: calls.append(s.rows) or torch.full((2,), float(s.rows)))
    one, other = GramStatistic(4), GramStatistic(4)
    one.update(torch.randn(10, 4))
    assert derived(one) is derived(one)
    assert calls == [10]
    one.update(torch.randn(5, 4))
    assert derived(one)[0] == 15
    derived(other)
    derived(one)
    assert calls == [10, 15, 0, 15]
    del one
    assert derived._kept is None, "nothing outlives its statistic"
    derived(other)
    derived.clear()
    assert derived._kept is None
