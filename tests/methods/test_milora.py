from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from smartinit.errors import ConfigError, ModelError
from smartinit.methods import available_methods
from smartinit.methods.milora import MiLoRA

_SPEC = importlib.util.spec_from_file_location(
    "weight_splits", Path(__file__).parents[1] / "oracles" / "weight_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)


def start(weight, rank, scaling, limit=None):
    return MiLoRA().factors(MiLoRA().spectrum(weight, None, limit or rank, tuple(weight.shape)), rank, scaling)


def noise(out, features, seed):
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed))


def test_it_is_registered():
    assert available_methods()["milora"] is MiLoRA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (360, 340)])
@pytest.mark.parametrize(("rank", "scaling"), [(1, 1.0), (8, 2.0), (24, 0.5)])
def test_the_adapter_is_the_minor_part(dtype, shape, rank, scaling, seed):
    weight = noise(*shape, seed).to(dtype)
    before = weight.clone()
    factors = start(weight, rank, scaling, limit=24)
    assert factors.effect == "splits"
    assert oracle.relative_error(factors.delta(scaling), oracle.product_of_bottom_triplets(weight, rank)) < 1e-5
    assert torch.allclose(factors.a.norm(dim=1), factors.b.norm(dim=0), rtol=1e-4)
    assert torch.equal(weight, before)


def test_what_the_base_keeps_is_the_principal_part(seed):
    weight = noise(24, 40, seed)
    assert (
        oracle.relative_error(weight - start(weight, 8, 1.0).delta(1.0), oracle.product_of_top_triplets(weight, 16))
        < 1e-5
    )


def test_the_smallest_come_first_and_the_total_is_the_whole(seed):
    weight = noise(24, 40, seed)
    spectrum = MiLoRA().spectrum(weight, None, 24, (24, 40))
    sigma = torch.linalg.svdvals(weight.double())
    assert torch.allclose(spectrum.values, sigma.flip(0) ** 2, rtol=1e-5)
    assert spectrum.total == pytest.approx(float((sigma**2).sum()), rel=1e-6)


def test_several_layers_at_once(seed):
    weights = [noise(340, 330, seed + i) for i in range(3)]
    for weight, spectrum in zip(
        weights, MiLoRA().spectra(weights, [None] * 3, 4, (340, 330), seeds=[0, 1, 2]), strict=True
    ):
        delta = MiLoRA().factors(spectrum, 4, 1.0).delta(1.0)
        assert oracle.relative_error(delta, oracle.product_of_bottom_triplets(weight, 4)) < 1e-5


@pytest.mark.parametrize("rank", [0, 5])
def test_rank_deficient_weights_give_almost_nothing(rank, seed):
    weight = noise(24, rank, seed) @ noise(rank, 40, seed + 1)
    factors = start(weight, 8, 1.0)
    assert factors.a.isfinite().all()
    assert factors.delta(1.0).norm() < 1e-5 * max(1.0, float(weight.norm()))


def test_what_cannot_be_is_refused():
    spectrum = MiLoRA().spectrum(torch.randn(24, 30), None, 4, (24, 30))
    with pytest.raises(ConfigError, match="rank 5"):
        MiLoRA().factors(spectrum, 5, 1.0)
    with pytest.raises(ModelError, match=r"'milora'.*NaN"):
        MiLoRA().spectrum(torch.full((24, 30), float("nan")), None, 4, (24, 30))
