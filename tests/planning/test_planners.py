"""Budgets and caps hold for anything; the allocation equals a brute-force oracle's, and PEFT's."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartinit.errors import ConfigError
from smartinit.planning.limits import Limits
from smartinit.planning.plan import Plan
from smartinit.planning.scaling import plan_with_alphas
from smartinit.planning.uniform import uniform_ranks
from smartinit.planning.variance import component_limit, variance_ranks


@st.composite
def requests(draw):
    count = draw(st.integers(1, 9))
    names = [f"layer{i}" for i in range(count)]
    ranks = {n: draw(st.integers(1, 12)) for n in names}
    rho = draw(st.sampled_from([1.0, 1.5, 2.0, 3.0]))
    caps = {n: draw(st.integers(ranks[n], 40)) for n in names}
    seed = draw(st.integers(0, 10_000))
    generator = np.random.default_rng(seed)
    ratios = {}
    for n in names:
        values = np.sort(generator.random(component_limit(ranks[n], rho, caps[n])) ** 3)[::-1]
        ratios[n] = values / values.sum() * generator.uniform(0.3, 1.0)
    costs = {n: draw(st.integers(2, 300)) for n in names}
    return ratios, ranks, caps, costs


@st.composite
def bounds(draw, ranks, costs):
    kind = draw(st.sampled_from(["default", "budget", "params"]))
    return Limits(
        budget=draw(st.integers(1, 100)) if kind == "budget" else None,
        params=draw(st.integers(1, 20_000)) if kind == "params" else None,
        multiple_of=draw(st.integers(1, 4)),
        min_rank=draw(st.integers(0, 2)),
        max_rank=draw(st.none() | st.integers(2, 12)),
    )


@settings(max_examples=200)
@given(st.data())
def test_budget_and_caps_hold_for_any_request(data):
    ratios, ranks, caps, costs = data.draw(requests())
    limits = data.draw(bounds(ranks, costs))
    for planner in ("variance", "uniform"):
        try:
            got = (
                variance_ranks(ratios, ranks, costs, limits)
                if planner == "variance"
                else uniform_ranks(ranks, caps, costs, limits)
            )
        except ConfigError as error:
            if "min_rank" not in str(error):
                raise
            continue
        assert list(got) == list(ranks)
        budget, price = limits.allowance(ranks, costs)
        assert sum(rank * price[n] for n, rank in got.items()) <= budget
        for name, rank in got.items():
            assert rank % limits.multiple_of == 0
            assert rank >= limits.min_rank
            assert rank <= (limits.max_rank or 10**9)
            assert rank <= (len(ratios[name]) if planner == "variance" else caps[name])


@settings(max_examples=100)
@given(requests())
def test_variance_equals_sorting_everything(request):
    ratios, ranks, _, costs = request
    got = variance_ranks(ratios, ranks, costs)
    everything = sorted((-v, i, n) for n, values in ratios.items() for i, v in enumerate(values))
    oracle = dict.fromkeys(ratios, 0)
    for _, _, name in everything[: sum(ranks.values())]:
        oracle[name] += 1
    assert got == oracle


def test_variance_maximises_the_explained_share_among_all_allocations():
    generator = np.random.default_rng(3)
    ratios = {n: np.sort(generator.random(4))[::-1] for n in "abc"}
    ranks = dict.fromkeys("abc", 2)
    got = variance_ranks(ratios, ranks, dict.fromkeys("abc", 1))
    best = max(
        (p for p in itertools.product(range(5), repeat=3) if sum(p) <= 6),
        key=lambda p: sum(ratios[n][:k].sum() for n, k in zip("abc", p, strict=True)),
    )
    assert tuple(got.values()) == best


def test_equal_shares_go_to_the_first_target_of_a_site():
    ratios = {name: [0.5, 0.3, 0.1] for name in ("q", "k", "v")}
    got = variance_ranks(ratios, dict.fromkeys(ratios, 1), dict.fromkeys(ratios, 1), Limits(budget=4))
    assert list(got.values()) == [2, 1, 1]


def test_params_budget_buys_where_a_parameter_explains_most():
    ratios = {"wide": [0.5, 0.4], "narrow": [0.3, 0.2]}
    got = variance_ranks(ratios, {"wide": 1, "narrow": 1}, {"wide": 1000, "narrow": 10}, Limits(params=1020))
    assert got == {"wide": 1, "narrow": 2}
    assert variance_ranks(ratios, {"wide": 1, "narrow": 1}, {"wide": 1000, "narrow": 10}, Limits(params=30)) == {
        "wide": 0,
        "narrow": 2,
    }


def test_allocation_equals_pefts(seed):
    """PEFT's rule, reached through its own function, on the same explained-variance ratios."""
    torch = pytest.importorskip("torch")
    eva = pytest.importorskip("peft.tuners.lora.eva")
    import inspect

    source = inspect.getsource(eva._get_eva_state_dict)
    body = source[source.index("    def _get_rank_distribution") : source.index("    # dataloader is not empty")]
    namespace: dict = {"torch": torch, "Counter": __import__("collections").Counter}
    # PEFT keeps the rule inside another function: it is cut out and run as it is.
    exec("\n".join(line[4:] for line in body.splitlines()), namespace)  # noqa: S102
    generator = torch.Generator().manual_seed(seed)
    ratios = {n: torch.rand(8, generator=generator).sort(descending=True).values for n in ("a", "b", "c", "d")}
    hooks = {n: (SimpleNamespace(svd=SimpleNamespace(explained_variance_ratio_=r)), None) for n, r in ratios.items()}
    theirs = namespace["_get_rank_distribution"](hooks, {n: n for n in ratios}, {}, 16, dict.fromkeys(ratios, 8))
    ours = variance_ranks(
        {n: r.tolist() for n, r in ratios.items()}, dict.fromkeys(ratios, 4), dict.fromkeys(ratios, 1)
    )
    assert ours == theirs


