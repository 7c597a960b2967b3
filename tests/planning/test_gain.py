from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from smartinit.errors import ConfigError
from smartinit.factors import Factors
from smartinit.methods.orthogonal import Orthogonal
from smartinit.planning.first_step import predict_step
from smartinit.planning.gain import Gain, gain_of, match_gain, summarise_gains
from smartinit.planning.moment import SecondMoment
from smartinit.statistics.gram import GramStatistic

_SPEC = importlib.util.spec_from_file_location("first_step", Path(__file__).parents[1] / "oracles" / "first_step.py")
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

OUT, IN, RANK, SCALING = 40, 60, 6, 1.7


@pytest.fixture
def sigma(seed):
    return oracle.decaying_moment(IN, seed=seed)


def exact(matrix):
    """The moment of a layer whose inputs have the second moment ``matrix``."""
    zeros = torch.zeros(len(matrix), dtype=torch.float64)
    return SecondMoment(
        len(matrix), zeros[:0].unsqueeze(1).expand(0, len(matrix)), zeros[:0], zeros, 0.0, torch.tensor(matrix)
    )


def start(kind, sigma, seed):
    """``(a, b)`` in float64."""
    random = np.random.default_rng(seed)
    weight = random.normal(size=(OUT, IN)) / np.sqrt(IN)
    if kind == "kaiming":
        return random.uniform(-1, 1, size=(RANK, IN)) / np.sqrt(IN), np.zeros((OUT, RANK))
    if kind == "eva":
        return np.linalg.eigh(sigma)[1].T[::-1][:RANK].copy(), np.zeros((OUT, RANK))
    if kind == "pissa":
        u, s, vh = np.linalg.svd(weight)
        roots = np.sqrt(s[:RANK] / SCALING)
        return roots[:, None] * vh[:RANK], u[:, :RANK] * roots
    if kind == "orthogonal":
        found = Orthogonal().factors(Orthogonal().spectrum(None, None, RANK, (OUT, IN), seed=seed), RANK, SCALING)
        return found.a.double().numpy(), found.b.double().numpy()
    if kind == "only b":  # an embedding's start
        return np.zeros((RANK, IN)), random.normal(size=(OUT, RANK))
    assert kind == "random"
    return random.normal(size=(RANK, IN)) / IN, random.normal(size=(OUT, RANK)) / 9


def factors_of(a, b, effect="splits", **more):
    return Factors(torch.tensor(a), torch.tensor(b), effect, **more)


KINDS = ["kaiming", "eva", "pissa", "orthogonal", "only b", "random"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_adam_is_that_of_a_simulation(kind, sigma, seed):
    a, b = start(kind, sigma, seed)
    gain = gain_of(factors_of(a, b), SCALING, exact(sigma))
    expected = oracle.simulated_step(a, b, SCALING, sigma, seed=seed)
    assert gain.step == pytest.approx(expected, rel=0.03)
    assert gain.measured
    assert predict_step(factors_of(a, b), SCALING, exact(sigma), 1e-3) == pytest.approx(1e-3 * gain.step)


@pytest.mark.parametrize("kind", KINDS)
def test_the_step_of_sgd_is_that_of_a_simulation(kind, sigma, seed):
    a, b = start(kind, sigma, seed)
    expected = oracle.simulated_step(a, b, SCALING, sigma, optimiser="sgd", draws=400, seed=seed)
    norm = math.sqrt(OUT * np.trace(sigma))  # of the simulation's gradients
    found = predict_step(factors_of(a, b), SCALING, exact(sigma), 1e-3, optimiser="sgd", gradient=norm)
    assert found == pytest.approx(1e-3 * expected, rel=0.05)


@pytest.mark.parametrize("trains", ["a", "b"])
def test_a_matrix_that_is_not_trained_makes_no_step(trains, sigma, seed):
    a, b = start("pissa", sigma, seed)
    pair = factors_of(a, b, trains=trains)
    gain = gain_of(pair, SCALING, exact(sigma))
    expected = oracle.simulated_step(a, b, SCALING, sigma, trains=trains, seed=seed)
    assert gain.step == pytest.approx(expected, rel=0.03)
    assert (gain.by_a == 0, gain.by_b == 0) == (trains == "b", trains == "a")
    norm = math.sqrt(OUT * np.trace(sigma))
    expected = oracle.simulated_step(a, b, SCALING, sigma, optimiser="sgd", trains=trains, draws=400, seed=seed)
    found = predict_step(pair, SCALING, exact(sigma), 1.0, optimiser="sgd", gradient=norm)
    assert found == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("decay", "offset"), [(0.0, 0.0), (1.0, 0.5), (2.0, 3.0), (6.0, 0.0)])
