from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest
import torch

import smartinit.methods
from smartinit.errors import ConfigError
from smartinit.methods import available_methods
from smartinit.methods.base import Method
from smartinit.methods.eva import Eva
from smartinit.statistics.gram import GramStatistic


@pytest.fixture
def statistic(seed):
    generator = torch.Generator().manual_seed(seed)
    statistic = GramStatistic(12)
    statistic.update(torch.randn(500, 12, generator=generator) * torch.arange(1, 13))
    return statistic


def test_factors_are_the_leading_directions_and_zeros(statistic):
    spectrum = Eva().spectrum(None, statistic, 6, (20, 12))
    factors = Eva().factors(spectrum, 4, 2.0)
    assert factors.a.shape == (4, 12)
    assert torch.equal(factors.a, statistic.principal(6)[0][:4])
    assert factors.b.shape == (20, 4)
    assert not factors.b.any()
    assert factors.effect == "keeps"
    assert not factors.delta(2.0).any()
    assert 0 < spectrum.ratios.sum() < 1
    empty = Eva().factors(spectrum, 0, 1.0)
    assert (empty.a.shape, empty.b.shape, empty.rank) == ((0, 12), (20, 0), 0)


def test_factors_are_pure(statistic):
    spectrum = Eva(whiten=True).spectrum(None, statistic, 6, (20, 12))
    before = spectrum.directions.clone()
    first = Eva(whiten=True).factors(spectrum, 6, 1.0)
    first.a.zero_()
    second = Eva(whiten=True).factors(spectrum, 6, 1.0)
    assert torch.equal(spectrum.directions, before)
    assert second.a.any()


def test_whitening_divides_by_the_root_of_sigma_as_peft_does(statistic):
    spectrum = Eva().spectrum(None, statistic, 6, (20, 12))
    plain, white = (Eva(whiten=w).factors(spectrum, 6, 1.0).a for w in (False, True))
    sigma = spectrum.values.sqrt()
    assert torch.allclose(white * sigma.sqrt().float().unsqueeze(1), plain, atol=1e-6)


def test_a_direction_without_variance_is_not_divided_by_zero():
    statistic = GramStatistic(4)
    statistic.update(torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]))
    spectrum = Eva(whiten=True).spectrum(None, statistic, 3, (4, 4))
    assert torch.isfinite(Eva(whiten=True).factors(spectrum, 3, 1.0).a).all()


def test_needs_a_statistic():
    with pytest.raises(ConfigError, match="needs activations"):
        Eva().spectrum(None, None, 2, (4, 4))


def test_every_method_file_is_registered():
    folder = Path(smartinit.methods.__file__).parent
    modules = [importlib.import_module(f"smartinit.methods.{p.stem}") for p in folder.glob("*.py")]
    found = {
        thing
        for module in modules
        for thing in vars(module).values()
        # What several methods have in common is abstract, or has no name of its own.
        if inspect.isclass(thing)
        and issubclass(thing, Method)
        and not inspect.isabstract(thing)
        and "name" in vars(thing)
    }
    assert len(found) > 10
    assert found == set(available_methods().values())
    for name, method in available_methods().items():
        assert name == method.name
        assert method.summary
        assert method.source
