"""LoRA-GA as published, against the formula in float64; and PEFT's own under its flag."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from smartinit.config import LoraConfig
from smartinit.errors import ConfigError, DataError
from smartinit.gradients import collect_gradients
from smartinit.methods import available_methods
from smartinit.methods.lora_ga import LoraGa
from smartinit.statistics.gradient import GradientSketch
from smartinit.targets.select import select_targets
from tests.oracles.gradient_splits import lora_ga_product, low_rank, mean_gradients, rows_with_product, without_signs

VALUES = [4.0, 3.0, 2.2, 1.6, 1.1, 0.8, 0.5, 0.3]


def sketch_of(gradient, components=8, seed=0, passes=1):
    x, delta = rows_with_product(gradient, 300, seed)
    sketch = GradientSketch(*gradient.shape, components, seed=seed)
    for number in range(passes):
        sketch = sketch.refined() if number else sketch
        sketch.update(x.float(), delta.float())
        sketch.close_batch()
    return sketch


def product(factors):
    return factors.b.double() @ factors.a.double()


def relative(found, expected, gradient=None):
    """Of ``B A``; with the gradient: up to the signs of its triplets."""
    if gradient is not None:
        found, expected = without_signs(found, gradient), without_signs(expected, gradient)
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


@pytest.mark.parametrize("shape", [(160, 224), (224, 160), (24, 40)])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("direction", "first"), [("ArB2r", "a"), ("A2rBr", "b")])
def test_the_product_is_the_published_one(seed, shape, passes, direction, first):
    gradient = low_rank(*shape, VALUES, seed)
    spectrum = LoraGa(direction=direction).spectrum(None, sketch_of(gradient, passes=passes, seed=seed), 4, shape)
    assert len(spectrum) == 4
    for rank in (1, 2, 4):
        factors = LoraGa(direction=direction).factors(spectrum, rank, scaling=2.0)
        assert relative(product(factors), lora_ga_product(gradient, rank, first=first), gradient) <= 1e-5
        assert factors.effect == "splits"
        assert (factors.a.shape, factors.b.shape) == ((rank, shape[1]), (shape[0], rank))
        assert factors.a.dtype == factors.b.dtype == torch.float32


def test_the_first_gradients_of_a_and_b_hold_the_best_2r_directions(seed):
    """Theorem 3.1: what the first step can do, ``B ∂A + ∂B A``, is all that any 2r directions hold of the gradient."""
    gradient = low_rank(60, 50, VALUES, seed)
    factors = LoraGa(scale="unit").factors(LoraGa().spectrum(None, sketch_of(gradient), 3, (60, 50)), 3, 1.0)
    a, b = factors.a.double(), factors.b.double()
    step = b @ (b.T @ gradient) + (gradient @ a.T) @ a
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    assert relative(step, (u[:, :6] * s[:6]) @ v[:6]) <= 1e-5


def test_scales(seed):
    gradient = low_rank(60, 50, VALUES, seed)
    weight = torch.randn(60, 50, generator=torch.Generator().manual_seed(seed))
    sketch = sketch_of(gradient)

    def sizes(**options):
        method = LoraGa(**options)
        spectrum = method.spectrum(weight if method.needs_weight else None, sketch, 4, (60, 50))
        factors = method.factors(spectrum, 3, 0.5)
        a, b = factors.a.double().norm(dim=1), factors.b.double().norm(dim=0)
        assert torch.allclose(a, a[0].expand(3), rtol=1e-5)
        assert torch.allclose(b, a, rtol=1e-5)
        return float(a[0])

    assert sizes() == pytest.approx(60**0.25 / 4, rel=1e-5)
    assert sizes(stable_gamma=64) == pytest.approx(60**0.25 / 8, rel=1e-5)
    assert sizes(scale="unit") == pytest.approx(1.0, rel=1e-5)
    assert sizes(scale="gd_scale") == pytest.approx(2.0, rel=1e-5)
    largest = torch.linalg.svdvals(weight.double())[:3]
    assert sizes(scale="weight_svd") == pytest.approx(float((largest / 0.5).sqrt().mean()), rel=1e-5)


def test_alternating_and_random_directions_are_halves_of_the_leading_2r(seed):
    gradient = low_rank(60, 50, VALUES, seed)
    u, _, v = torch.linalg.svd(gradient)
    spectrum = LoraGa().spectrum(None, sketch_of(gradient), 4, (60, 50))
    factors = LoraGa(direction="ArBr", scale="unit").factors(spectrum, 3, 1.0)
    assert relative(product(factors), u[:, [0, 2, 4]] @ v[[1, 3, 5]], gradient) <= 1e-5
    factors = LoraGa(direction="random", scale="unit").factors(spectrum, 3, 1.0)
    used_a = (factors.a.double() @ v.T).abs()[:, :6] > 0.5
    used_b = (factors.b.double().T @ u).abs()[:, :6] > 0.5
    assert sorted([*used_a.nonzero()[:, 1].tolist(), *used_b.nonzero()[:, 1].tolist()]) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_ranks_beyond_half_of_the_smaller_side_share_as_few_triplets_as_possible(seed, direction):
    gradient = low_rank(40, 10, [1.0 / (i + 1) for i in range(10)], seed)
    spectrum = LoraGa().spectrum(None, sketch_of(gradient, 10), 10, (40, 10))
    for rank in (7, 10):
        factors = LoraGa(direction=direction, scale="unit").factors(spectrum, rank, 1.0)
        identity = torch.eye(rank)
        assert torch.allclose(factors.a @ factors.a.T, identity, atol=1e-5)
        assert torch.allclose(factors.b.T @ factors.b, identity, atol=1e-5)
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        in_a = (factors.a.double() @ v.T).abs().gt(0.5).any(0)
        in_b = (factors.b.double().T @ u).abs().gt(0.5).any(0)
        assert int((in_a & in_b).sum()) == 2 * rank - 10


def test_truncating_a_spectrum_leaves_what_2r_needs(seed):
    gradient = low_rank(60, 50, VALUES, seed)
    spectrum = LoraGa().spectrum(None, sketch_of(gradient), 4, (60, 50))
    whole = LoraGa().factors(spectrum, 3, 1.0)
    cut = LoraGa().factors(spectrum.truncate(3), 3, 1.0)
    assert torch.equal(whole.a, cut.a)
    assert torch.equal(whole.b, cut.b)
    with pytest.raises(ConfigError, match=r"asked for rank 4 .* with 3 candidate directions"):
        LoraGa().factors(spectrum.truncate(3), 4, 1.0)


def test_rank_zero_and_what_cannot_be(seed):
    gradient = low_rank(60, 50, VALUES, seed)
    spectrum = LoraGa().spectrum(None, sketch_of(gradient), 4, (60, 50))
    empty = LoraGa().factors(spectrum, 0, 1.0)
    assert (empty.a.shape, empty.b.shape) == ((0, 50), (60, 0))
    for options, message in (
        ({"direction": "AB"}, "direction is one of"),
        ({"scale": "stabel"}, "scale is one of"),
        ({"stable_gamma": 0}, "stable_gamma is a positive number"),
    ):
        with pytest.raises(ConfigError, match=message):
            LoraGa(**options)
    with pytest.raises(ConfigError, match="starts from gradients: pass a data loader"):
        LoraGa().spectrum(None, None, 4, (60, 50))
    with pytest.raises(ConfigError, match=r"gradient of a .* weight for a layer of shape"):
        LoraGa().spectrum(None, sketch_of(gradient), 4, (50, 60))
    with pytest.raises(ConfigError, match="needs s > 0"):
        LoraGa().factors(spectrum, 2, 0.0)
    with pytest.raises(ConfigError, match="computed without the weight"):
        LoraGa(scale="weight_svd").factors(spectrum, 2, 1.0)
    with pytest.raises(ConfigError, match="needs the base weight"):
        LoraGa(scale="weight_svd").spectrum(None, sketch_of(gradient), 4, (60, 50))
    with pytest.raises(DataError, match="is zero in all 1 batches"):
        LoraGa().spectrum(None, sketch_of(gradient * 0), 4, (60, 50))
    assert available_methods()["lora_ga"] is LoraGa


def peft_product(peft, model, batches, config):
    """``B A`` by layer, as PEFT leaves it, and the base weights that it leaves."""
    from peft.tuners.lora import preprocess_loraga

    model = copy.deepcopy(model)

    def train_step():
        for batch in batches:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    model = peft.get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model."): (
            module.lora_B["default"].weight.detach().double() @ module.lora_A["default"].weight.detach().double(),
            module.scaling["default"],
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def language_batches():
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 64, (3, 9), generator=generator) for _ in range(2)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # theirs
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_defect_23_lora_ga_of_peft_is_an_option(tiny_llama, direction, scale):
    peft = pytest.importorskip("peft")
    model, batches = tiny_llama(), language_batches()
    config = peft.LoraConfig(
        r=8,  # with 4r = 32 directions their randomised SVD is exact
        lora_alpha=16,
        target_modules=["q_proj", "down_proj"],
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction=direction, scale=scale, stable_gamma=9),
    )
    theirs = peft_product(peft, model, batches, config)
    targets = select_targets(model, LoraConfig(target_modules=["q_proj", "down_proj"]))
    collected = collect_gradients(model, targets, batches, {t.name: 8 for t in targets}, show_progress_bar=False)
    gradients = mean_gradients(model, batches, lambda m, b: m(**b).loss)
    compatible = LoraGa(direction=direction, scale=scale, stable_gamma=9, peft_compatible=True)
    published = LoraGa(direction=direction, scale=scale, stable_gamma=9)
    for target in targets:
        expected, scaling = theirs[target.name]
        gradient = gradients[f"{target.name}.weight"]
        assert scaling == 2.0
        spectrum = compatible.spectrum(target.weight(), collected.sketches[target.name], 8, target.shape)
        ours = product(compatible.factors(spectrum, 8, scaling))
        # Their largest singular value of the weight is an estimate, from as many directions as the rank.
        assert relative(ours, expected, gradient) <= (2e-2 if scale == "weight_svd" else 1e-3), target.name
        # What is published knows no singular values.
        spectrum = published.spectrum(target.weight(), collected.sketches[target.name], 8, target.shape)
        found = published.factors(spectrum, 8, scaling)
        assert relative(product(found), expected, gradient) > 0.1
        if scale == "stable" and direction == "ArB2r":
            assert relative(product(found), lora_ga_product(gradient, 8, gamma=9), gradient) <= 1e-4


def test_a_conv1d_is_its_transpose(seed):
    from transformers.pytorch_utils import Conv1D

    linear = nn.Linear(6, 9)
    conv = Conv1D(9, 6)
    conv.weight.data, conv.bias.data = linear.weight.data.T.clone(), linear.bias.data.clone()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed))
    products = []
    for module in (linear, conv):
        model = nn.Sequential(module)
        targets = select_targets(model, LoraConfig(target_modules=["0"]))
        collected = collect_gradients(
            model,
            targets,
            [x],
            {"0": 2},
            forward_fn=lambda m, b: m(b),
            loss_fn=lambda output, _batch: output.tanh().square().sum(),
            show_progress_bar=False,
        )
        method = LoraGa()
        products.append(product(method.factors(method.spectrum(None, collected.sketches["0"], 2, (9, 6)), 2, 1.0)))
    assert torch.allclose(*products, atol=1e-5)
