"""Pruning and sums by sign against the definitions, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch

from smartinit.linalg.pruning import keep_largest, keep_random, sum_of_agreeing, weighted_sum


def tensors(count: int, shape: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("shape", [(40,), (7, 9), (3, 4, 2, 2)])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.999, 1.0])
def test_the_largest_entries_stay(shape: tuple[int, ...], density: float, seed: int) -> None:
    (whole,) = tensors(1, shape, seed)
    pruned = keep_largest(whole, density)
    kept = pruned != 0
    assert pruned.shape == whole.shape
    assert int(kept.sum()) == int(density * whole.numel())
    assert torch.equal(pruned[kept], whole[kept])
    if not kept.all():
        assert whole[kept].abs().min() >= whole[~kept].abs().max()


def test_of_equal_entries_only_as_many_stay_as_are_asked_for() -> None:
    assert int((keep_largest(torch.full((10, 10), -2.0), 0.25) != 0).sum()) == 25


def test_too_few_entries_leave_none() -> None:
    assert torch.equal(keep_largest(torch.ones(3), 0.1), torch.zeros(3))


def test_random_entries_stay_and_grow(seed: int) -> None:
    whole = torch.ones(200, 100)
    torch.manual_seed(seed)
    pruned = keep_random(whole, 0.2)
    assert set(pruned.unique().tolist()) == {0.0, 5.0}
    assert pruned.mean().item() == pytest.approx(1, abs=6 * math.sqrt(4 / whole.numel()))
    torch.manual_seed(seed)
    assert torch.equal(keep_random(whole.T.contiguous().T, 0.2), pruned), "the order in memory makes no difference"


def test_everything_stays_without_drawing(seed: int) -> None:
    (whole,) = tensors(1, (5, 5), seed)
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    for prune in (keep_random, keep_largest):
        pruned = prune(whole, 1.0)
        assert torch.equal(pruned, whole)
        assert pruned.data_ptr() != whole.data_ptr()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_weighted_sum_never_changes_its_summands(seed: int) -> None:
    parts = tensors(3, (4, 5), seed)
    copies = [part.clone() for part in parts]
    total = weighted_sum(iter(parts), [0.5, -2.0, 1.0])
    torch.testing.assert_close(total, 0.5 * parts[0] - 2 * parts[1] + parts[2])
    assert all(map(torch.equal, parts, copies))
    weighted_sum(parts[:1], [1.0]).zero_()
    assert torch.equal(parts[0], copies[0])


def test_nothing_has_no_sum() -> None:
    with pytest.raises(ValueError, match="at least one"):
        weighted_sum([], [])


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_only_entries_of_the_elected_sign_count(method: str, count: int, seed: int) -> None:
    parts = [keep_largest(part, 0.7) for part in tensors(count, (6, 5), seed)]
    weights = [1.0, -0.5, 2.0, 0.25][:count]
    merged = sum_of_agreeing(parts, weights, method)
    for place in [(i, j) for i in range(6) for j in range(5)]:
        entries = [float(part[place]) for part in parts]
        votes = entries if method == "total" else [math.copysign(1, e) if e else 0 for e in entries]
        sign = 1 if math.fsum(votes) >= 0 else -1
        agreeing = [w * e for w, e in zip(weights, entries, strict=True) if e * sign > 0]
        expected = sum(agreeing) / len(agreeing) if agreeing else 0.0
        assert float(merged[place]) == pytest.approx(expected, abs=1e-6)


def test_a_draw_is_positive() -> None:
    merged = sum_of_agreeing([torch.tensor([2.0]), torch.tensor([-2.0])], [1.0, 1.0])
    assert merged.item() == 2.0
