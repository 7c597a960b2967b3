from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from smartinit.errors import ConfigError
from smartinit.methods.kaiming import Kaiming
from smartinit.methods.orthogonal import Orthogonal

_SPEC = importlib.util.spec_from_file_location(
    "simple_starts", Path(__file__).parents[1] / "oracles" / "simple_starts.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

SHAPE = (90, 700)


def start(rank, seed, limit=32, **options):
    method = Orthogonal(**options)
    return method.factors(method.spectrum(None, None, limit, SHAPE, seed=seed), rank, 2.0)


@pytest.mark.parametrize("rank", [1, 2, 5, 8, 31, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_zero_at_any_rank_in_any_precision(rank, dtype, seed):
    found = start(rank, seed)
    assert found.effect == "keeps"
    a, b = found.a.to(dtype).double(), found.b.to(dtype).double()
    assert (a != 0).all()
    assert bool((b != 0).any()) == (rank > 1)
    assert (b @ a).abs().max() <= 1e-15 * b.abs().sum(1).max() * a.abs().max()


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_both_matrices_span_half_of_the_ranks(rank, seed):
    found = start(rank, seed)
    assert torch.linalg.matrix_rank(found.a.double()) == rank // 2
    assert torch.linalg.matrix_rank(found.b.double()) == rank // 2


def test_entries_have_the_variance_of_pefts(seed):
    found = start(32, seed)
    expected = oracle.orthogonal_variance(32, 200, seed=seed)
    assert float(found.a.square().mean()) == pytest.approx(expected, rel=0.05)
    assert float(found.b.square().mean()) == pytest.approx(expected, rel=0.1)
    assert float(start(32, seed, deviation=0.2).a.square().mean()) == pytest.approx(4 * expected, rel=0.05)


def test_peft_agrees_on_the_variance(seed):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=32, target_modules=["0"], init_lora_weights="orthogonal")
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(700, 90)), config).base_model.model[0]
    for theirs, ours in ((layer.lora_A, start(32, seed).a), (layer.lora_B, start(32, seed).b)):
        assert float(ours.std()) == pytest.approx(float(theirs["default"].weight.detach().std()), rel=0.1)


def test_the_ranks_work_together_after_one_step(seed):
    """With both matrices away from zero, one step of descent gives a product of full rank."""
    found = start(8, seed)
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).double()
    a, b = found.a.double(), found.b.double()
    stepped = (b - 0.01 * gradient @ a.mT) @ (a - 0.01 * b.mT @ gradient)
    assert torch.linalg.matrix_rank(stepped, rtol=1e-9) == 8


def test_spectra_are_nested_and_of_the_seed(seed):
    assert torch.equal(start(5, seed, limit=5).a, start(5, seed, limit=32).a)
    assert torch.equal(start(4, seed, limit=5).b, start(5, seed, limit=32).b[:, :4])
    assert not torch.equal(start(4, seed).a, start(4, seed + 10).a)
    assert start(0, seed).b.shape == (90, 0)


@pytest.mark.parametrize("deviation", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deviation_that_cannot_be(deviation):
    with pytest.raises(ConfigError, match="expected a positive number"):
        Orthogonal(deviation=deviation)


def test_refusals(seed):
    with pytest.raises(ConfigError, match="rank 33 needs"):
        start(33, seed)
    with pytest.raises(ConfigError, match="no left side"):
        Orthogonal().factors(Kaiming().spectrum(None, None, 4, SHAPE), 4, 1.0)
