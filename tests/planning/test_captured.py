from __future__ import annotations

import numpy as np
import pytest

from smartinit.errors import ConfigError
from smartinit.planning.captured import captured_ranks, short_targets
from smartinit.planning.limits import Limits

RATIOS = {"steep": [0.7, 0.2, 0.05, 0.01], "flat": [0.1] * 10, "none": [0.0, 0.0], "short": [0.3, 0.2]}
COSTS = dict.fromkeys(RATIOS, 10)


def smallest(shares, captured):
    """Count up until it is enough."""
    total, k = 0.0, 0
    while k < len(shares) and total < captured - 1e-9:
        total += shares[k]
        k += 1
    return k


@pytest.mark.parametrize("captured", [0.01, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0])
def test_the_smallest_rank_that_is_enough(captured):
    expected = {name: 0 if name == "none" else smallest(shares, captured) for name, shares in RATIOS.items()}
    assert captured_ranks(RATIOS, captured, COSTS) == expected


def test_random_spectra(seed):
    random = np.random.default_rng(seed)
    for _ in range(50):
        shares = np.sort(random.dirichlet(np.ones(random.integers(1, 40)) * 0.3))[::-1]
        captured = random.uniform(0.01, 1.0)
        assert captured_ranks({"x": shares}, captured, {"x": 1})["x"] == max(1, smallest(shares, captured))


def test_limits_are_kept():
    found = captured_ranks(RATIOS, 0.9, COSTS, Limits(multiple_of=2, min_rank=1, max_rank=7))
    assert found == {"steep": 2, "flat": 6, "none": 2, "short": 2}
    with pytest.raises(ConfigError, match="above the most that 'none' can hold"):
        captured_ranks(RATIOS, 0.9, COSTS, Limits(min_rank=3))


def test_those_that_fall_short_are_named():
    ranks = captured_ranks(RATIOS, 0.9, COSTS, Limits(max_rank=8))
    assert short_targets(RATIOS, 0.9, ranks) == pytest.approx({"flat": 0.8, "short": 0.5})
    assert short_targets(RATIOS, 0.5, captured_ranks(RATIOS, 0.5, COSTS)) == {}


def test_a_budget_goes_to_the_best_of_them():
    free = captured_ranks(RATIOS, 0.9, COSTS)
    assert captured_ranks(RATIOS, 0.9, COSTS, Limits(budget=sum(free.values()))) == free
    assert captured_ranks(RATIOS, 0.9, COSTS, Limits(budget=4)) == {"steep": 2, "flat": 0, "none": 0, "short": 2}
    tight = captured_ranks(RATIOS, 0.9, COSTS, Limits(params=50))
    assert tight == {"steep": 2, "flat": 1, "none": 0, "short": 2}
    assert all(tight[name] <= free[name] for name in free)


@pytest.mark.parametrize("captured", [0.0, -0.1, 1.1, float("nan")])
def test_shares_that_cannot_be(captured):
    with pytest.raises(ConfigError, match="above 0, at most 1"):
        captured_ranks(RATIOS, captured, COSTS)
