"""Patterns that PEFT's own matcher reads as meant."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartinit.errors import ConfigError
from smartinit.formats.patterns import anchored, compact_patterns, exact_target_modules
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    import random

PARTS = st.sampled_from(["a", "b", "q_proj", "layers", "0", "1", "x-y", "z+"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


def test_an_anchored_pattern_matches_these_names_and_no_longer_one() -> None:
    tuners = pytest.importorskip("peft.utils.other")
    pattern = anchored(["a.q", "a.k+v"])
    for name, found in {"a.q": True, "a.k+v": True, "b.a.q": False, "a.q.x": False, "aXq": False, "q": False}.items():
        assert (tuners.get_pattern_key([pattern], name) == pattern) is found, name


def test_no_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one name"):
        anchored([])


@given(st.dictionaries(NAMES, st.integers(0, 4), min_size=1, max_size=8), st.booleans())
def test_peft_reads_every_rank_and_alpha_as_planned(ranks: dict[str, int], use_rslora: bool) -> None:
    tuners = pytest.importorskip("peft.utils.other")
    if not any(ranks.values()):
        return
    plan = Plan(ranks, {name: 16 * rank / 8 if rank else 16 for name, rank in ranks.items()}, use_rslora)
    made = compact_patterns(plan)
    assert made.r == max(ranks.values())
    assert len(made.rank_pattern) <= len(set(ranks.values()))
    for name, rank in ranks.items():
        if rank:
            found = tuners.get_pattern_key(made.rank_pattern, name)
            assert made.rank_pattern.get(found, made.r) == rank
            found = tuners.get_pattern_key(made.alpha_pattern, name)
            assert made.alpha_pattern.get(found, made.lora_alpha) == plan.alphas[name]
        else:
            assert tuners.get_pattern_key(made.rank_pattern, name) == name  # PEFT's word for: no pattern


def test_the_global_scaling_is_that_of_the_largest_rank() -> None:
    made = compact_patterns(Plan({"a": 8, "b": 2, "c": 0, "d": 8}, {"a": 16.0, "b": 4.0, "c": 99.0, "d": 16.0}))
    assert (made.r, made.lora_alpha) == (8, 16)
    assert isinstance(made.lora_alpha, int)
    assert made.rank_pattern == {"^(?:b)$": 2}
    assert made.alpha_pattern == {"^(?:b)$": 4}


def test_a_plan_without_ranks_is_refused() -> None:
    with pytest.raises(ConfigError, match="all 2 targets have rank 0"):
        compact_patterns(Plan({"a": 0, "b": 0}, {"a": 1, "b": 1}))


@given(st.sets(NAMES, min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_peft_selects_exactly_the_wanted_modules(names: set[str], chance: random.Random) -> None:
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    modules = sorted(names)
    wanted = chance.sample(modules, chance.randint(1, len(modules)))
    written = exact_target_modules(wanted, modules, complete=True)
    if not isinstance(written, str):
        written = set(written)
        if len(written) >= 20:  # what PEFT makes of longer lists before it uses them
            rest = [n for n in modules if n not in written and not n.endswith(tuple(f".{w}" for w in written))]
            written = tuners._find_minimal_target_modules(written, rest)
    config = SimpleNamespace(target_modules=written, target_parameters=None)
    assert [name for name in modules if tuners.check_target_module_exists(config, name)] == sorted(wanted)


def test_a_list_is_preferred_and_an_expression_is_used_where_a_list_would_take_more() -> None:
    assert exact_target_modules(["a.q", "a.k", "a.q"], ["a.q", "a.k", "a.v"], complete=True) == ["a.q", "a.k"]
    assert exact_target_modules(["a.q"], ["a.q", "b.a.q"], complete=True) == r"^(?:a\.q)$"
    assert exact_target_modules(["q"], [], complete=False) == "^(?:q)$"
    assert exact_target_modules(["q"], [], complete=True) == ["q"]
    assert exact_target_modules(["a.q"], [], complete=False) == ["a.q"]


def test_many_layers_make_few_patterns() -> None:
    """PEFT tries every pattern for every layer: with one for each of 882 layers it takes half a minute to load."""
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(126) for kind in "qkvoabc"]
    made = compact_patterns(Plan({name: 1 + i % 7 for i, name in enumerate(names)}, dict.fromkeys(names, 8)))
    assert len(names) == 882
    assert len(made.rank_pattern) == 6
    assert made.alpha_pattern == {}
