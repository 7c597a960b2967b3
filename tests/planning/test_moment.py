from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from smartinit.planning.moment import SecondMoment
from smartinit.statistics.gram import GramStatistic
from smartinit.statistics.subspace import SubspacePCA

N = 48


def rows_of(seed, n=N, count=3000):
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(n, n, generator=generator)).Q
    scales = torch.ones(n) * 0.1
    scales[:6] = torch.tensor([9.0, 7, 5, 4, 3, 2])
    return (torch.randn(count, n, generator=generator) * scales) @ turn.mT + torch.linspace(-1, 1, n)


def moments(seed, *, centred=True):
    """One whole, one of leading directions, and the truth."""
    rows = rows_of(seed)
    out = []
    for statistic in (GramStatistic(N, centred=centred), SubspacePCA(N, 12, centred=centred)):
        for chunk in rows.split(500):
            statistic.update(chunk)
        statistic.settle()
        out.append(SecondMoment.of(statistic))
    return *out, (rows.double().T @ rows.double() / len(rows))


@pytest.mark.parametrize("centred", [True, False])
def test_the_mean_belongs_to_the_moment(centred, seed):
    for moment, tolerance in zip(moments(seed, centred=centred)[:2], (1e-5, 2e-3), strict=True):
        truth = moments(seed)[2]
        probe = torch.randn(5, N, generator=torch.Generator().manual_seed(seed))
        assert moment.trace == pytest.approx(float(truth.trace()), rel=tolerance)
        assert moment.square_trace == pytest.approx(float(truth.square().sum()), rel=tolerance)
        error = (moment.times(probe) - probe.double() @ truth).norm() / (probe.double() @ truth).norm()
        assert error < tolerance * 5
        assert (moment.diagonal - truth.diagonal()).abs().max() < tolerance * 10 * truth.diagonal().mean()
        assert moment.measured


@pytest.mark.parametrize("n", [N, 900])
def test_coherence_is_the_sum_over_all_pairs(n, seed):
    """Also where only a sample of the pairs is looked at, with a few coordinates larger than all others."""
    rows = rows_of(seed, n, 4000)
    rows[:, :3] *= 20
    truth = rows.double().numpy().T @ rows.double().numpy() / len(rows)
    deviation = np.sqrt(np.diag(truth))
    correlation = np.clip(truth / np.outer(deviation, deviation), -1, 1)
    zeros = torch.zeros(n, dtype=torch.float64)
    moment = SecondMoment(n, zeros[:0].unsqueeze(1).expand(0, n), zeros[:0], zeros, 0.0, torch.tensor(truth))
    for t in (-1.0, -0.6, 0.0, 0.1, 0.4, 0.9, 1.0):
        expected = (truth * (2 / math.pi) * np.arcsin(t * correlation)).sum()
        assert float(moment.coherence(torch.tensor(t))) == pytest.approx(
            expected, rel=0.03 if n == N else 0.08, abs=1e-9
        )


def test_isotropic_inputs():
    moment = SecondMoment.isotropic(10)
    assert (moment.trace, moment.square_trace, moment.measured) == (10, 10, False)
    assert moment.attraction == pytest.approx(2 / math.pi, rel=0.05)
    probe = torch.randn(3, 10)
    assert torch.allclose(moment.times(probe), probe.double())
    assert float(moment.coherence(torch.tensor(1.0))) == pytest.approx(10)


def test_a_statistic_without_rows_says_nothing():
    assert not SecondMoment.of(GramStatistic(7)).measured


def test_constant_inputs():
    """All variance is in the mean."""
    statistic = SubspacePCA(20, 4)
    statistic.update(torch.ones(300, 20))
    moment = SecondMoment.of(statistic)
    assert moment.trace == pytest.approx(20)
    assert moment.square_trace == pytest.approx(400)
    assert float(moment.coherence(torch.tensor(1.0))) == pytest.approx(400)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
def test_attraction_of_inputs_with_one_prevailing_direction(share, seed):
    """Against many pairs: for Gaussian rows only the eigenvalues matter, and long uniform ones are like them."""
    random = np.random.default_rng(seed)
    values = np.full(100, (1 - share) / 100)
    values[0] += share
    first, second = random.normal(size=(2, 20_000, 100))
    products = (first * second) @ values
    scale = np.sqrt((first**2 @ values) * (second**2 @ values))
    expected = np.mean(products * 2 / math.pi * np.arcsin(np.clip(products / scale, -1, 1)))
    turn = torch.linalg.qr(torch.tensor(random.normal(size=(100, 100)))).Q
    whole = turn @ torch.diag(torch.tensor(values)) @ turn.mT
    zeros = torch.zeros(100, dtype=torch.float64)
    moment = SecondMoment(100, zeros[:0].unsqueeze(1).expand(0, 100), zeros[:0], zeros, 0.0, whole)
    assert moment.attraction == pytest.approx(expected, rel=0.1)
