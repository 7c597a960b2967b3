"""A sketch of a gradient gives its leading triplets without the gradient; it adds, merges and is stored."""

from __future__ import annotations

import pytest
import torch

from smartinit.errors import ConfigError
from smartinit.statistics.gradient import GradientSketch
from tests.oracles.gradient_splits import low_rank, rows_with_product


def sketch_of(gradient, components, *, passes=1, seed=0, rows=None, batches=1):
    out, in_features = gradient.shape
    x, delta = rows_with_product(gradient, rows or max(out, in_features), seed)
    sketch = GradientSketch(out, in_features, components, seed=seed)
    for number in range(passes):
        if number:
            sketch = sketch.refined()
        for part, d in zip(x.chunk(batches), delta.chunk(batches), strict=True):
            sketch.update(part.float(), d.float())
            sketch.close_batch()
    return sketch


def decaying(out, in_features, decay, seed):
    return low_rank(out, in_features, [(i + 1) ** -decay for i in range(min(out, in_features))], seed)


def product(triplets):
    return (triplets.u.double() * triplets.s) @ triplets.v.double()


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_gradient_whose_rank_is_below_the_width_is_found(seed, passes):
    gradient = low_rank(160, 224, [3.0, 2.0, 1.5, 0.8, 0.5, 0.3], seed)
    sketch = sketch_of(gradient, 6, passes=passes, seed=seed)
    assert not sketch.exact
    found = sketch.triplets(6)
    assert torch.linalg.norm(product(found) - gradient) <= 1e-5 * torch.linalg.norm(gradient)
    assert found.total == pytest.approx(float(gradient.square().sum()), rel=1e-5)
    assert found.certificate.captured == pytest.approx(1.0, abs=1e-5)
    four = sketch.triplets(4)
    best = low_rank(160, 224, [3.0, 2.0, 1.5, 0.8], seed)
    u, s, v = torch.linalg.svd(gradient, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ v[:4]
    assert torch.linalg.norm(product(four) - best) <= 1e-5 * torch.linalg.norm(best)


@pytest.mark.parametrize(("out", "in_features"), [(200, 320), (320, 200)])
def test_the_energy_of_a_full_rank_gradient_is_found_in_the_second_pass(seed, out, in_features):
    gradient = decaying(out, in_features, 1.0, seed)
    best = float(torch.linalg.svdvals(gradient)[:12].square().sum())
    lost = []
    for passes in (1, 2, 3):
        found = sketch_of(gradient, 12, passes=passes, seed=seed).triplets(12)
        left = float((found.u.double().T @ gradient).square().sum())
        right = float((gradient @ found.v.double().T).square().sum())
        lost.append(1 - min(left, right) / best)
    assert lost[1] <= 5e-3
    assert lost[2] <= 1e-3
    assert lost[0] > lost[1] > lost[2]


def test_triplets_are_orthonormal_even_where_the_gradient_has_no_more(seed):
    gradient = low_rank(150, 170, [2.0, 1.0], seed)
    for passes in (1, 2):
        found = sketch_of(gradient, 8, passes=passes, seed=seed).triplets(8)
        identity = torch.eye(8, dtype=torch.float64)
        assert torch.allclose(found.u.double().T @ found.u.double(), identity, atol=1e-5)
        assert torch.allclose(found.v.double() @ found.v.double().T, identity, atol=1e-5)
        assert float(found.s[2:].max()) < 1e-5


def test_the_residual_tells_how_far_the_last_pass_still_moved_the_directions(seed):
    gradient = decaying(200, 240, 1.5, seed)
    assert sketch_of(gradient, 8, passes=1, seed=seed).triplets(8).certificate.residual is None
    residuals = [sketch_of(gradient, 8, passes=p, seed=seed).triplets(8).certificate.residual for p in (2, 3, 4)]
    assert residuals[0] > 2 * residuals[1] > 4 * residuals[2] > 0
    # The definition, from the gradient itself: of the directions with which the last pass began.
    before = sketch_of(gradient, 8, passes=2, seed=seed).triplets(8)
    u, v = before.u.double(), before.v.double().T
    small = u.T @ gradient @ v
    left, right = gradient @ v - u @ small, gradient.T @ u - v @ small.T
    size = (gradient @ v).square().sum() + (gradient.T @ u).square().sum()
    assert residuals[1] == pytest.approx(float(((left.square().sum() + right.square().sum()) / size).sqrt()), rel=2e-2)


def test_the_total_is_an_unbiased_estimate():
    gradient = decaying(120, 140, 0.3, 5)
    true = float(gradient.square().sum())
    totals = [sketch_of(gradient, 8, seed=s).triplets(8).total / true for s in range(12)]
    assert sum(totals) / len(totals) == pytest.approx(1.0, abs=0.1)
    assert max(totals) - min(totals) > 1e-4  # an estimate


def test_a_sketch_is_never_larger_than_the_gradient():
    for out, in_features, components in [(32, 32, 4), (300, 20, 8), (20, 300, 8), (1024, 512, 16), (64, 4096, 8)]:
        sketch = GradientSketch(out, in_features, components)
        held = sum(t.numel() for name, t in sketch.state().items() if name.startswith("sums"))
        assert held <= out * in_features
        assert sketch.exact == (held == out * in_features)


def test_small_layers_are_exact(seed):
    gradient = decaying(30, 40, 0.1, seed)
    sketch = sketch_of(gradient, 8, seed=seed)
    assert sketch.exact
    assert sketch.refined() is sketch
    found = sketch.triplets(30)
    assert torch.linalg.norm(product(found) - gradient) <= 1e-5 * torch.linalg.norm(gradient)
    assert found.certificate.residual == 0.0
    assert found.total == pytest.approx(float(gradient.square().sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(150, 170), (20, 30)])
def test_one_sketch_of_all_rows_is_that_of_many_batches_in_any_order(seed, shape):
    gradient = decaying(*shape, 1.0, seed)
    x, delta = rows_with_product(gradient, 200, seed)
    whole = GradientSketch(*shape, 6, seed=seed)
    whole.update(x.float(), delta.float())
    parts = GradientSketch(*shape, 6, seed=seed)
    for part, d in zip(x.split(33)[::-1], delta.split(33)[::-1], strict=True):
        parts.update(part.float(), d.float())
    assert torch.allclose(product(whole.triplets(6)), product(parts.triplets(6)), atol=1e-5)
    assert whole.rows == parts.rows == 200


def test_the_gradient_is_the_mean_over_batches(seed):
    gradient = decaying(20, 30, 1.0, seed)
    sketch = sketch_of(gradient, 4, seed=seed, batches=5)
    assert float(sketch.triplets(1).s[0]) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("passes", [1, 2])
def test_merged_halves_are_the_whole(seed, passes):
    gradient = decaying(150, 170, 1.0, seed)
    x, delta = (part.float() for part in rows_with_product(gradient, 200, seed))
    start = GradientSketch(150, 170, 6, seed=seed)
    if passes == 2:
        start.update(x, delta)
        start.close_batch()
        start = start.refined()
    whole, first, second = start.copy(), start.copy(), GradientSketch.from_state(start.state())
    whole.update(x, delta)
    whole.close_batch()
    whole.close_batch()
    first.update(x[:90], delta[:90])
    first.close_batch()
    second.update(x[90:], delta[90:])
    second.close_batch()
    kept = second.state()
    first.merge(GradientSketch.from_state(kept))
    assert torch.allclose(product(whole.triplets(6)), product(first.triplets(6)), atol=1e-5)
    assert (first.rows, first.batches) == (200, 2)
    assert all(torch.equal(kept[name], tensor) for name, tensor in second.state().items())


def test_sketches_through_other_directions_are_not_merged(seed):
    one = sketch_of(decaying(150, 170, 1.0, seed), 6, seed=seed)
    with pytest.raises(ConfigError, match="cannot be merged"):
        one.merge(GradientSketch(150, 170, 6, seed=seed + 1))
    other = sketch_of(decaying(150, 170, 1.0, seed + 1), 6, seed=seed)
    with pytest.raises(ConfigError, match="same directions"):
        one.refined().merge(other.refined())


@pytest.mark.parametrize("passes", [1, 2])
def test_a_stored_state_is_the_sketch(seed, passes):
    sketch = sketch_of(decaying(150, 170, 1.0, seed), 6, passes=passes, seed=seed)
    again = GradientSketch.from_state(sketch.state())
    assert torch.equal(product(again.triplets(6)), product(sketch.triplets(6)))
    assert again.triplets(6).certificate == sketch.triplets(6).certificate


def test_a_copy_is_independent(seed):
    sketch = sketch_of(decaying(150, 170, 1.0, seed), 6, seed=seed)
    before = product(sketch.triplets(6))
    copy = sketch.copy()
    copy.update(torch.ones(3, 170), torch.ones(3, 150))
    assert torch.equal(product(sketch.triplets(6)), before)
    assert not torch.allclose(product(copy.triplets(6)), before, atol=1e-3)


@pytest.mark.parametrize("shape", [(150, 170), (20, 30)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["rows", "gradients"])
def test_nan_and_inf_are_seen_and_leave_the_sketch_alone(shape, bad, where):
    sketch = sketch_of(decaying(*shape, 1.0, 0), 4)
    before = sketch.state()
    x, delta = torch.ones(3, shape[1]), torch.ones(3, shape[0])
    (x if where == "rows" else delta)[1, 2] = bad
    with pytest.raises(FloatingPointError):
        sketch.update(x, delta)
    assert all(torch.equal(before[name], tensor) for name, tensor in sketch.state().items())


@pytest.mark.parametrize("shape", [(150, 400), (20, 30)])
def test_indices_are_one_hot_rows(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, shape[1], (50,), generator=generator)
    delta = torch.randn(50, shape[0], generator=generator)
    by_index, by_row = GradientSketch(*shape, 6), GradientSketch(*shape, 6)
    by_index.update(index, delta)
    by_row.update(torch.nn.functional.one_hot(index, shape[1]).float(), delta)
    for name, tensor in by_row.state().items():
        assert torch.allclose(by_index.state()[name], tensor, atol=1e-4), name


def test_half_precision_rows_are_summed_in_full(seed):
    gradient = decaying(150, 170, 1.0, seed)
    x, delta = (part.bfloat16() for part in rows_with_product(gradient, 4000, seed))
    sketch = GradientSketch(150, 170, 6, seed=seed)
    for a, d in zip(x.split(100), delta.split(100), strict=True):
        sketch.update(a, d)
    rounded = GradientSketch(150, 170, 6, seed=seed)
    rounded.update(x.float(), delta.float())
    assert torch.allclose(product(sketch.triplets(6)), product(rounded.triplets(6)), atol=1e-5)
