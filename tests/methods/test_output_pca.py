from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from smartinit.errors import ConfigError, DataError, ModelError
from smartinit.methods.output_pca import OutputPca
from smartinit.statistics.gram import GramStatistic

_SPEC = importlib.util.spec_from_file_location(
    "covariance_oracle", Path(__file__).parent.parent / "oracles" / "covariance_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

METHOD = OutputPca()


def statistic_of(rows):
    statistic = GramStatistic(rows.shape[1], centred=False, moments_only=True)
    for part in rows.split(300):
        statistic.update(part)
    return statistic


def product(weight, rows, rank, scaling=1.0):
    spectrum = METHOD.spectrum(weight, statistic_of(rows), rank, tuple(weight.shape))
    return METHOD.factors(spectrum, rank, scaling).delta(scaling)


@pytest.mark.parametrize("shape", [(48, 64), (64, 64), (96, 64), (256, 400), (600, 400)])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_the_product_projects_on_the_principal_outputs(shape, scaling, seed):
    rows = oracle.graded_rows(900, shape[1], decay=0.8, seed=seed)
    weight = oracle.graded_weight(*shape, seed=seed)
    assert oracle.relative(product(weight, rows, 8, scaling), oracle.output_product(weight, rows, 8)) < 1e-5


def test_no_other_start_of_that_rank_is_better_for_the_outputs(seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    moment = oracle.second_moment(rows)
    ours = oracle.output_error(weight, product(weight, rows, 8).double().numpy(), rows)
    u, s, vt = np.linalg.svd(weight.double().numpy())
    pissa = (u[:, :8] * s[:8]) @ vt[:8]
    corda = oracle.corda_product(weight, moment, 8)
    assert ours < 0.999 * oracle.output_error(weight, pissa, rows)
    assert ours < 0.999 * oracle.output_error(weight, corda, rows)
    spectrum = METHOD.spectrum(weight, statistic_of(rows), 8, (48, 64))
    assert (spectrum.total - float(spectrum.values.sum())) * 900 == pytest.approx(ours, rel=1e-4)
    assert spectrum.certificate.captured == pytest.approx(float(spectrum.ratios.sum()))


def test_a_and_b_share_evenly_and_ranks_share_a_spectrum(seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    spectrum = METHOD.spectrum(weight, statistic_of(rows), 16, (48, 64))
    for rank in (0, 1, 5, 16):
        factors = METHOD.factors(spectrum, rank, 2.0)
        assert oracle.relative(factors.delta(2.0), oracle.output_product(weight, rows, rank)) < 1e-5
        assert torch.allclose(factors.a @ factors.a.mT, factors.b.mT @ factors.b, atol=1e-5)
        assert factors.effect == "splits"
    with pytest.raises(ConfigError, match="rank 17"):
        METHOD.factors(spectrum, 17, 1.0)


@pytest.mark.parametrize("massive", [1e2, 1e4])
def test_massive_activations_do_not_drown_the_rest(massive, seed):
    rows, weight = oracle.graded_rows(900, 300, massive=massive, seed=seed), oracle.graded_weight(256, 300, seed=seed)
    assert oracle.relative(product(weight, rows, 8), oracle.output_product(weight, rows, 8)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_as_they_are(dtype, seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed).to(dtype)
    assert oracle.relative(product(weight, rows, 8), oracle.output_product(weight, rows, 8)) < 1e-5


@pytest.mark.parametrize("rank", [4, 12])
def test_singular_second_moments(rank, seed):
    """Constant, duplicated and dead features, and fewer tokens than ranks: as many directions as there are."""
    rows, weight = oracle.graded_rows(10, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    rows[:, 5], rows[:, 6], rows[:, 9] = 3.0, rows[:, 8], 0.0
    spectrum = METHOD.spectrum(weight, statistic_of(rows), rank, (48, 64))
    factors = METHOD.factors(spectrum, rank, 1.0)
    assert torch.isfinite(factors.a).all()
    assert spectrum.certificate.damping > 0
    if rank == 4:
        assert oracle.relative(factors.delta(1.0), oracle.output_product(weight, rows, 4)) < 1e-5
    else:
        assert oracle.output_error(weight, factors.delta(1.0).double().numpy(), rows) < 1e-8 * oracle.output_error(
            weight, np.zeros((48, 64)), rows
        )
        u = spectrum.left.double()
        assert torch.allclose(u.mT @ u, torch.eye(rank, dtype=torch.float64), atol=1e-6)


def test_dead_inputs_and_zero_weights_start_like_pissa_and_like_nothing():
    weight = oracle.graded_weight(20, 16)
    u, s, vt = np.linalg.svd(weight.double().numpy())
    assert oracle.relative(product(weight, torch.zeros(50, 16), 4), (u[:, :4] * s[:4]) @ vt[:4]) < 1e-5
    assert not product(torch.zeros(20, 16), torch.randn(50, 16), 4).any()


def test_refusals():
    statistic = statistic_of(torch.randn(50, 16))
    with pytest.raises(ConfigError, match="second moment"):
        METHOD.spectrum(torch.randn(8, 16), None, 4, (8, 16))
    with pytest.raises(DataError, match="at least 1 token"):
        METHOD.spectrum(torch.randn(8, 16), GramStatistic(16), 4, (8, 16))
    with pytest.raises(ModelError, match="NaN"):
        METHOD.spectrum(torch.randn(8, 16) * torch.nan, statistic, 4, (8, 16))
    with pytest.raises(ConfigError, match="s > 0"):
        METHOD.factors(METHOD.spectrum(torch.randn(8, 16), statistic, 4, (8, 16)), 4, -1.0)
