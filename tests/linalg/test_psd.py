"""Roots and damping of second moments, and singular directions of products: against numpy in float64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from smartinit.linalg import products
from smartinit.linalg.products import bottom_left, bottom_left_of_triangle, top_left
from smartinit.linalg.psd import damped, psd_eigh, psd_root

_SPEC = importlib.util.spec_from_file_location(
    "covariance_oracle", Path(__file__).parent.parent / "oracles" / "covariance_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


def moment(n, d, **options):
    return torch.from_numpy(oracle.second_moment(oracle.graded_rows(n, d, **options)))


def span_error(found, expected):
    return np.linalg.norm(found @ found.T - expected @ expected.T)


@pytest.mark.parametrize("massive", [1.0, 1e4, 1e7])
def test_root_of_a_regular_matrix_needs_no_damping(massive, seed):
    matrix = moment(300, 60, massive=massive, seed=seed)
    kept = matrix.clone()
    root = psd_root(matrix)
    scale = matrix.diagonal().sqrt()
    assert root.damping == 0
    assert float(((root.factor @ root.factor.mT - matrix) / torch.outer(scale, scale)).abs().max()) < 1e-14
    assert not root.factor.triu(1).any()
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize("n", [1, 20, 59])
def test_root_of_a_singular_matrix_is_damped_as_little_as_works(n, seed):
    matrix = moment(n, 60, massive=100.0, seed=seed)
    root = psd_root(matrix)
    assert root.damping < 1e-9
    assert root.damping > 0 or n == 59, "a last pivot that is only just round-off does no harm"
    scale = matrix.diagonal().sqrt()
    assert float(((root.factor @ root.factor.mT - matrix) / torch.outer(scale, scale)).abs().max()) < 1e-8


def test_dead_features_need_no_damping(seed):
    matrix = moment(300, 20, seed=seed)
    matrix[4], matrix[:, 4] = 0, 0
    root = psd_root(matrix)
    assert root.damping == 0
    assert not root.factor[4].any()
    assert torch.allclose(root.factor @ root.factor.mT, matrix, atol=1e-14)
    assert not psd_root(torch.zeros(5, 5)).factor.any()


@pytest.mark.parametrize("bad", ["negative", "indefinite", "nan"])
def test_what_is_no_second_moment_is_refused(bad):
    matrix = torch.eye(4)
    if bad == "indefinite":
        matrix[0, 1] = matrix[1, 0] = 2.0
    else:
        matrix[2, 2] = -1.0 if bad == "negative" else torch.nan
    with pytest.raises(ValueError, match="positive semi-definite"):
        psd_root(matrix)


def test_damping_adds_to_the_diagonal_of_a_copy(seed):
    matrix = moment(100, 10, seed=seed)
    more = damped(matrix, 0.5)
    assert torch.allclose(more - matrix, 0.05 * matrix.trace() * torch.eye(10, dtype=torch.float64))
    values, vectors = psd_eigh(matrix)
    assert torch.allclose((vectors * values) @ vectors.mT, matrix)
    assert (values >= 0).all()


@pytest.mark.parametrize("shape", [(300, 400), (400, 300), (20, 30)])
@pytest.mark.parametrize("massive", [1.0, 1e3])
def test_top_and_bottom_are_those_of_the_svd(shape, massive, seed):
    weight = oracle.graded_weight(*shape, seed=seed).double()
    matrix = moment(2 * shape[1], shape[1], decay=0.8, massive=massive, seed=seed)
    product = (weight @ matrix).numpy()
    u, s, _ = np.linalg.svd(product, full_matrices=False)
    top = top_left(weight, matrix, 8, seed=seed)
    assert span_error(top.vectors.numpy(), u[:, :8]) < 1e-6
    np.testing.assert_allclose(top.values, s[:8], rtol=1e-9)
    bottom = bottom_left(weight @ matrix, 8, seed=seed)
    assert span_error(bottom.vectors.numpy(), u[:, -8:]) < 1e-5
    np.testing.assert_allclose(bottom.values, s[::-1][:8], rtol=1e-5)
    assert max(top.residual, bottom.residual) < 1e-6


def test_the_factor_need_not_be_symmetric(seed):
    weight = oracle.graded_weight(300, 400, seed=seed).double()
    root = psd_root(moment(900, 400, decay=0.8, seed=seed)).factor
    u, _, _ = np.linalg.svd((weight @ root).numpy(), full_matrices=False)
    assert span_error(top_left(weight, root, 8).vectors.numpy(), u[:, :8]) < 1e-5


@pytest.mark.parametrize("upper", [True, False])
def test_triangles(upper, seed):
    root = psd_root(moment(900, 300, seed=seed)).factor
    triangle = root.mT if upper else root
    u, s, _ = np.linalg.svd(triangle.numpy())
    found = bottom_left_of_triangle(triangle, 8, upper=upper)
    assert span_error(found.vectors.numpy(), u[:, -8:]) < 1e-5
    np.testing.assert_allclose(found.values, s[::-1][:8], rtol=1e-8)


def test_small_eigenvalues_keep_digits_that_eigh_loses():
    """diag(D) K diag(D) with features of very different sizes: relative accuracy of all its eigenvalues."""
    core = torch.eye(300, dtype=torch.float64) + 0.001
    scale = torch.logspace(0, 9, 300, dtype=torch.float64)
    matrix = torch.outer(scale, scale) * core
    found = bottom_left_of_triangle(psd_root(matrix).factor, 4, upper=False)
    small = matrix[:40, :40].numpy()  # the rest is far too large to matter, but for its share of 1e-3
    expected = np.linalg.eigvalsh(small)[:4]
    np.testing.assert_allclose(found.values.square(), expected, rtol=1e-2)


@pytest.mark.parametrize("rank", [0, 3])
def test_singular_products_are_done_densely(rank, seed):
    weight = oracle.graded_weight(300, 300, seed=seed).double()
    weight[:, rank:] = 0
    identity = torch.eye(300, dtype=torch.float64)
    for found in (top_left(weight, identity, 8), bottom_left(weight, 8)):
        vectors = found.vectors
        assert torch.allclose(vectors.mT @ vectors, torch.eye(8, dtype=torch.float64), atol=1e-10)
        assert found.residual == 0
    assert float(bottom_left(weight, 8).values.max()) < 1e-12


def test_a_flat_spectrum_ends_in_the_dense_routine(seed):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.linalg.qr(torch.randn(200, 200, generator=generator, dtype=torch.float64)).Q
    flat *= torch.linspace(1, 1.0001, 200, dtype=torch.float64)
    found = top_left(flat, torch.eye(200, dtype=torch.float64), 8)
    u, _, _ = np.linalg.svd(flat.numpy())
    assert span_error(found.vectors.numpy(), u[:, :8]) < 1e-8


def test_the_iteration_is_what_is_tested_here(monkeypatch, seed):
    """The comparisons above are with the SVD; make sure that it is not the SVD which they look at."""
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = moment(900, 300, decay=0.8, seed=seed)
    assert top_left(weight, matrix, 8).residual > 0
    assert bottom_left(weight @ matrix, 8).residual > 0
    assert bottom_left((weight @ matrix)[:, :290], 8).residual > 0
    monkeypatch.setattr(products, "_STEPS", 1)
    assert top_left(weight, matrix, 8).residual == 0, "a bound that is too tight ends in the dense routine"
    assert top_left(weight, matrix, 0).vectors.shape == (300, 0)
