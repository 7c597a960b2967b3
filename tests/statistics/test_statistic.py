"""What every statistic must do, over both of them: the oracle is a float64 PCA of all rows."""

from __future__ import annotations

import copy
import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from smartinit.statistics.gram import GramStatistic
from smartinit.statistics.settling import settle_full
from smartinit.statistics.subspace import SubspacePCA

_SPEC = importlib.util.spec_from_file_location("pca_oracle", Path(__file__).parent.parent / "oracles" / "pca.py")
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

K = 16
KINDS = {"subspace": lambda d, **kw: SubspacePCA(d, min(K, d), **kw), "gram": GramStatistic}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def feed(statistic, rows, batch=300):
    for part in rows.split(batch):
        statistic.update(part)
        settle_full([statistic])
    statistic.settle()
    return statistic


@pytest.mark.parametrize(
    "data", [dict(decay=0.5), dict(decay=1.0, offset=20.0), dict(decay=0.7, spike=1000.0, offset=5.0)]
)
def test_directions_capture_what_the_exact_pca_does(make, data, seed):
    rows = oracle.decaying_rows(9000, 160, seed=seed, **data)
    statistic = feed(make(160), rows)
    matrix = oracle.scatter(rows)
    directions, values = statistic.principal(K)
    assert oracle.captured(matrix, directions) > 0.998
    assert torch.allclose(directions @ directions.mT, torch.eye(K), atol=2e-6)
    assert statistic.total == pytest.approx(np.trace(matrix), rel=1e-6)
    assert statistic.rows == 9000
    assert torch.allclose(statistic.mean, rows.double().mean(0), atol=1e-5)
    np.testing.assert_allclose(values[:4].numpy(), oracle.best_values(matrix, 4), rtol=0.02)
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("sizes", [[9000], [4096, 4904], [17] * 300])
def test_batch_size_does_not_matter(make, sizes, seed):
    rows = oracle.decaying_rows(sum(sizes), 120, seed=seed)
    statistic = make(120)
    for part in rows.split(sizes):
        statistic.update(part)
        settle_full([statistic])
    assert oracle.captured(oracle.scatter(rows), statistic.principal(K)[0]) > 0.998
    assert statistic.total == pytest.approx(np.trace(oracle.scatter(rows)), rel=1e-6)


def test_order_does_not_matter(make, seed):
    rows = oracle.decaying_rows(6000, 120, seed=seed)
    rows = rows[torch.argsort(rows[:, 0])]  # the worst order: the data drift
    matrix = oracle.scatter(rows)
    shuffled = rows[torch.randperm(6000, generator=torch.Generator().manual_seed(seed))]
    one, other = (oracle.captured(matrix, feed(make(120), r).principal(K)[0]) for r in (rows, shuffled))
    assert one == pytest.approx(other, abs=3e-3)
    assert min(one, other) > 0.995


def test_merge_equals_a_single_pass(make, seed):
    rows = oracle.decaying_rows(8000, 96, offset=3.0, seed=seed)
    whole = feed(make(96), rows)
    parts = [feed(make(96), part) for part in rows.split([1000, 5000, 2000])]
    before = {k: v.clone() for k, v in parts[1].state().items()}
    for part in parts[1:]:
        parts[0].merge(part)
    assert all(torch.equal(before[k], v) for k, v in parts[1].state().items()), "merge changed its argument"
    matrix = oracle.scatter(rows)
    assert parts[0].rows == whole.rows
    assert parts[0].total == pytest.approx(np.trace(matrix), rel=1e-6)
    assert torch.allclose(parts[0].mean, whole.mean, atol=1e-6)
    assert oracle.captured(matrix, parts[0].principal(K)[0]) > 0.998
    empty = make(96)
    empty.merge(whole)
    assert torch.allclose(empty.principal(K)[0], whole.principal(K)[0], atol=1e-5)
    whole_rows = whole.rows
    whole.merge(make(96))
    assert whole.rows == whole_rows


def test_merge_refuses_other_shapes(make):
    with pytest.raises(ValueError, match="64 and 32 features"):
        make(64).merge(make(32))


def test_state_survives_a_safetensors_file(make, tmp_path, seed):
    rows = oracle.decaying_rows(5000, 64, seed=seed)
    statistic = feed(make(64), rows[:3000])
    save_file(statistic.state(), tmp_path / "s.safetensors")
    again = type(statistic).from_state(load_file(tmp_path / "s.safetensors"))
    assert again.certificate(8) == statistic.certificate(8)
    for one in (statistic, again):
        feed(one, rows[3000:])
    assert torch.equal(again.principal(K)[0], statistic.principal(K)[0])
    assert again.total == statistic.total


