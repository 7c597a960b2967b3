"""LoRA-One against the formula in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from smartinit.config import LoraConfig
from smartinit.errors import ConfigError, DataError
from smartinit.gradients import collect_gradients
from smartinit.methods import available_methods
from smartinit.methods.lora_one import LoraOne
from smartinit.statistics.gradient import GradientSketch
from smartinit.targets.select import select_targets
from tests.oracles.gradient_splits import lora_one_product, low_rank, rows_with_product

VALUES = [4.0, 3.0, 2.2, 1.6, 1.1, 0.8, 0.5, 0.3]


def sketch_of(gradient, components=8, seed=0, passes=1):
    x, delta = rows_with_product(gradient, 300, seed)
    sketch = GradientSketch(*gradient.shape, components, seed=seed)
    for number in range(passes):
        sketch = sketch.refined() if number else sketch
        sketch.update(x.float(), delta.float())
        sketch.close_batch()
    return sketch


@pytest.mark.parametrize("shape", [(160, 224), (224, 160), (24, 40)])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("gamma", [128, 16.0])
def test_the_product_is_the_published_one(seed, shape, passes, normalise, gamma):
    gradient = low_rank(*shape, VALUES, seed)
    method = LoraOne(stable_gamma=gamma, normalise=normalise)
    spectrum = method.spectrum(None, sketch_of(gradient, seed=seed, passes=passes), 4, shape)
    for rank in (1, 3, 4):
        factors = method.factors(spectrum, rank, scaling=2.0)
        expected = lora_one_product(gradient, rank, gamma, normalise=normalise)
        found = factors.b.double() @ factors.a.double()
        assert torch.linalg.norm(found - expected) <= 1e-5 * torch.linalg.norm(expected)
        # Balanced, as the analysis wants it.
        assert torch.allclose(factors.a @ factors.a.T, factors.b.T @ factors.b, atol=1e-6)
        assert factors.effect == "shifts"


def test_the_start_lowers_the_loss(tiny_llama):
    model = tiny_llama()
    ids = torch.randint(3, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    targets = select_targets(model, LoraConfig(target_modules="all-linear"))
    collected = collect_gradients(model, targets, [batch], {t.name: 4 for t in targets}, show_progress_bar=False)
    method, moved = LoraOne(), copy.deepcopy(model)
    for target in targets:
        spectrum = method.spectrum(None, collected.sketches[target.name], 4, target.shape)
        moved.get_submodule(target.name).weight.data += method.factors(spectrum, 4, 2.0).delta(2.0)
    with torch.no_grad():
        assert moved(**batch).loss < model(**batch).loss - 1e-3


def test_rank_zero_and_what_cannot_be(seed):
    gradient = low_rank(60, 50, VALUES, seed)
    spectrum = LoraOne().spectrum(None, sketch_of(gradient), 4, (60, 50))
    empty = LoraOne().factors(spectrum, 0, 1.0)
    assert (empty.a.shape, empty.b.shape) == ((0, 50), (60, 0))
    with pytest.raises(ConfigError, match="asked for rank 5"):
        LoraOne().factors(spectrum, 5, 1.0)
    with pytest.raises(ConfigError, match="stable_gamma is a positive number"):
        LoraOne(stable_gamma=-1)
    with pytest.raises(ConfigError, match="starts from gradients: pass a data loader"):
        LoraOne().spectrum(None, None, 4, (60, 50))
    with pytest.raises(DataError, match="is zero in all 1 batches"):
        LoraOne().spectrum(None, sketch_of(gradient * 0), 4, (60, 50))
    assert available_methods()["lora_one"] is LoraOne
