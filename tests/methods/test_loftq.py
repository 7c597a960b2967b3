from __future__ import annotations

import dataclasses

import pytest
import torch

from smartinit.errors import ConfigError, ModelError
from smartinit.linalg.quantisers import Quantiser
from smartinit.methods import available_methods
from smartinit.methods.loftq import Loftq
from smartinit.methods.residual import error_spectra, residual_factors
from tests.oracles import loftq as oracle

SHAPES = {"wide": (48, 80), "tall": (96, 40), "square": (64, 64)}


def weight_of(shape: tuple[int, int], seed: int) -> torch.Tensor:
    """A weight with columns of different sizes, whose quantisation error has some leading directions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * torch.exp(torch.randn(shape[1], generator=generator))


def nf4(weight: torch.Tensor) -> torch.Tensor:
    return oracle.quantise_blocks(weight.float(), oracle.NF4)


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def weight(request, seed):
    return weight_of(request.param, seed)


def start(method: Loftq, weight: torch.Tensor, rank: int, scaling: float = 1.0, limit: int | None = None):
    spectrum = method.spectrum(weight, None, rank if limit is None else limit, tuple(weight.shape))
    return method.factors(spectrum, rank, scaling)


def loss(weight: torch.Tensor, factors, scaling: float) -> float:
    """‖W - Q - s·B A‖_F."""
    return float((weight.double() - factors.base.double() - factors.delta(scaling).double()).norm())


def test_it_is_registered():
    assert available_methods()["loftq"] is Loftq
    assert (Loftq.effect, Loftq.needs, Loftq.needs_weight) == ("quantises", None, True)


def test_one_iteration_is_the_best_correction_of_the_quantised_weight(weight):
    (expected_base, expected_delta), *_ = oracle.loftq(weight, 6, 1, nf4)
    factors = start(Loftq(), weight, 6, scaling=2.0)
    assert factors.effect == "quantises"
    assert factors.a.shape == (6, weight.shape[1])
    assert factors.b.shape == (weight.shape[0], 6)
    torch.testing.assert_close(factors.base.double(), expected_base, rtol=0, atol=1e-5)
    error = (factors.delta(2.0).double() - expected_delta).norm() / expected_delta.norm()
    assert error < 1e-5
    assert factors.a.is_contiguous()  # as safetensors wants them
    assert factors.b.is_contiguous()


@pytest.mark.parametrize("scaling", [0.25, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("iterations", [1, 3])
def test_defect_24_loftq_respects_the_scaling(scaling, iterations, seed):
    """PEFT's factors are the correction itself, so that the layer adds s times too much."""
    weight = weight_of((48, 80), seed)
    method = Loftq(iterations=iterations)
    factors, plain = start(method, weight, 6, scaling), start(method, weight, 6, 1.0)
    torch.testing.assert_close(factors.delta(scaling), plain.delta(1.0), rtol=1e-4, atol=1e-6)
    assert torch.equal(factors.base, plain.base)
    quantised_alone = float((weight - factors.base).norm())
    assert loss(weight, factors, scaling) < 0.95 * quantised_alone
    # The scale is shared evenly, as pairs that train alike.
    torch.testing.assert_close(factors.a.norm(), factors.b.norm(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("iterations", [2, 5])
def test_the_best_iterate_is_kept(weight, iterations):
    iterates = oracle.loftq(weight, 6, iterations, nf4)
    best = min(float((weight.double() - base - delta).norm()) for base, delta in iterates)
    # A number that the round-off moves to the other side of a bound makes another, equally good, sequence.
    assert loss(weight, start(Loftq(iterations=iterations), weight, 6), 1.0) < best * 1.01
    losses = [loss(weight, start(Loftq(iterations=n), weight, 6), 1.0) for n in range(1, iterations + 1)]
    assert losses == sorted(losses, reverse=True)


def test_a_worse_iterate_is_not_taken(seed):
    """With a quantiser that the correction confuses, the alternation goes up; the first iterate must win."""
    weight = weight_of((48, 64), seed)
    quantisers = [("normal", 8), ("uniform", 2), ("bitsandbytes", 2), ("uniform", 4)]
    rose = False
    for name, bits in quantisers:
        method = Loftq(bits, 6, name)
        losses = [loss(weight, start(dataclasses.replace(method, iterations=n), weight, 8), 1.0) for n in range(1, 7)]
        assert losses == sorted(losses, reverse=True)
        rose = rose or losses[-1] == losses[-2]
    assert rose, "no iterate was worse than the one before: this test shows nothing"


def test_ranks_of_one_iteration_are_nested(weight):
    """Q₁ knows no rank, so one spectrum serves all of them; more iterations depend on the rank."""
    assert Loftq().nested
    assert not Loftq(iterations=2).nested
    few, many = start(Loftq(), weight, 4), start(Loftq(), weight, 4, limit=12)
    torch.testing.assert_close(few.delta(1.0), many.delta(1.0), rtol=0, atol=1e-4)
    assert torch.equal(few.base, many.base)


def test_the_start_is_better_than_quantisation_alone_in_every_format(weight):
    for name in ("bitsandbytes", "normal", "uniform"):
        for bits in (2, 4, 8):
            method = Loftq(bits, 2, name)
            factors = start(method, weight, 8, 0.5)
            alone = float((weight - Quantiser(bits, name)(weight)).norm())
            assert loss(weight, factors, 0.5) < alone, (name, bits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype, seed):
    """The base comes in the weight's dtype, and the correction knows of its rounding."""
    weight = weight_of((48, 80), seed).to(dtype)
    before = weight.clone()
    factors = start(Loftq(), weight, 6)
    assert torch.equal(weight, before)
    assert factors.base.dtype == dtype
    assert factors.a.dtype == factors.b.dtype == torch.float32
    best = oracle.best_correction(weight.double() - factors.base.double(), 6)
    assert (factors.delta(1.0).double() - best).norm() / best.norm() < 1e-5


def test_energy_of_a_large_error_is_within_a_thousandth_of_the_best(seed):
    """What NF4 leaves of a large matrix is noise: its leading directions are up to chance, their energy is not."""
    weight = torch.randn(700, 640, generator=torch.Generator().manual_seed(seed)) * 0.02
    factors = start(Loftq(), weight, 16)
    exact = oracle.best_correction(weight - factors.base, 16).square().sum()
    assert factors.delta(1.0).double().square().sum() > (1 - 1e-3) * exact
    # ... and what is added is that part of the error, not something of the same size.
    error = (weight - factors.base).double()
    left = (error - factors.delta(1.0).double()).square().sum()
    torch.testing.assert_close(left, error.square().sum() - exact, rtol=1e-4, atol=0)


def test_layers_of_one_shape_together_are_the_same_as_alone(seed):
    weights = [weight_of((48, 80), seed + i) for i in range(3)]
    method = Loftq(iterations=3)
    together = method.spectra(weights, [None] * 3, 6, (48, 80), seeds=[1, 2, 3])
    for weight, spectrum, s in zip(weights, together, [1, 2, 3], strict=True):
        alone = method.spectrum(weight, None, 6, (48, 80), seed=s)
        assert torch.equal(spectrum.base, alone.base)
        torch.testing.assert_close(
            method.factors(spectrum, 6, 1.0).delta(1.0), method.factors(alone, 6, 1.0).delta(1.0), rtol=0, atol=1e-5
        )


def test_deterministic(weight):
    first, second = start(Loftq(iterations=2), weight, 5), start(Loftq(iterations=2), weight, 5)
    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)
    assert torch.equal(first.base, second.base)


def test_spectrum_tells_the_share_of_the_error(weight):
    spectrum = Loftq().spectrum(weight, None, 8, tuple(weight.shape))
    error = weight.double() - spectrum.base.double()
    sigma = torch.linalg.svdvals(error)
    torch.testing.assert_close(spectrum.values, sigma[:8] ** 2, rtol=1e-4, atol=0)
    torch.testing.assert_close(spectrum.total, float(error.square().sum()), rtol=1e-5, atol=0)
    torch.testing.assert_close(spectrum.certificate.captured, float(spectrum.ratios.sum()), rtol=1e-6, atol=0)


def test_rank_zero_and_full_rank(weight):
    spectrum = Loftq().spectrum(weight, None, min(weight.shape), tuple(weight.shape))
    empty = Loftq().factors(spectrum, 0, 1.0)
    assert (empty.a.shape, empty.b.shape) == ((0, weight.shape[1]), (weight.shape[0], 0))
    whole = Loftq().factors(spectrum, min(weight.shape), 4.0)
    assert loss(weight, whole, 4.0) < 1e-5 * float(weight.norm())


def test_zero_weights_and_weights_on_the_grid_need_no_correction(seed):
    for weight in (torch.zeros(40, 64), Quantiser()(weight_of((40, 64), seed))):
        factors = start(Loftq(iterations=2), weight, 4)
        assert torch.equal(factors.base, weight)
        assert not factors.delta(1.0).any()
        assert factors.a.isfinite().all()
        assert factors.b.isfinite().all()


def test_defect_11_loftq_on_convolutions_and_embeddings(seed):
    """PEFT raises TypeError; as (out, in) matrices they are quantised like any other."""
    assert {"convolution", "embedding"} <= Loftq.hosts
    convolution = torch.nn.Conv2d(6, 10, 3)
    weight = convolution.weight.detach().flatten(1)
    factors = start(Loftq(), weight, 4)
    (base, delta), *_ = oracle.loftq(weight, 4, 1, nf4)
    torch.testing.assert_close(factors.base.double(), base, rtol=0, atol=1e-6)
    assert (factors.delta(1.0).double() - delta).norm() < 1e-5 * delta.norm()
    embedding = torch.nn.Embedding(50, 16).weight.detach().T  # a view: out = width, in = tokens
    assert loss(embedding, start(Loftq(), embedding, 4), 1.0) < float((embedding - Quantiser()(embedding)).norm())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_are_refused(bad):
    weight = torch.ones(8, 64)
    weight[1, 2] = bad
    with pytest.raises(ModelError, match="NaN or Inf"):
        Loftq().spectrum(weight, None, 4, (8, 64))
    with pytest.raises(ModelError, match="NaN or Inf"):
        residual_factors(weight, torch.ones(8, 64), 2, 1.0)


def test_options_and_arguments_are_checked(seed):
    weight = weight_of((8, 64), seed)
    for wrong in (dict(bits=3), dict(iterations=0), dict(iterations=1.5), dict(quantiser="fp4"), dict(block_size=0)):
        with pytest.raises(ConfigError):
            Loftq(**wrong)
    with pytest.raises(ConfigError, match=r"original.*unquantised"):
        Loftq().spectrum(None, None, 4, (8, 64))
    spectrum = Loftq().spectrum(weight, None, 4, (8, 64))
    with pytest.raises(ConfigError, match=r"rank 5.*4 directions"):
        Loftq().factors(spectrum, 5, 1.0)
    for scaling in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="positive scaling"):
            Loftq().factors(spectrum, 2, scaling)


