from __future__ import annotations

import pytest
import torch

from smartinit.methods.gaussian import Gaussian


@pytest.mark.parametrize("rank", [1, 4, 32])
def test_the_deviation_is_one_over_the_rank(rank, seed):
    found = Gaussian().spectrum(None, None, 32, (20, 3000), seed=seed)
    factors = Gaussian().factors(found, rank, 2.0)
    assert float(factors.a.std()) * rank == pytest.approx(1.0, rel=0.07)
    assert float(factors.a.mean()) * rank == pytest.approx(0.0, abs=5 / (rank * 3000) ** 0.5)
    assert (factors.a.double() * rank).pow(4).mean() == pytest.approx(3.0, rel=0.25)  # normal, not uniform
    assert not factors.b.any()
    assert factors.effect == "keeps"


def test_the_deviation_is_that_of_peft(seed):
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=8, target_modules=["0"], init_lora_weights="gaussian")
    layer = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(3000, 20)), config).base_model.model[0]
    found = Gaussian().factors(Gaussian().spectrum(None, None, 8, (20, 3000), seed=seed), 8, 1.0)
    assert float(found.a.std()) == pytest.approx(float(layer.lora_A["default"].weight.detach().std()), rel=0.05)