def test_two_runs_are_bitwise_equal(make, seed):
    rows = oracle.decaying_rows(5000, 96, seed=seed)
    first, second = feed(make(96), rows), feed(make(96), rows.clone())
    assert torch.equal(first.principal(K)[0], second.principal(K)[0])
    assert torch.equal(first.principal(K)[1], second.principal(K)[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("already", [0, 10, 3000])
def test_bad_rows_are_refused_and_leave_no_trace(make, bad, already, seed):
    rows = oracle.decaying_rows(max(already, 1), 64, seed=seed)
    statistic = make(64)
    if already:
        statistic.update(rows)
    before = copy.deepcopy(statistic)
    broken = torch.randn(50, 64)
    broken[30, 3] = bad
    with pytest.raises(FloatingPointError):
        statistic.update(broken)
    assert statistic.rows == before.rows == already
    if already:
        assert torch.equal(statistic.principal(4)[0], before.principal(4)[0])


def test_fewer_rows_than_components_are_kept_until_there_are_enough(make, seed):
    rows = oracle.decaying_rows(400, 96, seed=seed)
    statistic = make(96)
    for part in rows.split(3):  # every batch is far below K rows
        statistic.update(part)
    assert statistic.rows == 400
    assert oracle.captured(oracle.scatter(rows), statistic.principal(K)[0]) > 0.999


def test_degenerate_data_gives_orthonormal_directions_and_zero_values(make):
    for rows in (torch.full((500, 48), 3.0), torch.zeros(500, 48), torch.randn(500, 2) @ torch.randn(2, 48)):
        statistic = feed(make(48), rows, batch=100)
        directions, values = statistic.principal(K)
        assert torch.isfinite(directions).all()
        assert torch.allclose(directions @ directions.mT, torch.eye(K), atol=1e-5)
        assert (values >= 0).all()
        assert statistic.total == pytest.approx(np.trace(oracle.scatter(rows)), rel=1e-5, abs=1e-6)
        assert values[2:].sum() <= 1e-6 * max(1.0, statistic.total)
        statistic.certificate(4)


@pytest.mark.parametrize("spike", [1.0, 1000.0])
def test_directions_that_appear_late_are_found(make, spike, seed):
    generator = torch.Generator().manual_seed(seed)
    early = torch.randn(4000, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    late = oracle.decaying_rows(20000, 64, seed=seed, spike=spike)
    rows = torch.cat([early, late])
    statistic, matrix = feed(make(64), rows), oracle.scatter(rows)
    directions, values = statistic.principal(K)
    assert oracle.captured(matrix, directions) > 0.99
    # A burst of 10⁵ times the energy of all before it leaves fp32 round-off in the values of the other directions.
    checked = 4 if spike == 1.0 else 1
    np.testing.assert_allclose(values[:checked].numpy(), oracle.best_values(matrix, checked), rtol=0.1)
    assert torch.allclose(directions @ directions.mT, torch.eye(K), atol=2e-6)


def test_uncentred_keeps_the_mean(seed):
    rows = oracle.decaying_rows(4000, 64, offset=4.0, seed=seed)
    for kind in (partial(SubspacePCA, 64, K), partial(GramStatistic, 64)):
        statistic = feed(kind(centred=False), rows)
        matrix = oracle.scatter(rows, centred=False)
        assert statistic.total == pytest.approx(np.trace(matrix), rel=1e-5)
        assert oracle.captured(matrix, statistic.principal(K)[0]) > 0.999


def test_half_precision_rows_lose_only_their_own_rounding(make, seed):
    rows = oracle.decaying_rows(6000, 96, offset=1.0, seed=seed)
    for dtype in (torch.bfloat16, torch.float16):
        statistic = feed(make(96), rows.to(dtype))
        assert oracle.captured(oracle.scatter(rows.to(dtype)), statistic.principal(K)[0]) > 0.999


def test_certificate_tells_the_truth(make, seed):
    rows = oracle.decaying_rows(30000, 96, decay=0.8, seed=seed)
    statistic = feed(make(96), rows[:20000])
    matrix, unseen = oracle.scatter(rows[:20000]), oracle.scatter(rows[20000:])
    directions, _ = statistic.principal(8)
    certificate = statistic.certificate(8)
    q = directions.double().numpy().T
    product = matrix @ q
    residual = np.linalg.norm(product - q @ (q.T @ product)) / np.linalg.norm(product)
    assert certificate.captured == pytest.approx(np.trace(q.T @ product) / np.trace(matrix), rel=0.01)
    assert certificate.captured_held_out == pytest.approx(np.trace(q.T @ unseen @ q) / np.trace(unseen), rel=0.03)
    assert residual <= certificate.residual + 1e-5
    assert certificate.split_half_angle < 20
    small = feed(make(96), rows[:4500]).certificate(8)
    assert small.split_half_angle > certificate.split_half_angle, "less data must not look more certain"


def test_settling_is_a_step_size(make, seed):
    rows = oracle.decaying_rows(40000, 64, decay=1.0, seed=seed)
    statistic = make(64)
    statistic.update(rows[:2048])
    assert not statistic.settled(0.0, 4), "one estimate has nothing to be compared with"
    feed(statistic, rows[2048:], batch=2048)
    assert statistic.settled(0.99, 4)
    assert not statistic.settled(1.0, 4)


def test_batched_and_single_steps_agree(seed):
    parts = [oracle.decaying_rows(6000, 80, seed=seed + i) for i in range(3)]
    alone = [feed(SubspacePCA(80, K), rows) for rows in parts]
    together = [SubspacePCA(80, K) for _ in parts]
    for start in range(0, 6000, 300):
        for statistic, rows in zip(together, parts, strict=True):
            statistic.update(rows[start : start + 300])
        settle_full(together)
    settle_full(together, everything=True)
    for one, other in zip(alone, together, strict=True):
        assert torch.allclose(one.principal(4)[1], other.principal(4)[1], rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 70), n=st.integers(1, 900), batch=st.integers(1, 400), seed=st.integers(0, 99))
def test_any_shape_works(d, n, batch, seed):
    rows = oracle.decaying_rows(n, d, seed=seed)
    for kind in KINDS.values():
        statistic = feed(kind(d), rows, batch=batch)
        k = min(K, d)
        directions, values = statistic.principal(k)
        assert directions.shape == (k, d)
        assert torch.allclose(directions @ directions.mT, torch.eye(k), atol=1e-5)
        assert float(values.sum()) <= statistic.total * (1 + 1e-5) + 1e-9
        statistic.certificate(k)


@pytest.mark.parametrize("batch", [300, 1024])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_never_below_peft_on_the_same_batches(batch, decay, seed):
    incremental_pca = pytest.importorskip("peft.utils.incremental_pca")
    rows = oracle.decaying_rows(12 * batch, 256, decay=decay, seed=seed)
    theirs = incremental_pca.IncrementalPCA(n_components=32, copy=True, lowrank=True, lowrank_seed=42)
    for part in rows.split(batch):
        theirs.partial_fit(part)
    matrix = oracle.scatter(rows)
    ours = oracle.captured(matrix, feed(SubspacePCA(256, 32), rows, batch).principal(32)[0])
    assert ours >= oracle.captured(matrix, theirs.components_) - 1e-6
    assert ours > 0.995


def test_agrees_with_scikit_learn(make, seed):
    decomposition = pytest.importorskip("sklearn.decomposition")
    rows = oracle.decaying_rows(5000, 64, decay=1.2, seed=seed)
    exact = decomposition.PCA(n_components=4, svd_solver="full").fit(rows.double().numpy())
    directions, values = feed(make(64), rows).principal(4)
    cosines = np.abs((exact.components_ * directions.double().numpy()).sum(1))
    assert cosines.min() > 0.999
    np.testing.assert_allclose(values.numpy() / (5000 - 1), exact.explained_variance_, rtol=0.005)


@pytest.mark.parametrize("kind", ["shift", "late", "domains"])
def test_sorted_data_are_no_worse_than_pefts(kind, seed):
    """Rows whose kind changes midway: a sketch that only sees the old directions would miss the new ones."""
    incremental_pca = pytest.importorskip("peft.utils.incremental_pca")
    d, generator = 512, torch.Generator().manual_seed(seed)
    rows = oracle.decaying_rows(12000, d, seed=seed)
    new = torch.linalg.qr(torch.randn(d, 1, generator=generator)).Q.T
    if kind == "shift":
        rows[:6000] += 3 * new
    elif kind == "late":
        rows[9000:] += 3 * torch.randn(3000, 1, generator=generator) * new
    else:
        rows[6000:] = oracle.decaying_rows(6000, d, seed=seed + 1)
    matrix = oracle.scatter(rows)
    theirs = incremental_pca.IncrementalPCA(n_components=16, copy=True, lowrank=True, lowrank_seed=42)
    for part in rows.split(500):
        theirs.partial_fit(part)
    ours = oracle.captured(matrix, feed(SubspacePCA(d, 16), rows, 500).principal(16)[0])
    assert ours >= oracle.captured(matrix, theirs.components_)
    assert ours > (0.93 if kind == "domains" else 0.995)


def test_constant_rows_in_many_blocks_have_no_variance(make, seed):
    row = 7 * torch.randn(1, 512, generator=torch.Generator().manual_seed(seed))
    statistic = feed(make(512), row.expand(6000, -1), batch=1500)
    assert statistic.total == 0.0
    assert not statistic.principal(4)[1].any()
