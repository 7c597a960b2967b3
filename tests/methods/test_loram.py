from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from smartinit.errors import ConfigError, ModelError
from smartinit.methods.kaiming import Kaiming
from smartinit.methods.loram import Loram, sines

_SPEC = importlib.util.spec_from_file_location(
    "simple_starts", Path(__file__).parents[1] / "oracles" / "simple_starts.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


@pytest.fixture
def weight(seed):
    return torch.randn(48, 70, generator=torch.Generator().manual_seed(seed)) * 0.05


def start(weight, rank, scaling, limit=None):
    spectrum = Loram().spectrum(weight, None, limit or rank, tuple(weight.shape))
    return Loram().factors(spectrum, rank, scaling)


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("rank", [2, 8, 48])
def test_the_product_is_that_of_the_paper_at_any_scaling(weight, rank, scaling):
    found = start(weight, rank, scaling, limit=48)
    expected = oracle.loram_product(weight.double().numpy(), rank)
    error = np.linalg.norm(found.delta(scaling).double().numpy() - expected) / np.linalg.norm(expected)
    assert error < 1e-6
    assert found.effect == "splits"
    # A and B share the magnitude (eq. 11: both are β Φ).
    norms = [float(torch.linalg.matrix_norm(matrix.double(), 2)) for matrix in (found.a, found.b)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize("width", [1, 2, 7, 33, 100])
def test_sines_are_those_of_equation_12(width):
    expected = oracle.sine_basis(width).T
    assert np.abs(sines(width, width).double().numpy() - expected).max() < 1e-7
    assert np.abs(expected @ expected.T - np.eye(width)).max() < 1e-12


def test_large_angles_keep_their_digits():
    rows = sines(4000, 5000)[-64:].double()
    assert (rows @ rows.mT - torch.eye(64)).abs().max() < 1e-6


def test_rank_1_is_not_dead(weight):
    """The paper's log(1) = 0 would give two zero matrices."""
    found = start(weight, 1, 1.0)
    expected = weight.norm() / 48**0.5
    assert float(found.delta(1.0).norm()) == pytest.approx(float(expected), rel=1e-5)
    assert float(found.delta(1.0).norm()) < float(start(weight, 2, 1.0).delta(1.0).norm())
    assert torch.isfinite(start(torch.ones(1, 5), 1, 1.0).a).all()


def test_the_magnitude_is_close_to_that_of_pissa(weight):
    """What the method is for: the product's norm is PiSSA's, give or take."""
    singular = torch.linalg.svdvals(weight.double())
    for rank in (4, 16):
        pissa = singular[:rank].square().sum().sqrt()
        assert 0.5 < float(start(weight, rank, 1.0).delta(1.0).norm() / pissa) < 2


def test_half_precision_weights_do_not_overflow():
    weight = torch.full((512, 512), 300.0, dtype=torch.float16)
    found = start(weight, 4, 1.0)
    assert torch.isfinite(found.a).all()
    assert found.a.dtype == torch.float32


def test_the_start_is_nested_and_needs_no_seed(weight):
    several = Loram().spectrum(weight, None, 20, (48, 70), seed=1)
    assert torch.equal(
        Loram().factors(several, 8, 1.0).a,
        Loram().factors(Loram().spectrum(weight, None, 8, (48, 70), seed=2), 8, 1.0).a,
    )
    empty = Loram().factors(several, 0, 1.0)
    assert (empty.a.shape, empty.b.shape) == ((0, 70), (48, 0))


@pytest.mark.parametrize(
    ("weight", "message"),
    [(torch.zeros(4, 4), "is zero"), (torch.tensor([[1.0, float("nan")]] * 2), "holds NaN or Inf")],
)
def test_weights_without_a_magnitude(weight, message):
    with pytest.raises(ModelError, match=message):
        start(weight, 1, 1.0)


def test_refusals(weight):
    with pytest.raises(ConfigError, match="needs the base weight"):
        Loram().spectrum(None, None, 2, (4, 4))
    with pytest.raises(ConfigError, match="rank 9 needs"):
        start(weight, 9, 1.0, limit=8)
    with pytest.raises(ConfigError, match="positive"):
        start(weight, 4, 0.0)
    with pytest.raises(ConfigError, match="no left side"):
        Loram().factors(Kaiming().spectrum(None, None, 4, (48, 70)), 4, 1.0)
