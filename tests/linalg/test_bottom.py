from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from smartinit.linalg import bottom
from smartinit.linalg.bottom import bottom_triplets

_SPEC = importlib.util.spec_from_file_location(
    "weight_splits", Path(__file__).parents[1] / "oracles" / "weight_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


def product(found, i=0):
    return (found.left[i].double() * found.values[i]) @ found.right[i].double()


def noise(out, features, seed):
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _inverse_krylov_from_small_sizes_on(monkeypatch):
    monkeypatch.setattr(bottom, "_DENSE_SIDE", 100)


@pytest.mark.parametrize("shape", [(300, 300), (310, 280), (280, 400)])
@pytest.mark.parametrize("k", [2, 8])
def test_the_inverse_iteration_certifies_itself(shape, k, seed, monkeypatch):
    def refuse(*_, **__):
        pytest.fail("took the dense routine")

    monkeypatch.setattr(bottom, "dense_triplets", refuse)
    weight = noise(*shape, seed)
    found = bottom_triplets(weight[None], k, seeds=[seed])
    assert oracle.relative_error(product(found), oracle.product_of_bottom_triplets(weight, k)) < 1e-5


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (400, 380), (380, 600)])
@pytest.mark.parametrize("k", [1, 6, 30])
def test_the_minor_part_is_that_of_the_full_decomposition(shape, k, seed):
    weight = noise(*shape, seed)
    found = bottom_triplets(weight[None], k, seeds=[seed])
    assert oracle.relative_error(product(found), oracle.product_of_bottom_triplets(weight, k)) < 1e-5
    sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)[::-1][:k]
    assert np.allclose(found.values[0], sigma, rtol=1e-6)
    assert torch.allclose(found.left[0].mT @ found.left[0], torch.eye(k), atol=1e-5)
    assert torch.allclose(found.right[0] @ found.right[0].mT, torch.eye(k), atol=1e-5)
    assert bool(found.settled)


@pytest.mark.parametrize("condition", [1e3, 1e5, 1e6])
@pytest.mark.parametrize("shape", [(60, 60), (400, 360)])
def test_small_values_beside_a_large_one_are_exact(condition, shape, seed):
    u, v = (torch.linalg.qr(noise(n, min(shape), seed + n).double()).Q for n in shape)
    sigma = torch.cat([torch.tensor([condition]), torch.linspace(2, 1, min(shape) - 1)]).double()
    weight = ((u * sigma) @ v.mT).float()
    found = bottom_triplets(weight[None], 5, seeds=[seed])
    # the rounding of the weight itself decides what is found: compare with the decomposition of the rounded one
    exact = oracle.product_of_bottom_triplets(weight, 5)
    assert oracle.relative_error(product(found), exact) < 1e-5


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (360, 400), (400, 360)])
@pytest.mark.parametrize("rank", [0, 10, 27])
def test_rank_deficient_weights_have_orthonormal_minor_vectors(shape, rank, seed):
    weight = noise(shape[0], rank, seed) @ noise(rank, shape[1], seed + 1)
    found = bottom_triplets(weight[None], 8, seeds=[seed])
    assert torch.allclose(found.left[0].mT @ found.left[0], torch.eye(8), atol=1e-5)
    assert torch.allclose(found.right[0] @ found.right[0].mT, torch.eye(8), atol=1e-5)
    size = max(float(weight.norm()), 1.0)
    assert float(found.values.max()) < 1e-5 * size or min(shape) - rank < 8
    assert (
        torch.linalg.vector_norm(found.left[0].mT @ weight - found.values[0].float()[:, None] * found.right[0])
        < 1e-5 * size
    )


def test_a_stack_is_found_one_by_one_and_the_same_again(seed):
    weights = torch.stack([noise(350, 340, seed + i) for i in range(2)])
    before = weights.clone()
    both = bottom_triplets(weights, 6, seeds=[1, 2])
    again = bottom_triplets(weights, 6, seeds=[1, 2])
    assert all(torch.equal(a, b) for a, b in zip(both, again, strict=True))
    assert torch.equal(weights, before)
    for i in range(2):
        alone = bottom_triplets(weights[i : i + 1], 6, seeds=[i + 1])
        assert oracle.relative_error(product(both, i), product(alone).numpy()) < 1e-5
