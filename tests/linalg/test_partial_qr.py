from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from smartinit.linalg.partial_qr import leading_qr, pivoted_qr

_SPEC = importlib.util.spec_from_file_location(
    "weight_splits", Path(__file__).parents[1] / "oracles" / "weight_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


def noise(out, features, seed):
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed))


def assert_sound(found, weight, r):
    basis, rows = found.basis.double(), found.rows.double()
    assert torch.allclose(basis.mT @ basis, torch.eye(r).double(), atol=1e-5)
    assert torch.allclose(rows, basis.mT @ weight.double(), atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (50, 50)])
@pytest.mark.parametrize("r", [1, 7, 40])
def test_identical_to_the_full_decomposition_signs_included(shape, r, seed):
    weight = noise(*shape, seed)
    found = leading_qr(weight, r)
    q, rows = oracle.factors_of_qr(weight, r)
    assert np.allclose(found.basis, q, atol=2e-5)
    assert np.allclose(found.rows, rows, atol=1e-4)
    assert found.columns.tolist() == list(range(r))
    assert not found.rows[:, :r].tril(-1).any(), "R is triangular"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype, seed):
    weight = noise(30, 50, seed).to(dtype)
    q, rows = oracle.factors_of_qr(weight, 6)
    for found in (leading_qr(weight, 6), leading_qr(weight.T.contiguous().T, 6)):
        assert np.allclose(found.basis, q, atol=1e-5)
        assert np.allclose(found.rows, rows, atol=1e-4)


def test_dependent_leading_columns_give_way_to_the_next(seed):
    weight = noise(30, 50, seed)
    weight[:, 1] = 0
    weight[:, 2] = -3 * weight[:, 0]
    weight[:, 4] = weight[:, 0] + weight[:, 3]
    found = leading_qr(weight, 6)
    assert found.columns.tolist() == [0, 3, 5, 6, 7, 8]
    q, _ = oracle.factors_of_qr(weight[:, [0, 3, 5, 6, 7, 8]], 6)
    assert np.allclose(found.basis, q, atol=1e-5)
    assert_sound(found, weight, 6)
    for smaller in (1, 3, 5):
        assert torch.allclose(leading_qr(weight, smaller).basis, found.basis[:, :smaller], atol=1e-5), "nested"


@pytest.mark.parametrize("decompose", [leading_qr, pivoted_qr])
@pytest.mark.parametrize("rank", [0, 1, 4])
def test_beyond_the_rank_the_rows_are_zero_and_the_basis_stays_orthonormal(decompose, rank, seed):
    weight = noise(30, rank, seed) @ noise(rank, 400, seed + 1)
    found = decompose(weight, 9)
    assert len(found.columns) == rank
    assert not found.rows[rank:].any()
    assert_sound(found, weight, 9)
    assert torch.allclose(found.basis @ found.rows, weight, atol=1e-4)


@pytest.mark.parametrize("decompose", [leading_qr, pivoted_qr])
def test_constant_columns_have_one_direction_together(decompose, seed):
    weight = noise(30, 40, seed)
    weight[:, :20] = 5.0
    found = decompose(weight, 8)
    assert sum(c < 20 for c in found.columns.tolist()) == 1
    assert_sound(found, weight, 8)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_pivots_are_the_greedy_choice(shape, seed):
    weight = noise(*shape, seed) * torch.linspace(0.1, 3, shape[1])
    found = pivoted_qr(weight, 20)
    assert found.columns.tolist() == oracle.greedy_columns(weight, 20)
    assert_sound(found, weight, 20)


@pytest.mark.parametrize("decay", [2.5, 4.0])
def test_pivots_under_steep_decay_are_the_greedy_choice(decay, seed):
    weight = oracle.decaying_weight(40, 60, decay=decay, seed=seed).float()
    assert pivoted_qr(weight, 12).columns.tolist() == oracle.greedy_columns(weight, 12)


def test_the_pivoted_product_does_not_depend_on_the_order_of_features(seed):
    weight = noise(40, 60, seed)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
    plain, shuffled = pivoted_qr(weight, 10), pivoted_qr(weight[:, order], 10)
    assert torch.allclose(plain.basis, shuffled.basis, atol=1e-5)
    assert torch.allclose(plain.rows[:, order], shuffled.rows, atol=1e-5)
    assert order[shuffled.columns].tolist() == plain.columns.tolist()


def test_pivots_capture_more_than_the_first_columns(seed):
    weight = noise(40, 60, seed) * torch.linspace(0.1, 3, 60)
    assert pivoted_qr(weight, 10).rows.norm() > leading_qr(weight, 10).rows.norm()


@pytest.mark.parametrize("decompose", [leading_qr, pivoted_qr])
def test_inputs_stay_and_ranks_are_nested(decompose, seed):
    weight = noise(20, 30, seed)
    before = weight.clone()
    large, small = decompose(weight, 20), decompose(weight, 5)
    assert torch.equal(weight, before)
    assert torch.allclose(large.basis[:, :5], small.basis, atol=1e-5)
    assert torch.allclose(large.rows[:5], small.rows, atol=1e-5)
    assert decompose(weight, 0).basis.shape == (20, 0)
