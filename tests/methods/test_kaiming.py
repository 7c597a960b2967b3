from __future__ import annotations

import pytest
import torch

from smartinit.errors import ConfigError
from smartinit.factors import default_factors
from smartinit.methods.gaussian import Gaussian
from smartinit.methods.kaiming import Kaiming, Random

SHAPE = (300, 401)


def spectrum(method, limit, seed, shape=SHAPE):
    return method.spectrum(None, None, limit, shape, seed=seed)


def test_kaiming_is_the_default_of_lora(seed):
    factors = Kaiming().factors(spectrum(Kaiming(), 16, seed), 8, 3.0)
    expected = default_factors(8, 401, 300, seed=seed)
    assert torch.allclose(factors.a, expected.a, rtol=1e-6, atol=0)
    assert torch.equal(factors.b, expected.b)
    assert factors.effect == "keeps"


def test_kaiming_has_the_law_of_nn_linear(seed):
    a = Kaiming().factors(spectrum(Kaiming(), 64, seed), 64, 1.0).a.double() * 401**0.5
    assert a.abs().max() <= 1.0 + 1e-6
    assert a.mean().abs() < 5 * (1 / 3 / a.numel()) ** 0.5
    assert a.square().mean() == pytest.approx(1 / 3, rel=0.03)
    assert a.pow(4).mean() == pytest.approx(1 / 5, rel=0.05)  # uniform, not normal


def test_random_has_the_law_of_nn_linear_on_both_sides(seed):
    found = Random().factors(spectrum(Random(), 300, seed), 16, 1.0)
    assert found.effect == "shifts"
    assert found.b.shape == (300, 16)
    scaled = found.b.double() * 4
    assert scaled.abs().max() <= 1.0 + 1e-6
    assert scaled.square().mean() == pytest.approx(1 / 3, rel=0.06)
    assert found.a.square().mean() == pytest.approx(1 / 3 / 401, rel=0.06)
    assert found.delta(1.0).any()


@pytest.mark.parametrize("method", [Kaiming(embedding=True), Gaussian(embedding=True)])
def test_embeddings_start_as_in_peft(method, seed):
    found = method.factors(spectrum(method, 32, seed), 32, 1.0)
    assert not found.a.any()
    assert found.b.square().mean() == pytest.approx(1.0, rel=0.06)
    both = Random(embedding=True).factors(spectrum(Random(embedding=True), 32, seed), 32, 1.0)
    assert both.a.square().mean() == pytest.approx(1.0, rel=0.06)
    assert both.b.square().mean() == pytest.approx(1.0, rel=0.06)


def test_the_laws_are_those_of_peft(seed):
    """Deviations of every entry, over all of PEFT's layers of one model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(
        torch.nn.ModuleDict({"layer": torch.nn.Linear(401, 300), "table": torch.nn.Embedding(401, 300)}),
        peft.LoraConfig(r=16, target_modules=["layer", "table"], init_lora_weights=False),
    ).base_model.model
    layer, table = wrapped["layer"], wrapped["table"]
    theirs = {
        "linear": (layer.lora_A["default"].weight, layer.lora_B["default"].weight),
        "embedding": (table.lora_embedding_A["default"], table.lora_embedding_B["default"]),
    }
    for kind, method in (("linear", Random()), ("embedding", Random(embedding=True))):
        found = method.factors(spectrum(method, 16, seed), 16, 1.0)
        for ours, peers in zip((found.a, found.b), theirs[kind], strict=True):
            assert ours.shape == peers.shape
            assert float(ours.std()) == pytest.approx(float(peers.detach().std()), rel=0.1)


@pytest.mark.parametrize("method", [Kaiming(), Random(), Gaussian(), Gaussian(embedding=True)])
def test_spectra_are_nested_deterministic_and_of_the_seed(method, seed):
    many, few = spectrum(method, 64, seed), spectrum(method, 7, seed)
    assert torch.equal(many.directions[:7], few.directions)
    if few.left is not None:
        assert torch.equal(many.left[:, :7], few.left)
    assert torch.equal(method.factors(many, 5, 1.0).a, method.factors(few, 5, 2.0).a)
    other = method.factors(spectrum(method, 7, seed + 10), 7, 1.0)
    again = method.factors(few, 7, 1.0)
    assert not (torch.equal(other.a, again.a) and torch.equal(other.b, again.b))
    empty = method.factors(few, 0, 1.0)
    assert (empty.a.shape, empty.b.shape) == ((0, 401), (300, 0))
    assert many.ratios.sum() == pytest.approx(64 / 401)


@pytest.mark.parametrize("method", [Kaiming(), Random(), Gaussian()])
def test_more_ranks_than_directions(method, seed):
    with pytest.raises(ConfigError, match="rank 8 needs as many directions, but the spectrum has 7"):
        method.factors(spectrum(method, 7, seed), 8, 1.0)


def test_random_refuses_the_spectrum_of_another_method(seed):
    with pytest.raises(ConfigError, match="no left side"):
        Random().factors(spectrum(Kaiming(), 4, seed), 4, 1.0)
