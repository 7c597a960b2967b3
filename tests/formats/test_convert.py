"""The algebra of a conversion against dense products in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smartinit.factors import Factors
from smartinit.formats.convert import distance, first_half, has_product, product_norm, recompress, subtract_start


def random_pair(rank: int, in_features: int, out_features: int, seed: int) -> Factors:
    """A pair with normal entries, in float64."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, in_features, generator=generator, dtype=torch.float64)
    return Factors(a, torch.randn(out_features, rank, generator=generator, dtype=torch.float64))


SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))


@given(SIZES, st.floats(-3, 3))
def test_subtracting_is_what_it_says(sizes: tuple[int, int, int, int, int], ratio: float) -> None:
    rank, other, rows, columns, seed = sizes
    pair, start = random_pair(rank, columns, rows, seed), random_pair(other, columns, rows, seed + 1)
    found = subtract_start(pair, start, ratio)
    assert found.rank == rank + other
    assert torch.allclose(found.b @ found.a, pair.b @ pair.a - ratio * start.b @ start.a, atol=1e-12)
    assert product_norm(pair) == pytest.approx(float((pair.b @ pair.a).norm()), rel=1e-10)
    assert distance(pair, start) == pytest.approx(float((pair.b @ pair.a - start.b @ start.a).norm()), abs=1e-10)


@given(SIZES, st.integers(1, 9))
def test_recompressing_is_the_best_of_its_rank(sizes: tuple[int, int, int, int, int], wanted: int) -> None:
    rank, other, rows, columns, seed = sizes
    pair = subtract_start(random_pair(rank, columns, rows, seed), random_pair(other, columns, rows, seed + 1))
    found = recompress(pair, wanted)
    assert found.rank == min(wanted, pair.rank)
    u, values, vt = torch.linalg.svd(pair.b @ pair.a, full_matrices=False)
    best = (u[:, :wanted] * values[:wanted]) @ vt[:wanted]
    gap = float((found.b @ found.a - pair.b @ pair.a).norm())
    assert gap == pytest.approx(float((best - pair.b @ pair.a).norm()), abs=1e-10)
    if found.rank < pair.rank:
        assert torch.allclose(found.b.norm(dim=0), found.a.norm(dim=1), atol=1e-8), "evenly balanced"


def test_a_half_is_found_again_and_nothing_else_is() -> None:
    pair = random_pair(3, 5, 4, 0)
    doubled = subtract_start(pair, pair)
    half = first_half(doubled)
    assert half is not None
    assert torch.equal(half.a, pair.a)
    assert torch.equal(half.b, pair.b)
    assert first_half(random_pair(4, 5, 4, 1)) is None
    assert first_half(random_pair(3, 5, 4, 1)) is None
    assert first_half(subtract_start(pair, pair, 0.5)) is None


def test_whether_there_is_a_product_at_all() -> None:
    pair = random_pair(3, 5, 4, 0)
    assert has_product(pair)
    assert not has_product(Factors(pair.a, pair.b * 0))
    assert not has_product(Factors(pair.a * 0, pair.b))