def test_the_yardstick_is_the_average_of_loras_own_starts(decay, offset, seed):
    """From inputs that prefer no direction to inputs on one line."""
    sigma = oracle.decaying_moment(IN, decay=decay, offset=offset, seed=seed)
    a, b = start("kaiming", sigma, seed)
    gain = gain_of(factors_of(a, b), SCALING, exact(sigma))
    expected = oracle.simulated_reference(RANK, OUT, SCALING, sigma, seed=seed)
    assert gain.reference == pytest.approx(expected, rel=0.06)
    squares = [
        gain_of(factors_of(*start("kaiming", sigma, i)), SCALING, exact(sigma)).relative_sgd ** 2 for i in range(300)
    ]
    error = np.std(squares) / math.sqrt(len(squares))
    assert np.mean(squares) == pytest.approx(1.0, abs=max(0.02, 4 * error))


def test_the_yardstick_of_an_embedding_table_is_its_own_start(seed):
    """A zero, B normal; inputs are unit vectors."""
    sigma = np.diag(np.random.default_rng(seed).dirichlet(np.ones(IN)))
    ours, peers = [], []
    for i in range(20):
        b = np.random.default_rng(seed + i).normal(size=(OUT, RANK))
        gain = gain_of(factors_of(np.zeros((RANK, IN)), b), SCALING, exact(sigma), embedding=True)
        ours.append(gain.relative)
        peers.append(gain.relative_sgd)
    assert np.mean(ours) == pytest.approx(1.0, rel=0.03)
    assert np.mean(peers) == pytest.approx(1.0, rel=0.05)


def test_the_formula_of_the_design(seed):
    """B = 0 and uncorrelated rows: s·lr·√(out·tr(A Σ Aᵀ)); EVA's gain is √(Σλ / (r·trΣ/3n)) times LoRA's own."""
    values = np.arange(1, IN + 1) ** -1.0
    a = np.eye(IN)[:RANK]
    gain = gain_of(factors_of(a, np.zeros((OUT, RANK))), SCALING, exact(np.diag(values)))
    assert gain.step == pytest.approx(SCALING * math.sqrt(OUT * values[:RANK].sum()))
    alone = gain_of(factors_of(a[:1], np.zeros((OUT, 1))), SCALING, exact(np.diag(values)))
    assert alone.relative == pytest.approx(math.sqrt(values[0] / (values.sum() / (3 * IN))))