def test_components_round_as_peft_does():
    assert component_limit(5, 1.5, 100) == round(7.5) == 8
    assert component_limit(3, 1.5, 100) == round(4.5) == 4  # to even
    assert component_limit(8, 2000.0, 64) == 64


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(budget=4, params=9), "not both"),
        (dict(budget=0), "budget=0: expected at least 1"),
        (dict(multiple_of=0), "multiple_of=0"),
        (dict(min_rank=-1), "min_rank=-1"),
        (dict(min_rank=9, max_rank=4), "min_rank=9 is above max_rank=4"),
    ],
)
def test_contradictory_limits_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        Limits(**options)


def test_min_rank_above_the_budget_is_refused():
    with pytest.raises(ConfigError, match="above the budget of 3"):
        variance_ranks({"a": [1, 1], "b": [1, 1]}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, Limits(budget=3, min_rank=2))


def test_scaling_stays_when_ranks_change():
    for rslora in (False, True):
        plan = plan_with_alphas(
            {"a": 4, "b": 16, "c": 0}, dict.fromkeys("abc", 8), dict.fromkeys("abc", 32), use_rslora=rslora
        )
        before = Plan(dict.fromkeys("abc", 8), dict.fromkeys("abc", 32), rslora)
        assert plan.scaling("a") == pytest.approx(before.scaling("a"))
        assert plan.scaling("b") == pytest.approx(before.scaling("b"))
        assert plan.scaling("c") == 0.0
        assert plan.total == 20
    fixed = plan_with_alphas({"a": 4}, {"a": 8}, {"a": 32}, adjust=False)
    assert fixed.alphas["a"] == 32


def test_plan_round_trip_and_digest():
    plan = Plan({"a": 4, "b": 0}, {"a": 8, "b": 8})
    assert Plan.from_dict(plan.as_dict()) == plan
    assert Plan.from_dict(plan.as_dict()).digest == plan.digest
    assert Plan({"a": 5, "b": 0}, {"a": 8, "b": 8}).digest != plan.digest
    with pytest.raises(TypeError):
        plan.ranks["a"] = 1
