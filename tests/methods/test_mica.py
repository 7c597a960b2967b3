from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from smartinit.errors import ConfigError, ModelError
from smartinit.methods import available_methods
from smartinit.methods.mica import Mica

_SPEC = importlib.util.spec_from_file_location(
    "weight_splits", Path(__file__).parents[1] / "oracles" / "weight_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


def start(weight, rank, limit=None):
    return Mica().factors(Mica().spectrum(weight, None, limit or rank, tuple(weight.shape)), rank, 2.0)


def noise(out, features, seed):
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed))


def test_it_is_registered():
    assert available_methods()["mica"] is Mica


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (360, 340), (340, 400)])
@pytest.mark.parametrize("rank", [1, 8, 24])
def test_b_spans_the_minor_left_directions_and_only_a_trains(dtype, shape, rank, seed):
    weight = noise(*shape, seed).to(dtype)
    factors = start(weight, rank, limit=24)
    assert (factors.effect, factors.trains, Mica.trains) == ("keeps", "a", "a")
    assert not factors.a.any()
    assert factors.a.shape == (rank, shape[1])
    b = factors.b.double()
    assert torch.allclose(b.T @ b, torch.eye(rank).double(), atol=1e-5)
    assert oracle.relative_error(b @ b.T, oracle.projector_on_minor_left(weight, rank)) < 1e-4


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [0, 5])
def test_b_is_orthonormal_and_outside_a_deficient_weight(shape, rank, seed):
    weight = noise(shape[0], rank, seed) @ noise(rank, shape[1], seed + 1)
    b = start(weight, 8).b
    assert torch.allclose(b.T @ b, torch.eye(8), atol=1e-5)
    assert (b.T @ weight).norm() < 1e-5 * max(1.0, float(weight.norm()))


def test_it_agrees_with_peft(seed):
    peft = pytest.importorskip("peft")
    linear = nn.Linear(48, 32, bias=False)
    linear.weight.data = noise(32, 48, seed)
    weight = linear.weight.detach().clone()
    config = peft.LoraConfig(target_modules=["0"], r=6, init_lora_weights="mica")
    layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    theirs, ours = layer.lora_B["default"].weight, start(weight, 6).b
    assert torch.allclose(theirs @ theirs.T, ours @ ours.T, atol=1e-3)
    assert not layer.lora_A["default"].weight.any()
    assert not theirs.requires_grad


def test_what_cannot_be_is_refused():
    spectrum = Mica().spectrum(torch.randn(24, 30), None, 4, (24, 30))
    with pytest.raises(ConfigError, match="rank 5"):
        Mica().factors(spectrum, 5, 1.0)
    with pytest.raises(ModelError, match=r"'mica'.*NaN"):
        Mica().spectrum(torch.full((24, 30), float("nan")), None, 4, (24, 30))
