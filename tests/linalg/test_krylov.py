from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from smartinit.linalg import krylov
from smartinit.linalg.krylov import top_triplets

_SPEC = importlib.util.spec_from_file_location(
    "weight_splits", Path(__file__).parents[1] / "oracles" / "weight_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)
decaying_weight, relative_error = oracle.decaying_weight, oracle.relative_error
product_of_top_triplets = oracle.product_of_top_triplets


def product(found, i=0):
    return (found.left[i].double() * found.values[i]) @ found.right[i].double()


@pytest.fixture
def no_dense(monkeypatch):
    def refuse(*_, **__):
        pytest.fail("took the dense routine")

    monkeypatch.setattr(krylov, "dense_triplets", refuse)


@pytest.mark.parametrize("shape", [(400, 400), (640, 350), (350, 900)])
@pytest.mark.parametrize("decay", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("k", [4, 16, 40])
@pytest.mark.usefixtures("no_dense")
def test_the_leading_part_is_that_of_the_full_decomposition(shape, decay, k, seed):
    weight = decaying_weight(*shape, decay=decay, seed=seed).float()
    found = top_triplets(weight[None], k, seeds=[seed])
    assert relative_error(product(found), product_of_top_triplets(weight, k)) < 1e-5
    assert bool(found.settled)
    sigma = np.linalg.svd(weight.double().numpy(), compute_uv=False)[:k]
    assert np.allclose(found.values[0], sigma, rtol=1e-5)
    eye = torch.eye(k)
    assert torch.allclose(found.left[0].mT @ found.left[0], eye, atol=1e-5)
    assert torch.allclose(found.right[0] @ found.right[0].mT, eye, atol=1e-5)


@pytest.mark.usefixtures("no_dense")
def test_every_smaller_rank_is_optimal_too(seed):
    weight = decaying_weight(400, 380, decay=0.7, seed=seed).float()
    found = top_triplets(weight[None], 24, seeds=[seed])
    for k in (1, 5, 13):
        part = (found.left[0, :, :k].double() * found.values[0, :k]) @ found.right[0, :k].double()
        assert relative_error(part, product_of_top_triplets(weight, k)) < 1e-5


@pytest.mark.usefixtures("no_dense")
def test_float64_is_worked_on_in_float64(seed):
    weight = decaying_weight(400, 380, decay=0.7, seed=seed)
    found = top_triplets(weight[None], 8, seeds=[seed], tolerance=1e-11)
    assert found.left.dtype == torch.float64
    assert relative_error(product(found), product_of_top_triplets(weight, 8)) < 1e-10


@pytest.mark.usefixtures("no_dense")
def test_a_matrix_in_a_stack_is_found_as_if_alone(seed):
    weights = torch.stack([decaying_weight(360, 340, decay=d, seed=seed).float() for d in (0.2, 1.5, 0.6)])
    together = top_triplets(weights, 8, seeds=[seed, seed + 1, seed + 2])
    for i in range(3):
        alone = top_triplets(weights[i : i + 1], 8, seeds=[seed + i])
        assert relative_error(product(together, i), product(alone).numpy()) < 1e-5
        assert relative_error(product(together, i), product_of_top_triplets(weights[i], 8)) < 1e-5


@pytest.mark.usefixtures("no_dense")
def test_same_seed_same_bits_and_the_caller_keeps_its_weight(seed):
    weight = decaying_weight(350, 400, seed=seed).float()[None]
    before = weight.clone()
    state = torch.get_rng_state()
    first, second = (top_triplets(weight, 8, seeds=[seed]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(weight, before)
    assert torch.equal(torch.get_rng_state(), state), "the user's random stream was used"


@pytest.mark.parametrize("size", [1e-25, 1e-6, 1e8, 1e18])
@pytest.mark.usefixtures("no_dense")
def test_the_unit_of_the_weight_does_not_matter(size, seed):
    weight = decaying_weight(350, 350, seed=seed, size=size).float()
    found = top_triplets(weight[None], 8, seeds=[seed])
    assert relative_error(product(found) / size, product_of_top_triplets(weight, 8) / size) < 1e-5


@pytest.mark.usefixtures("no_dense")
def test_more_equal_singular_values_than_the_block_is_wide(seed):
    """A block of 16 sees 16 copies of a value that 30 triplets share, and converges with tiny residuals."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    for tail in (0.9, 0.5, 0.3, 0.2):
        sigma = torch.cat([torch.full((30,), 2.0), torch.tensor([1.6]), torch.linspace(tail, tail / 3, 369)]).double()
        weight = ((u * sigma) @ v.mT).float()
        found = top_triplets(weight[None], 17, seeds=[seed])
        assert torch.allclose(found.values[0], sigma[:17], rtol=1e-5)
        assert torch.allclose(found.left[0].mT @ weight @ found.right[0].mT, 2 * torch.eye(17), atol=1e-5)


@pytest.mark.parametrize("k", [8, 40])
def test_orthogonal_weights_give_any_directions_of_the_right_energy(k, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.linalg.qr(torch.randn(400, 400, generator=generator)).Q
    found = top_triplets(weight[None], k, seeds=[seed])
    assert torch.allclose(found.values[0], torch.ones(k).double(), rtol=1e-5)
    assert torch.allclose(found.left[0].mT @ weight @ found.right[0].mT, torch.eye(k), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 5, 20])
@pytest.mark.usefixtures("no_dense")
def test_zero_and_rank_deficient_weights(rank, seed):
    weight = decaying_weight(400, 350, seed=seed, rank=rank).float()
    found = top_triplets(weight[None], 12, seeds=[seed])
    assert all(part.isfinite().all() for part in found[:4])
    assert torch.linalg.vector_norm(product(found) - torch.from_numpy(product_of_top_triplets(weight, 12))) < 1e-5
    assert bool(found.settled)


def test_what_does_not_settle_is_decomposed_densely(seed, monkeypatch):
    weight = decaying_weight(400, 380, decay=0.05, seed=seed).float()
    asked = []
    dense = krylov.dense_triplets
    monkeypatch.setattr(krylov, "dense_triplets", lambda *a, **k: asked.append(1) or dense(*a, **k))
    found = top_triplets(weight[None], 8, seeds=[seed], max_steps=3)
    assert asked
    assert relative_error(product(found), product_of_top_triplets(weight, 8)) < 1e-5


def test_restarts_keep_what_was_found(seed, monkeypatch, no_dense):
    monkeypatch.setattr(krylov, "_RESTART_AFTER", 6)
    weight = decaying_weight(500, 500, decay=0.1, seed=seed).float()
    found = top_triplets(weight[None], 8, seeds=[seed])
    assert relative_error(product(found), product_of_top_triplets(weight, 8)) < 1e-5


def test_exactly_n_steps_improve_with_n_and_beat_plain_power_steps(seed, no_dense):
    weight = decaying_weight(800, 700, decay=0.3, seed=seed).float()
    best = product_of_top_triplets(weight, 8)
    errors = [
        relative_error(product(top_triplets(weight[None], 8, seeds=[seed], iterations=n)), best) for n in (1, 4, 16)
    ]
    assert errors[0] > errors[1] > errors[2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, 8, niter=16)
    assert errors[2] < relative_error((u * s) @ v.mT, best) / 10


def test_ranks_that_leave_no_room_for_a_sketch_are_dense(seed):
    weight = decaying_weight(24, 40, seed=seed).float()
    found = top_triplets(weight[None], 24, seeds=[seed])
    assert relative_error(product(found), weight.numpy()) < 1e-5
    assert top_triplets(weight[None], 0, seeds=[seed]).values.shape == (1, 0)