def test_an_exact_gradient_gives_the_exact_step(sigma, seed):
    """Against autograd and torch's own optimisers, second order included."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, IN, dtype=torch.float64, generator=generator) @ torch.tensor(oracle.root(sigma))
    goal = torch.randn(300, OUT, dtype=torch.float64, generator=generator)
    weight = torch.randn(OUT, IN, dtype=torch.float64, generator=generator)
    a, b = (torch.tensor(part) for part in start("pissa", sigma, seed))
    residual = weight - SCALING * b @ a
    gradient = 2 * (x @ weight.T - goal).T @ x / 300
    moment = exact((x.T @ x / 300).numpy())
    for name, kind, lr in (("adam", torch.optim.Adam, 1e-2), ("sgd", torch.optim.SGD, 1e-3)):
        A, B = (torch.nn.Parameter(part.clone()) for part in (a, b))
        before = x @ (residual + SCALING * B @ A).T.detach()
        (x @ (residual + SCALING * B @ A).T - goal).square().sum(1).mean().backward()
        kind([A, B], lr=lr).step()
        after = x @ (residual + SCALING * B @ A).T.detach()
        found = predict_step(Factors(a, b, "splits"), SCALING, moment, lr, optimiser=name, gradient=gradient)
        assert found == pytest.approx(float((after - before).square().sum(1).mean().sqrt()), rel=1e-5)


def test_sgd_needs_a_gradient(sigma, seed):
    with pytest.raises(ConfigError, match="pass gradient"):
        predict_step(factors_of(*start("eva", sigma, seed)), 1.0, exact(sigma), 0.1, optimiser="sgd")


@pytest.mark.parametrize("kind", ["kaiming", "eva", "orthogonal", "only b"])
def test_matching_a_start_that_keeps_the_base(kind, sigma, seed):
    pair = factors_of(*start(kind, sigma, seed), "keeps")
    before = (pair.a.clone(), pair.b.clone())
    matched = match_gain(pair, gain_of(pair, SCALING, exact(sigma)))
    assert gain_of(matched, SCALING, exact(sigma)).relative == pytest.approx(1.0)
    assert matched.delta(SCALING).abs().max() < 1e-15
    assert torch.equal(pair.a, before[0])
    assert torch.equal(pair.b, before[1])
    twice = match_gain(pair, gain_of(pair, SCALING, exact(sigma)), 2.0)
    assert gain_of(twice, SCALING, exact(sigma)).relative == pytest.approx(2.0)


@pytest.mark.parametrize("times", [1.5, 8.0])
def test_a_split_keeps_its_product_where_that_is_possible(times, sigma, seed):
    """A start out of balance has a step to lose without any change to its product."""
    a, b = start("pissa", sigma, seed)
    even = gain_of(factors_of(a, b), SCALING, exact(sigma))
    c = (even.by_b / even.by_a) ** 0.25
    pair = factors_of(a / c * times, b * c / times)
    gain = gain_of(pair, SCALING, exact(sigma))
    reachable = gain.relative * 0.9
    matched = match_gain(pair, gain, reachable)
    assert gain_of(matched, SCALING, exact(sigma)).relative == pytest.approx(reachable)
    assert torch.allclose(matched.delta(SCALING), pair.delta(SCALING), rtol=1e-9, atol=1e-12)
    assert matched.effect == "splits"
    if times > 2:  # of two ways to get there, the one that changes less
        assert 0.5 < float(matched.a.norm() / pair.a.norm()) < 1


@pytest.mark.parametrize("effect", ["splits", "shifts", "quantises"])
def test_what_cannot_be_reached_with_the_same_product(effect, sigma, seed):
    pair = factors_of(*start("pissa", sigma, seed), effect)
    gain = gain_of(pair, SCALING, exact(sigma))
    matched = match_gain(pair, gain, 0.01)
    found = gain_of(matched, SCALING, exact(sigma))
    shrunk = float((matched.delta(1.0) / pair.delta(1.0)).mean())
    assert torch.allclose(matched.delta(1.0), shrunk * pair.delta(1.0))
    if effect == "quantises":  # its product corrects the base, so the gain stays as low as balance makes it
        assert shrunk == pytest.approx(1.0)
        assert found.by_a == pytest.approx(found.by_b)
        assert found.relative <= gain.relative
    else:
        assert found.relative == pytest.approx(0.01)
        assert shrunk < 1


def test_frozen_matrices_are_matched_by_the_other(sigma, seed):
    for trains in ("a", "b"):
        pair = factors_of(*start("pissa", sigma, seed), trains=trains)
        matched = match_gain(pair, gain_of(pair, SCALING, exact(sigma)))
        assert gain_of(matched, SCALING, exact(sigma)).relative == pytest.approx(1.0)
        assert torch.allclose(matched.delta(1.0), pair.delta(1.0))


def test_the_scaling_is_no_part_of_the_relative_gain(sigma, seed):
    pair = factors_of(*start("eva", sigma, seed))
    one, ten = (gain_of(pair, s, exact(sigma)) for s in (1.0, 10.0))
    assert ten.step == pytest.approx(10 * one.step)
    assert ten.relative == pytest.approx(one.relative)
    assert ten.relative_sgd == pytest.approx(one.relative_sgd)
    assert one.matching_lr == pytest.approx(1 / one.relative)


@pytest.mark.parametrize(
    "pair",
    [
        Factors(torch.zeros(0, IN), torch.zeros(OUT, 0)),
        Factors(torch.zeros(3, IN), torch.zeros(OUT, 3), "splits"),
        Factors(torch.ones(3, IN), torch.ones(OUT, 3), "splits"),
    ],
)
@pytest.mark.parametrize("inputs", [np.zeros((IN, IN)), np.ones((IN, IN))])
def test_nothing_moves_or_everything_moves_alike(pair, inputs):
    gain = gain_of(pair, 1.0, exact(inputs))
    numbers = gain.as_dict().values()
    assert all(math.isfinite(number) for number in numbers)
    matched = match_gain(pair, gain)
    assert torch.isfinite(matched.a).all()
    assert torch.isfinite(matched.b).all()
    assert predict_step(pair, 1.0, exact(inputs), 0.1, optimiser="sgd", gradient=1.0) >= 0
    if not inputs.any() or not pair.rank:
        assert gain.relative == 1.0


def test_without_data_inputs_are_taken_as_isotropic(seed):
    pair = factors_of(*start("pissa", np.eye(IN), seed))
    gain = gain_of(pair, SCALING, SecondMoment.isotropic(IN))
    assert not gain.measured
    assert gain.step == pytest.approx(gain_of(pair, SCALING, exact(np.eye(IN))).step)


def test_factors_keep_their_type(sigma, seed):
    a, b = start("eva", sigma, seed)
    pair = Factors(torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16())
    matched = match_gain(pair, gain_of(pair, 1.0, exact(sigma)))
    assert matched.a.dtype == matched.b.dtype == torch.bfloat16
    for target in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="must be positive"):
            match_gain(pair, gain_of(pair, 1.0, exact(sigma)), target)


def test_gains_of_several_layers():
    gains = [Gain(2.0, 1.0, 0, 4, 4, True), Gain(30.0, 10.0, 0, 900, 9, True), Gain(8.0, 1.0, 0, 64, 64, False)]
    found = summarise_gains([*gains, Gain(0.0, 0.0, 0, 0, 1, True)])
    assert (found.layers, found.median, found.lowest, found.highest, found.measured) == (3, 3.0, 2.0, 8.0, False)
    assert found.overall == pytest.approx(math.sqrt((4 + 900 + 64) / 102))
    assert found.as_dict()["matching_lr"] == pytest.approx(1 / 3)
    assert summarise_gains([]) is None
    assert Gain.from_dict(gains[0].as_dict()) == gains[0]


def test_a_statistic_of_activations_gives_what_its_rows_do(seed):
    """The whole way: rows → statistic → moment → gain, against the rows themselves."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(4000, IN, generator=generator) * torch.linspace(0.1, 2, IN) + 0.3
    statistic = GramStatistic(IN)
    statistic.update(rows)
    a, b = start("eva", rows.T.double().numpy() @ rows.double().numpy(), seed)
    sigma = (rows.double().T @ rows.double() / 4000).numpy()
    found = gain_of(factors_of(a, b), SCALING, SecondMoment.of(statistic))
    assert found.step == pytest.approx(gain_of(factors_of(a, b), SCALING, exact(sigma)).step, rel=1e-5)
