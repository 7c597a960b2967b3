from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from smartinit.errors import ConfigError, ModelError
from smartinit.methods import available_methods
from smartinit.methods.pissa import Pissa
from smartinit.targets.weight import Target

_SPEC = importlib.util.spec_from_file_location(
    "weight_splits", Path(__file__).parents[1] / "oracles" / "weight_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


def start(method, weight, rank, scaling, seed=0, limit=None):
    spectrum = method.spectrum(weight, None, limit or rank, tuple(weight.shape), seed=seed)
    return method.factors(spectrum, rank, scaling)


def peft_layer(linear, **config):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(target_modules=["0"], **config))
    return model.base_model.model[0]


def test_it_is_registered():
    assert available_methods()["pissa"] is Pissa


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (360, 400)])
@pytest.mark.parametrize(("rank", "scaling"), [(4, 1.0), (8, 2.0), (8, 0.25)])
def test_the_adapter_is_the_principal_part(dtype, shape, rank, scaling, seed):
    weight = oracle.decaying_weight(*shape, seed=seed).to(dtype)
    before = weight.clone()
    factors = start(Pissa(), weight, rank, scaling, seed, limit=12)
    assert factors.effect == "splits"
    assert factors.a.dtype == factors.b.dtype == torch.float32
    assert oracle.relative_error(factors.delta(scaling), oracle.product_of_top_triplets(weight, rank)) < 1e-5
    # B and A share sigma evenly
    assert torch.allclose(factors.a.norm(dim=1), factors.b.norm(dim=0), rtol=1e-4)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_full_rank_is_the_whole_weight(shape, seed):
    weight = oracle.decaying_weight(*shape, seed=seed).float()
    factors = start(Pissa(), weight, 24, 0.5)
    assert oracle.relative_error(factors.delta(0.5), weight.numpy()) < 1e-5
    assert start(Pissa(), weight, 0, 0.5, limit=3).a.shape == (0, shape[1])


def test_values_are_energies_and_ratios_are_shares_of_the_whole(seed):
    weight = oracle.decaying_weight(360, 400, seed=seed).float()
    spectrum = Pissa().spectrum(weight, None, 16, (360, 400), seed=seed)
    sigma = torch.linalg.svdvals(weight.double())
    assert torch.allclose(spectrum.values, sigma[:16] ** 2, rtol=1e-5)
    assert torch.allclose(spectrum.ratios, sigma[:16] ** 2 / (sigma**2).sum(), rtol=1e-5)
    assert spectrum.certificate.captured == pytest.approx(float(spectrum.ratios.sum()))
    assert spectrum.certificate.settled
    assert spectrum.certificate.residual < 1e-4


def test_a_weight_without_gaps_has_the_right_energy(seed):
    weight = torch.linalg.qr(torch.randn(340, 340, generator=torch.Generator().manual_seed(seed))).Q
    delta = start(Pissa(), weight, 8, 1.0).delta(1.0)
    assert float(delta.norm() ** 2) == pytest.approx(8, rel=1e-3)
    assert float((weight - delta).norm() ** 2) == pytest.approx(332, rel=1e-3)


def test_several_layers_at_once_are_each_what_they_are_alone(seed):
    weights = [
        oracle.decaying_weight(360, 340, decay=d, seed=seed).to(t)
        for d, t in ((0.3, torch.float32), (1.0, torch.bfloat16), (0.6, torch.float64))
    ]
    method = Pissa()
    together = method.spectra(weights, [None] * 3, 8, (360, 340), seeds=[1, 2, 3])
    for weight, spectrum in zip(weights, together, strict=True):
        delta = method.factors(spectrum, 8, 1.0).delta(1.0)
        assert oracle.relative_error(delta, oracle.product_of_top_triplets(weight, 8)) < 1e-5


def test_stacks_are_bounded_and_complete(seed, monkeypatch):
    from smartinit.methods import split

    monkeypatch.setattr(split, "_STACK_BYTES", 2 * 24 * 30 * 4)
    weights = [oracle.decaying_weight(24, 30, seed=seed + i).float() for i in range(5)]
    spectra = Pissa().spectra(weights, [None] * 5, 4, (24, 30), seeds=range(5))
    for weight, spectrum in zip(weights, spectra, strict=True):
        assert torch.allclose(spectrum.values.sqrt(), torch.linalg.svdvals(weight.double())[:4], rtol=1e-5)


def test_zero_weights_start_at_zero():
    spectrum = Pissa().spectrum(torch.zeros(400, 350), None, 8, (400, 350))
    assert spectrum.total == 0
    assert not spectrum.ratios.any()
    factors = Pissa().factors(spectrum, 8, 1.0)
    assert not factors.a.any()
    assert not factors.b.any()


