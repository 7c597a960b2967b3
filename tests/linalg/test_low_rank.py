"""Truncated decompositions against LAPACK's dense one in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from smartinit.linalg import low_rank
from smartinit.linalg.low_rank import clamped, truncated, truncated_sum


def dense_truncation(matrix: torch.Tensor, rank: int) -> np.ndarray:
    """The best approximation of one rank, by numpy."""
    u, sigma, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def relative_error(left: torch.Tensor, right: torch.Tensor, expected: np.ndarray) -> float:
    """Of the product."""
    return float(np.linalg.norm(left.double().numpy() @ right.double().numpy() - expected) / np.linalg.norm(expected))


def terms(shape: tuple[int, int], ranks: tuple[int, ...], seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random float32 factors."""
    generator = torch.Generator().manual_seed(seed)
    lefts = [torch.randn(shape[0], r, generator=generator) for r in ranks]
    return lefts, [torch.randn(r, shape[1], generator=generator) for r in ranks]


@pytest.mark.parametrize("shape", [(40, 40), (50, 7), (6, 60)])
@pytest.mark.parametrize("ranks", [(3,), (2, 4), (1, 5, 6)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_sum_is_truncated_as_the_dense_matrix(
    shape: tuple[int, int], ranks: tuple[int, ...], rank: int, seed: int
) -> None:
    lefts, rights = terms(shape, ranks, seed)
    total = sum(left.double() @ right.double() for left, right in zip(lefts, rights, strict=True))
    left, right = truncated_sum(lefts, rights, rank)
    assert (left.shape, right.shape) == ((shape[0], rank), (rank, shape[1]))
    assert relative_error(left, right, dense_truncation(total, rank)) < 1e-12
    torch.testing.assert_close(right @ right.mT, torch.eye(rank, dtype=torch.float64))
    sigma = np.linalg.svd(total.numpy(), compute_uv=False)[:rank]
    np.testing.assert_allclose(torch.linalg.vector_norm(left, dim=0), sigma)
    assert (right.gather(1, right.abs().argmax(1, keepdim=True)) > 0).all()


def test_summands_that_cancel_leave_zero(seed: int) -> None:
    lefts, rights = terms((20, 30), (4,), seed)
    left, right = truncated_sum([*lefts, -lefts[0]], rights * 2, 6)
    assert left.abs().max() < 1e-13
    torch.testing.assert_close(right @ right.mT, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_a_pruned_product_is_truncated_as_by_the_full_decomposition(share: float, transposed: bool, seed: int) -> None:
    lefts, rights = terms((700, 500), (24,), seed)
    generator = torch.Generator().manual_seed(seed)
    matrix = (lefts[0] @ rights[0]) * (torch.rand(700, 500, generator=generator) < share)
    matrix = matrix.T if transposed else matrix
    assert relative_error(*truncated(matrix, 8), dense_truncation(matrix, 8)) < 1e-5


def test_the_whole_rank_is_the_matrix(seed: int) -> None:
    (left,), (right,) = terms((30, 20), (25,), seed)
    matrix = left @ right
    left, right = truncated(matrix, 20)
    torch.testing.assert_close(left @ right, matrix, rtol=1e-4, atol=1e-4)


def test_a_driver_means_nothing_on_a_cpu(seed: int) -> None:
    (left,), (right,) = terms((30, 20), (5,), seed)
    assert all(map(torch.equal, truncated(left @ right, 3), truncated(left @ right, 3, driver="gesvd")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuSOLVER's routines need a GPU")
@pytest.mark.parametrize("driver", [None, "gesvd", "gesvdj", "gesvda"])
def test_drivers_agree_on_cuda(driver: str | None, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (left,), (right,) = terms((600, 500), (5,), seed)
    matrix = left @ right
    if driver is not None:
        monkeypatch.setattr(low_rank, "top_triplets", lambda *_, **__: pytest.fail("the driver was not used"))
    found = truncated(matrix.cuda(), 3, driver=driver)
    assert relative_error(*(part.cpu() for part in found), dense_truncation(matrix, 3)) < 1e-4


@pytest.mark.parametrize("share", [0.51, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_limit_is_the_quantile_of_the_entries_with_both_signs(share: float, rank: int, seed: int) -> None:
    (left,), (right,) = terms((9, 5), (rank,), seed)
    entries = np.concatenate([left.numpy().ravel(), right.numpy().ravel()])
    limit = np.quantile(np.concatenate([entries, -entries]), share)
    for found, whole in zip(clamped(left, right, share), (left, right), strict=True):
        np.testing.assert_allclose(found, whole.clip(-limit, limit), rtol=1e-6, atol=1e-7)
    flipped = clamped(left * -1, right * -1, share)
    for found, other in zip(clamped(left, right, share), flipped, strict=True):
        assert torch.equal(found, -other)
