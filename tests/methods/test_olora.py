from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from smartinit.errors import ConfigError, ModelError
from smartinit.methods import available_methods
from smartinit.methods.olora import Olora

_SPEC = importlib.util.spec_from_file_location(
    "weight_splits", Path(__file__).parents[1] / "oracles" / "weight_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


def start(weight, rank, scaling, *, pivoted=False, limit=None):
    method = Olora(pivoted=pivoted)
    return method.factors(method.spectrum(weight, None, limit or rank, tuple(weight.shape)), rank, scaling)


def noise(out, features, seed):
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed))


def peft_layer(module, **config):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(nn.Sequential(module), peft.LoraConfig(target_modules=["0"], **config))
    return model.base_model.model[0]


def test_it_is_registered():
    assert available_methods()["olora"] is Olora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 6, 24])
def test_b_and_a_are_the_leading_part_of_the_decomposition(dtype, shape, rank, seed):
    weight = noise(*shape, seed).to(dtype)
    before = weight.clone()
    factors = start(weight, rank, 2.0, limit=24)
    b, a = oracle.factors_of_qr(weight, rank)
    assert factors.effect == "splits"
    assert np.allclose(factors.b, b, atol=2e-5)
    assert np.allclose(factors.a, a, atol=1e-4)
    assert oracle.relative_error(factors.delta(2.0), 2.0 * b @ a) < 1e-5
    assert torch.equal(weight, before)


@pytest.mark.parametrize("pivoted", [False, True])
def test_values_are_the_energy_that_each_direction_adds(pivoted, seed):
    weight = noise(24, 40, seed)
    spectrum = Olora(pivoted=pivoted).spectrum(weight, None, 24, (24, 40))
    assert float(spectrum.values.sum()) == pytest.approx(spectrum.total, rel=1e-5)
    assert spectrum.total == pytest.approx(float(weight.double().norm()) ** 2, rel=1e-6)
    assert spectrum.certificate.captured == pytest.approx(1.0, rel=1e-5)


def test_the_pivoted_start_does_not_depend_on_the_order_of_features(seed):
    weight = noise(24, 40, seed)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    plain, shuffled = (start(w, 6, 1.0, pivoted=True).delta(1.0) for w in (weight, weight[:, order]))
    assert torch.allclose(plain[:, order], shuffled, atol=1e-5)
    plain, shuffled = (start(w, 6, 1.0).delta(1.0) for w in (weight, weight[:, order]))
    assert not torch.allclose(plain[:, order], shuffled, atol=1e-2), "which the paper's start does"


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("kind", ["zero", "duplicated", "constant", "first columns zero"])
def test_degenerate_weights_keep_b_orthonormal(kind, pivoted, seed):
    weight = noise(24, 40, seed)
    if kind == "zero":
        weight = torch.zeros(24, 40)
    elif kind == "duplicated":
        weight[:, 1:20] = weight[:, :1]
    elif kind == "constant":
        weight = torch.full((24, 40), 3.0)
    else:
        weight[:, :10] = 0
    factors = start(weight, 6, 1.0, pivoted=pivoted)
    assert torch.allclose(factors.b.T @ factors.b, torch.eye(6), atol=1e-5)
    assert torch.allclose(factors.a, factors.b.T @ weight, atol=1e-4)


def test_it_agrees_with_peft(seed):
    weight = noise(32, 48, seed)
    linear = nn.Linear(48, 32, bias=False)
    linear.weight.data = weight.clone()
    layer = peft_layer(linear, r=6, lora_alpha=12, init_lora_weights="olora")
    factors = start(weight, 6, 2.0)
    assert torch.allclose(factors.a, layer.lora_A["default"].weight, atol=1e-4)
    assert torch.allclose(factors.b, layer.lora_B["default"].weight, atol=1e-4)
    assert torch.allclose(weight - factors.delta(2.0), layer.get_base_layer().weight, atol=1e-4)


def test_defect_12_olora_on_conv1d(seed):
    """Conv1D stores W transposed; the factors are those of W, and have A's and B's shapes."""
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    from smartinit.targets.weight import Target

    conv = pytorch_utils.Conv1D(32, 48)  # 48 -> 32
    target = Target.of(conv, "0")
    factors = start(target.weight(), 6, 1.0)
    assert factors.a.shape == (6, 48)
    assert factors.b.shape == (32, 6)
    b, a = oracle.factors_of_qr(conv.weight.T, 6)
    assert oracle.relative_error(factors.delta(1.0), b @ a) < 1e-5
    layer = peft_layer(pytorch_utils.Conv1D(32, 48), r=6, init_lora_weights="olora", fan_in_fan_out=True)
    assert layer.lora_A["default"].weight.shape != (6, 48), "PEFT has been mended: this test can be simplified"


def test_what_cannot_be_is_refused():
    spectrum = Olora().spectrum(torch.randn(24, 30), None, 4, (24, 30))
    with pytest.raises(ConfigError, match="rank 5"):
        Olora().factors(spectrum, 5, 1.0)
    with pytest.raises(ConfigError, match="s > 0"):
        Olora().factors(spectrum, 4, -1.0)
    with pytest.raises(ModelError, match=r"'olora'.*NaN"):
        Olora().spectrum(torch.full((24, 30), float("nan")), None, 4, (24, 30))