@pytest.mark.parametrize("kind", ["duplicated", "constant", "zero"])
def test_weights_with_degenerate_columns(kind, seed):
    weight = oracle.decaying_weight(360, 400, seed=seed).float()
    weight[:, 100:300] = {"duplicated": weight[:, :1], "constant": torch.tensor(0.01), "zero": torch.tensor(0.0)}[kind]
    factors = start(Pissa(), weight, 8, 2.0)
    assert oracle.relative_error(factors.delta(2.0), oracle.product_of_top_triplets(weight, 8)) < 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(bad):
    weight = torch.zeros(24, 30)
    weight[3, 4] = bad
    with pytest.raises(ModelError, match=r"'pissa'.*\(24, 30\).*NaN or Inf"):
        Pissa().spectrum(weight, None, 4, (24, 30))


def test_what_cannot_be_is_refused():
    weight = torch.randn(24, 30)
    spectrum = Pissa().spectrum(weight, None, 4, (24, 30))
    with pytest.raises(ConfigError, match="rank 5"):
        Pissa().factors(spectrum, 5, 1.0)
    with pytest.raises(ConfigError, match="s > 0"):
        Pissa().factors(spectrum, 4, 0.0)
    with pytest.raises(ConfigError, match="got none"):
        Pissa().spectrum(None, None, 4, (24, 30))
    with pytest.raises(ConfigError, match="expected"):
        Pissa().spectrum(weight, None, 4, (30, 24))
    with pytest.raises(ModelError, match="meta"):
        Pissa().spectrum(torch.empty(24, 30, device="meta"), None, 4, (24, 30))
    with pytest.raises(ModelError, match="int8"):
        Pissa().spectrum(torch.zeros(24, 30, dtype=torch.int8), None, 4, (24, 30))
    for options in ({"iterations": -1}, {"oversampling": -1}, {"tolerance": 0.0}):
        with pytest.raises(ConfigError):
            Pissa(**options)


def test_it_agrees_with_peft(seed):
    weight = oracle.decaying_weight(32, 48, seed=seed).float()
    linear = nn.Linear(48, 32, bias=False)
    linear.weight.data = weight.clone()
    layer = peft_layer(linear, r=6, lora_alpha=12, init_lora_weights="pissa")
    factors = start(Pissa(), weight, 6, 2.0)
    theirs = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert oracle.relative_error(factors.b @ factors.a, theirs.detach().numpy()) < 1e-4
    assert torch.allclose(weight - factors.delta(2.0), layer.get_base_layer().weight, atol=1e-5)


def test_defect_13_pissa_in_bf16_subtracts_the_rounded_factors(seed):
    """The residual is taken from the factors as they will be used, so that only one rounding is left."""
    weight = oracle.decaying_weight(64, 96, seed=seed).to(torch.bfloat16)

    def start_error(base, a, b):
        return float((base.double() + 2.0 * b.double() @ a.double() - weight.double()).norm() / weight.double().norm())

    linear = nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    linear.weight.data = weight.clone()
    factors = start(Pissa(), weight, 16, 2.0)
    a, b = factors.a.bfloat16(), factors.b.bfloat16()
    Target.of(linear, "0").subtract_(2.0 * b.float() @ a.float())
    ours = start_error(linear.weight.data, a, b)

    other = nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    other.weight.data = weight.clone()
    layer = peft_layer(other, r=16, lora_alpha=32, init_lora_weights="pissa")
    theirs = start_error(
        layer.get_base_layer().weight.data,
        layer.lora_A["default"].weight.data.bfloat16(),
        layer.lora_B["default"].weight.data.bfloat16(),
    )
    assert ours < 0.9 * theirs


def test_defect_15_n_iterations_give_the_same_residual_on_reload(seed):
    weight = oracle.decaying_weight(400, 360, decay=0.3, seed=seed).float()
    method = Pissa(iterations=4)
    first = start(method, weight, 8, 1.0, seed)
    torch.manual_seed(seed + 1)  # whatever the process did in between
    torch.rand(3)
    again = start(method, weight, 8, 1.0, seed)
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)


def test_defect_15_n_iterations_are_oversampled(seed):
    weight = oracle.decaying_weight(400, 360, decay=0.3, seed=seed).float()
    best = oracle.product_of_top_triplets(weight, 8)
    ours = start(Pissa(iterations=4), weight, 8, 1.0, seed).delta(1.0)
    linear = nn.Linear(360, 400, bias=False)
    linear.weight.data = weight.clone()
    layer = peft_layer(linear, r=8, lora_alpha=8, init_lora_weights="pissa_niter_4")
    theirs = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    assert oracle.relative_error(ours, best) < oracle.relative_error(theirs, best) / 10