def test_residual_factors_serve_any_quantiser(weight, seed):
    """Here: rounding to a grid of its own."""
    quantised = (weight * 4).round() / 4
    factors = residual_factors(weight, quantised.half(), 5, 0.5, seed=seed)
    best = oracle.best_correction(weight.double() - quantised.double(), 5)
    assert (factors.delta(0.5).double() - best).norm() < 1e-4 * best.norm()
    assert factors.effect == "quantises"
    assert torch.equal(factors.base, quantised.half())
    with pytest.raises(ConfigError, match=r"rank 200 is above min\(out, in\)"):
        residual_factors(weight, quantised, 200, 1.0)
    with pytest.raises(ConfigError, match="one shape"):
        residual_factors(weight, quantised[:-1], 2, 1.0)


def test_large_stacks_are_cut_into_pieces(monkeypatch, seed):
    weights = [weight_of((24, 64), seed + i) for i in range(4)]
    bases = [Quantiser()(w) for w in weights]
    whole = error_spectra(weights, bases, 3, seeds=range(4))
    monkeypatch.setattr("smartinit.methods.residual._TOGETHER", 24 * 64 * 2)
    pieces = error_spectra(weights, bases, 3, seeds=range(4))
    assert len(pieces) == 4
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one.values, other.values)
    assert error_spectra([], [], 3, seeds=[]) == []
