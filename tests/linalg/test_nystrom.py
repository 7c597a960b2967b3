from __future__ import annotations

import pytest
import torch

from smartinit.linalg.nystrom import fill_basis, leading_directions, nystrom_step, random_basis
from smartinit.linalg.threads import small_eigh


def spd(d, decay, seed, spike=1.0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
    values = torch.arange(1, d + 1, dtype=torch.float64) ** -decay
    values[0] *= spike
    return basis, values, (basis * values) @ basis.mT


def test_a_step_from_the_exact_eigenvectors_stays_there(seed):
    basis, values, matrix = spd(40, 1.0, seed)
    sketch = basis[:, :8].float().unsqueeze(0)
    step = nystrom_step((matrix @ sketch[0].double()).float().unsqueeze(0), sketch)
    assert torch.allclose(step.values[0], values[:8], rtol=1e-5)
    assert torch.allclose(step.overlap[0].diagonal().abs(), torch.ones(8, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(step.basis[0].mT @ step.basis[0], torch.eye(8), atol=2e-6)


def test_a_step_never_overestimates_and_stacks_are_independent(seed):
    problems = [spd(30, decay, seed + i)[2] for i, decay in enumerate((0.5, 1.0, 2.0))]
    sketch = random_basis(30, 10, seed).expand(3, 30, 10)
    products = torch.stack([(m @ sketch[0].double()).float() for m in problems])
    together = nystrom_step(products, sketch)
    for i, matrix in enumerate(problems):
        alone = nystrom_step(products[i : i + 1], sketch[i : i + 1])
        assert torch.allclose(together.values[i], alone.values[0], rtol=1e-4)
        exact = torch.linalg.eigvalsh(matrix).flip(0)[:10]
        assert (together.values[i] <= exact * (1 + 1e-4)).all(), "Nyström approximates from below"


def test_repeated_steps_find_the_leading_eigenvectors(seed):
    basis, values, matrix = spd(60, 1.0, seed, spike=1000.0)
    sketch = random_basis(60, 20, seed).unsqueeze(0)
    sketch = torch.linalg.qr((matrix @ sketch[0].double()).float()).Q.unsqueeze(0)
    for _ in range(25):
        step = nystrom_step((matrix @ sketch[0].double()).float().unsqueeze(0), sketch)
        sketch = step.basis
    cosines = (basis[:, :8].mT @ step.basis[0].double()[:, :8]).diagonal().abs()
    assert cosines.min() > 0.999
    assert torch.allclose(step.values[0][:8], values[:8], rtol=1e-3)


def test_zero_and_rank_deficient_problems_give_zeros_not_nan():
    sketch = random_basis(12, 5, 0).unsqueeze(0)
    step = nystrom_step(torch.zeros(1, 12, 5), sketch)
    assert not step.basis.any()
    assert not step.values.any()
    one = torch.outer(torch.ones(12), torch.ones(12))
    step = nystrom_step((one @ sketch[0]).unsqueeze(0), sketch)
    assert step.values[0][0] == pytest.approx(12, rel=1e-4)
    assert not step.values[0][1:].any()
    assert torch.isfinite(step.basis).all()


def test_dead_columns_are_filled_with_fresh_directions(seed):
    basis = random_basis(20, 6, seed)
    values = torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    filled = fill_basis(basis * (values > 0), values, torch.Generator().manual_seed(seed))
    assert torch.equal(filled[:, :3], basis[:, :3])
    assert torch.allclose(filled.mT @ filled, torch.eye(6), atol=1e-5)
    assert fill_basis(basis, torch.ones(6), torch.Generator()) is basis


@pytest.mark.parametrize("rows", [7, 100, 3000])
def test_leading_directions_of_rows_at_hand(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 50, generator=generator) * torch.arange(1, 51) ** -1.0
    x[:, 0] *= 100
    basis, values = leading_directions(x, random_basis(50, 12, seed), generator)
    exact = torch.linalg.svdvals(x.double())[:6].square()
    assert torch.allclose(values[:6], exact, rtol=0.02)
    living = min(rows, 12)
    assert torch.allclose(basis.mT @ basis, torch.diag((torch.arange(12) < living).float()), atol=1e-4)


def test_small_eigh_equals_eigh_and_restores_the_threads():
    matrix = spd(20, 1.0, 0)[2]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        values, vectors = small_eigh(matrix)
        assert torch.get_num_threads() == 2
        with pytest.raises(RuntimeError):
            small_eigh(torch.zeros(2, 3))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.allclose((vectors * values) @ vectors.mT, matrix)
