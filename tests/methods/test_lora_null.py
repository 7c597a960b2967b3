from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from smartinit.errors import ConfigError, DataError, ModelError
from smartinit.methods.lora_null import LoraNull
from smartinit.statistics.gram import GramStatistic

_SPEC = importlib.util.spec_from_file_location(
    "covariance_oracle", Path(__file__).parent.parent / "oracles" / "covariance_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

METHOD = LoraNull()


def statistic_of(rows):
    statistic = GramStatistic(rows.shape[1], centred=False, moments_only=True)
    for part in rows.split(300):
        statistic.update(part)
    return statistic


def product(weight, rows, rank, scaling=1.0):
    spectrum = METHOD.spectrum(weight, statistic_of(rows), rank, tuple(weight.shape))
    return METHOD.factors(spectrum, rank, scaling).delta(scaling)


@pytest.mark.parametrize("shape", [(48, 64), (64, 64), (96, 64), (256, 400)])
@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_the_product_is_the_papers(shape, scaling, seed):
    rows, weight = oracle.graded_rows(900, shape[1], seed=seed), oracle.graded_weight(*shape, seed=seed)
    expected = oracle.null_product(weight, oracle.second_moment(rows), 8)
    assert oracle.relative(product(weight, rows, 8, scaling), expected) < 1e-5


def test_the_adapter_reads_next_to_nothing_of_the_data(seed):
    rows, weight = oracle.graded_rows(900, 64, decay=1.5, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    spectrum = METHOD.spectrum(weight, statistic_of(rows), 8, (48, 64))
    factors = METHOD.factors(spectrum, 8, 1.0)
    read = torch.linalg.vector_norm(rows.float() @ factors.a.mT) / torch.linalg.vector_norm(factors.a)
    assert read < 0.05 * torch.linalg.vector_norm(rows)
    assert spectrum.certificate.captured == pytest.approx(float(spectrum.values.sum()) / spectrum.total)
    assert spectrum.total * 900 == pytest.approx(float(rows.square().sum()), rel=1e-6)
    least = np.linalg.eigvalsh(oracle.second_moment(rows))[:8]
    np.testing.assert_allclose(spectrum.values.numpy(), least, rtol=1e-4)
    assert torch.allclose(factors.a @ factors.a.mT, factors.b.mT @ factors.b, atol=1e-5)


def test_ranks_share_a_spectrum(seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    spectrum = METHOD.spectrum(weight, statistic_of(rows), 16, (48, 64))
    for rank in (0, 1, 5, 16):
        expected = oracle.null_product(weight, oracle.second_moment(rows), rank)
        assert oracle.relative(METHOD.factors(spectrum, rank, 2.0).delta(2.0), expected) < 1e-5
    with pytest.raises(ConfigError, match="rank 17"):
        METHOD.factors(spectrum, 17, 1.0)


def test_a_frozen_a_is_the_papers_variant(seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    spectrum = METHOD.spectrum(weight, statistic_of(rows), 4, (48, 64))
    assert METHOD.factors(spectrum, 4, 1.0).trains == "both"
    frozen = LoraNull(frozen_a=True).factors(spectrum, 4, 1.0)
    assert (frozen.trains, frozen.effect) == ("b", "splits")
    assert torch.equal(frozen.a, METHOD.factors(spectrum, 4, 1.0).a)


@pytest.mark.parametrize("massive", [1e2, 1e4])
def test_massive_activations_do_not_drown_the_rest(massive, seed):
    rows, weight = oracle.graded_rows(900, 300, massive=massive, seed=seed), oracle.graded_weight(256, 300, seed=seed)
    expected = oracle.null_product(weight, oracle.second_moment(rows), 8)
    assert oracle.relative(product(weight, rows, 8), expected) < 1e-4  # the oracle's own SVD has no more


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_as_they_are(dtype, seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed).to(dtype)
    expected = oracle.null_product(weight, oracle.second_moment(rows), 8)
    assert oracle.relative(product(weight, rows, 8), expected) < 1e-5


def test_fewer_tokens_than_features_name_the_number_needed(seed):
    rows, weight = oracle.graded_rows(40, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    with pytest.raises(DataError, match=r"40 tokens for 64 features.*at least 64 tokens"):
        METHOD.spectrum(weight, statistic_of(rows), 8, (48, 64))


def test_duplicated_constant_and_dead_features_are_the_null_space(seed):
    rows, weight = oracle.graded_rows(500, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    rows[:, 5], rows[:, 6], rows[:, 9], rows[:, 11] = 3.0, rows[:, 8], 0.0, 5.0
    found = product(weight, rows, 3)
    null = np.zeros((64, 3))
    null[6, 0], null[8, 0], null[9, 1] = 0.5**0.5, -(0.5**0.5), 1.0
    null[5, 2], null[11, 2] = 5 / 34**0.5, -3 / 34**0.5
    expected = weight.double().numpy() @ null @ null.T
    assert oracle.relative(found, expected) < 1e-5


def test_zero_weights_and_dead_inputs_are_finite():
    assert not product(torch.zeros(20, 16), torch.randn(50, 16), 4).any()
    found = product(oracle.graded_weight(20, 16), torch.zeros(50, 16), 4)
    assert torch.isfinite(found).all()
    assert np.linalg.matrix_rank(found.numpy()) == 4


def test_refusals():
    statistic = statistic_of(torch.randn(50, 16))
    with pytest.raises(ConfigError, match="second moment"):
        METHOD.spectrum(torch.randn(8, 16), None, 4, (8, 16))
    with pytest.raises(ConfigError, match="weight"):
        METHOD.spectrum(None, statistic, 4, (8, 16))
    with pytest.raises(ModelError, match="NaN"):
        METHOD.spectrum(torch.randn(8, 16) * torch.nan, statistic, 4, (8, 16))
    with pytest.raises(ConfigError, match="s > 0"):
        METHOD.factors(METHOD.spectrum(torch.randn(8, 16), statistic, 4, (8, 16)), 4, 0.0)
