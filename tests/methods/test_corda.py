from __future__ import annotations

import copy
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smartinit.errors import ConfigError, DataError, ModelError
from smartinit.methods.corda import Corda
from smartinit.statistics.gram import GramStatistic

_SPEC = importlib.util.spec_from_file_location(
    "covariance_oracle", Path(__file__).parent.parent / "oracles" / "covariance_splits.py"
)
oracle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(oracle)

SHAPES = [(48, 64), (64, 64), (96, 64)]
MODES = ["ipm", "kpm"]


def statistic_of(rows, batch=300):
    statistic = GramStatistic(rows.shape[1], centred=False, moments_only=True)
    for part in rows.split(batch):
        statistic.update(part)
    return statistic


def product(method, weight, statistic, rank, scaling=1.0, limit=None):
    spectrum = method.spectrum(weight, statistic, limit or rank, tuple(weight.shape))
    return method.factors(spectrum, rank, scaling).delta(scaling)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("balance", ["covariance", "even"])
def test_the_product_is_the_papers(shape, mode, balance, seed):
    rows, weight = oracle.graded_rows(2000, shape[1], seed=seed), oracle.graded_weight(*shape, seed=seed)
    a, b = oracle.corda(weight, oracle.second_moment(rows), 8, mode)
    for scaling in (1.0, 0.25):
        found = product(Corda(mode, balance), weight, statistic_of(rows), 8, scaling, limit=16)
        assert oracle.relative(found, b @ a) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_a_and_b_are_balanced_as_published(mode, seed):
    rows, weight = oracle.graded_rows(2000, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    a, b = oracle.corda(weight, oracle.second_moment(rows), 8, mode)
    spectrum = Corda(mode).spectrum(weight, statistic_of(rows), 8, (48, 64))
    factors = Corda(mode).factors(spectrum, 8, 0.25)
    assert oracle.relative(factors.a.mT @ factors.a, 4 * a.T @ a) < 1e-4
    assert oracle.relative(factors.b @ factors.b.mT, 4 * b @ b.T) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_even_balance_does_not_depend_on_the_scale_of_the_inputs(mode, seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    even, scaled = Corda(mode, "even"), 1000 * rows
    first, second = (even.factors(even.spectrum(weight, statistic_of(x), 8, (48, 64)), 8, 1.0) for x in (rows, scaled))
    assert oracle.relative(second.a.mT @ second.a, (first.a.mT @ first.a).numpy()) < 1e-4
    assert torch.allclose(first.a @ first.a.mT, first.b.mT @ first.b, atol=1e-5 * float(first.b.norm()) ** 2)
    published = Corda(mode)
    factors = [
        published.factors(published.spectrum(weight, statistic_of(x), 8, (48, 64)), 8, 1.0) for x in (rows, scaled)
    ]
    assert float(factors[1].b.norm()) == pytest.approx(1000 * float(factors[0].b.norm()), rel=1e-3)


@pytest.mark.parametrize("mode", MODES)
def test_ranks_share_one_spectrum(mode, seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    method = Corda(mode)
    spectrum = method.spectrum(weight, statistic_of(rows), 16, (48, 64))
    for rank in (0, 1, 4, 16):
        expected = oracle.corda_product(weight, oracle.second_moment(rows), rank, mode)
        assert oracle.relative(method.factors(spectrum, rank, 2.0).delta(2.0), expected) < 1e-5
        assert oracle.relative(method.factors(spectrum.truncate(rank), rank, 2.0).delta(2.0), expected) < 1e-5
    with pytest.raises(ConfigError, match="rank 17"):
        method.factors(spectrum, 17, 1.0)


@pytest.mark.parametrize("shape", [(256, 400), (400, 400), (600, 400)])
@pytest.mark.parametrize("mode", MODES)
def test_large_layers_are_iterated_to_the_same_answer(shape, mode, seed):
    rows, weight = oracle.graded_rows(1200, 400, decay=0.8, seed=seed), oracle.graded_weight(*shape, seed=seed)
    spectrum = Corda(mode).spectrum(weight, statistic_of(rows), 8, shape)
    assert spectrum.certificate.residual < 1e-6
    found = Corda(mode).factors(spectrum, 8, 1.0).delta(1.0)
    assert oracle.relative(found, oracle.corda_product(weight, oracle.second_moment(rows), 8, mode)) < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("massive", [1e2, 1e4])
def test_massive_activations_do_not_drown_the_rest(mode, massive, seed):
    rows, weight = oracle.graded_rows(900, 300, massive=massive, seed=seed), oracle.graded_weight(256, 300, seed=seed)
    found = product(Corda(mode), weight, statistic_of(rows), 8)
    assert oracle.relative(found, oracle.corda_product(weight, oracle.second_moment(rows), 8, mode)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_taken_as_they_are(dtype, seed):
    rows, weight = oracle.graded_rows(900, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed).to(dtype)
    before = weight.clone()
    found = product(Corda(), weight, statistic_of(rows), 8)
    assert oracle.relative(found, oracle.corda_product(weight, oracle.second_moment(rows), 8)) < 1e-5
    assert torch.equal(weight, before)


def test_fewer_tokens_than_features_serve_ipm(seed):
    rows, weight = oracle.graded_rows(30, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    spectrum = Corda().spectrum(weight, statistic_of(rows), 8, (48, 64))
    found = Corda().factors(spectrum, 8, 1.0).delta(1.0)
    assert oracle.relative(found, oracle.corda_product(weight, oracle.second_moment(rows), 8)) < 1e-5
    assert spectrum.certificate.damping == 0, "the eight that are wanted need none"


def test_fewer_tokens_than_ranks_leave_the_rest_to_the_weight(seed):
    """What C says nothing about comes in the order of the weight alone: the limit of less and less damping."""
    rows, weight = oracle.graded_rows(5, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    spectrum = Corda().spectrum(weight, statistic_of(rows), 12, (48, 64))
    factors = Corda().factors(spectrum, 12, 1.0)
    w = weight.double().numpy()
    used = np.linalg.svd(w @ rows.numpy().T, full_matrices=False)[0]
    rest = np.linalg.svd(w - oracle.projection(weight, used))[0][:, :7]
    expected = oracle.projection(weight, np.concatenate([used, rest], 1))
    assert oracle.relative(factors.delta(1.0), expected) < 1e-5
    assert spectrum.certificate.damping > 0
    assert float(factors.a.norm(dim=1).max() / factors.a.norm(dim=1).min()) < 1e4, "idle directions are not blown up"


def test_kpm_with_fewer_tokens_than_features_names_the_number_needed(seed):
    rows, weight = oracle.graded_rows(63, 64, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    with pytest.raises(DataError, match=r"63 tokens for 64 features.*at least 64 tokens"):
        Corda("kpm").spectrum(weight, statistic_of(rows), 8, (48, 64))
    with pytest.raises(DataError, match="at least 1 token"):
        Corda().spectrum(weight, GramStatistic(64), 8, (48, 64))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_second_moments(shape, mode, seed):
    """Constant, duplicated and dead features: no inverse, so nothing to fail."""
    rows, weight = oracle.graded_rows(500, 64, seed=seed), oracle.graded_weight(*shape, seed=seed)
    rows[:, 5], rows[:, 6], rows[:, 9] = 3.0, rows[:, 8], 0.0
    moment = oracle.second_moment(rows)
    spectrum = Corda(mode).spectrum(weight, statistic_of(rows), 4, shape)
    factors = Corda(mode).factors(spectrum, 4, 1.0)
    assert torch.isfinite(factors.a).all()
    assert torch.isfinite(factors.b).all()
    u = spectrum.left.double()
    assert torch.allclose(u.mT @ u, torch.eye(4, dtype=torch.float64), atol=1e-6)
    # Compared by what defines them: the energy that W C has on U, which a basis of a degenerate space shares.
    energies = np.linalg.norm(u.numpy().T @ (weight.double().numpy() @ moment), axis=1)
    best = np.linalg.svd(weight.double().numpy() @ moment, compute_uv=False)
    expected = best[:4] if mode == "ipm" else best[::-1][:4]
    np.testing.assert_allclose(energies, expected, atol=1e-6 * best[0])
    assert (spectrum.certificate.damping > 0) == (mode == "kpm" and shape[0] >= 64)


@pytest.mark.parametrize("mode", MODES)
def test_a_zero_weight_and_dead_inputs(mode):
    zero = Corda(mode).spectrum(torch.zeros(20, 16), statistic_of(torch.randn(50, 16)), 4, (20, 16))
    assert not Corda(mode).factors(zero, 4, 1.0).delta(1.0).any()
    weight = oracle.graded_weight(20, 16)
    found = product(Corda(mode), weight, statistic_of(torch.zeros(50, 16)), 4)
    assert oracle.relative(found, oracle.corda_product(weight, np.eye(16), 4, mode)) < 1e-5


def test_refusals():
    statistic = statistic_of(torch.randn(50, 16))
    weight = torch.randn(8, 16)
    with pytest.raises(ConfigError, match="second moment"):
        Corda().spectrum(weight, None, 4, (8, 16))
    with pytest.raises(ConfigError, match="16 features for a layer with 12"):
        Corda().spectrum(torch.randn(8, 12), statistic, 4, (8, 12))
    with pytest.raises(ConfigError, match="weight"):
        Corda().spectrum(None, statistic, 4, (8, 16))
    with pytest.raises(ModelError, match="NaN"):
        Corda().spectrum(weight * torch.nan, statistic, 4, (8, 16))
    with pytest.raises(ConfigError, match="'ipm2'"):
        Corda("ipm2")
    with pytest.raises(ConfigError, match="s > 0"):
        Corda().factors(Corda().spectrum(weight, statistic, 4, (8, 16)), 4, 0.0)


def test_pure_and_deterministic(seed):
    rows, weight = oracle.graded_rows(900, 400, seed=seed), oracle.graded_weight(300, 400, seed=seed)
    statistic = statistic_of(rows)
    before = {name: tensor.clone() for name, tensor in statistic.state().items()}
    first, second = (Corda().spectrum(weight, s, 8, (300, 400), seed=3) for s in (statistic, copy.deepcopy(statistic)))
    assert torch.equal(first.left, second.left)
    assert torch.equal(first.directions, second.directions)
    assert all(torch.equal(before[name], tensor) for name, tensor in statistic.state().items())
    kept = first.directions.clone()
    Corda().factors(first, 8, 1.0).a.zero_()
    assert torch.equal(first.directions, kept)


def test_the_layers_of_a_site_share_one_matrix(seed):
    rows = oracle.graded_rows(300, 64, seed=seed)
    statistic = statistic_of(rows)
    made = []
    whole = statistic.second_moment
    statistic.second_moment = lambda **options: made.append(1) or whole(**options)
    for out in (48, 16, 16):
        Corda().spectrum(oracle.graded_weight(out, 64, seed=out), statistic, 4, (out, 64))
    assert len(made) == 1
    statistic.update(rows)
    Corda().spectrum(oracle.graded_weight(48, 64), statistic, 4, (48, 64))
    assert len(made) == 2, "more rows, another matrix"


# --- defect 22 of PEFT's CorDA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[600], [1] * 600, [7, 593], [128, 128, 344]])
def test_defect_22_corda_any_batch_size(sizes, seed):
    rows, weight = oracle.graded_rows(600, 48, seed=seed), oracle.graded_weight(32, 48, seed=seed)
    statistic = GramStatistic(48, centred=False, moments_only=True)
    for part in rows.split(sizes):
        statistic.update(part)
    spectrum = Corda().spectrum(weight, statistic, 8, (32, 48))
    a, b = oracle.corda(weight, oracle.second_moment(rows), 8)
    factors = Corda().factors(spectrum, 8, 1.0)
    assert oracle.relative(factors.delta(1.0), b @ a) < 1e-5
    assert oracle.relative(factors.b @ factors.b.mT, b @ b.T) < 1e-5, "the balance is the same for any batches too"


def test_defect_22_corda_the_sign_of_the_largest_activation_does_not_matter(seed):
    """PEFT divides by |max(x)|: inputs that are all but negative are blown up, and zero there is a NaN."""
    rows = -oracle.graded_rows(600, 48, seed=seed).abs()
    weight = oracle.graded_weight(32, 48, seed=seed)
    first, second = (
        Corda().factors(Corda().spectrum(weight, statistic_of(x), 8, (32, 48)), 8, 1.0) for x in (rows, -rows)
    )
    assert oracle.relative(second.b @ second.b.mT, (first.b @ first.b.mT).double().numpy()) < 1e-6


def test_defect_22_corda_is_closer_to_the_paper_than_peft(monkeypatch, seed):
    """The same rows, one batch, through PEFT's own preprocessing."""
    peft = pytest.importorskip("peft")
    if importlib.util.find_spec("attr") is None:  # which PEFT imports here, and does not ask for
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))
    corda, config_module = (pytest.importorskip(f"peft.tuners.lora.{name}") for name in ("corda", "config"))
    rows, weight = oracle.graded_rows(900, 64, massive=30.0, seed=seed), oracle.graded_weight(48, 64, seed=seed)
    model = torch.nn.Sequential(torch.nn.Linear(64, 48, bias=False))
    model[0].weight.data.copy_(weight)
    config = peft.LoraConfig(
        r=8, lora_alpha=8, target_modules=["0"], init_lora_weights="corda", corda_config=config_module.CordaConfig()
    )
    with torch.no_grad():
        corda.preprocess_corda(model, config, run_model=lambda: model(rows.float().unsqueeze(0)))
    theirs = model[0].eigens
    theirs = (theirs.U_WC * theirs.S_WC) @ theirs.V_WC.mT
    expected = oracle.corda_product(weight, oracle.second_moment(rows), 8)
    ours = oracle.relative(product(Corda(), weight, statistic_of(rows.float()), 8), expected)
    assert ours < 1e-4
    assert ours < oracle.relative(theirs, expected) / 10
