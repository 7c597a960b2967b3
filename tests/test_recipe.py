"""Equal requests have equal digests, different ones different digests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartinit.errors import ArgumentError, ConfigError
from smartinit.recipe import Recipe

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
MAPPINGS = st.dictionaries(st.text(max_size=4), VALUES, max_size=4)
RECIPES = st.builds(
    Recipe,
    method=st.text(max_size=8),
    options=MAPPINGS,
    planner=MAPPINGS,
    targets=st.lists(st.text(max_size=8), max_size=4).map(tuple),
    sampling=MAPPINGS,
    numerics=MAPPINGS,
    seed=st.integers(),
    version=st.text(max_size=8),
)


def recipe(**changes: object) -> Recipe:
    """One recipe, with some fields changed."""
    made = Recipe("eva", {"whiten": False}, {"name": "variance"}, ("a.q", "a.k"), {"batches": None}, {}, 0, "1.0")
    return replace(made, **changes)


def reversed_keys(value: object) -> object:
    """The same value, every mapping written in the opposite order."""
    if isinstance(value, Mapping):
        return {key: reversed_keys(value[key]) for key in reversed(list(value))}
    return [reversed_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def changed_leaves(value: object) -> list[object]:
    """Copies of a value, each with one leaf changed."""
    if isinstance(value, dict):
        return [{**value, key: other} for key, item in value.items() for other in changed_leaves(item)]
    if isinstance(value, list):
        return [[*value[:i], other, *value[i + 1 :]] for i, item in enumerate(value) for other in changed_leaves(item)]
    return [f"{value}!" if isinstance(value, str) else "changed"]


@given(RECIPES)
def test_the_digest_does_not_depend_on_the_order_of_keys(made: Recipe) -> None:
    assert Recipe.from_dict(reversed_keys(made.as_dict())).digest == made.digest


@given(RECIPES)
def test_the_digest_differs_when_any_leaf_differs(made: Recipe) -> None:
    data = made.as_dict()
    for name, value in data.items():
        if name in {"method", "version"}:
            continue
        for other in changed_leaves(value):
            if name != "seed":
                assert Recipe.from_dict({**data, name: other}).digest != made.digest
    assert replace(made, seed=made.seed + 1).digest != made.digest
    assert replace(made, method=made.method + "!").digest != made.digest
    assert replace(made, version=made.version + "!").digest != made.digest


@given(RECIPES)
def test_a_recipe_survives_json(made: Recipe) -> None:
    again = Recipe.from_dict(json.loads(made.canonical()))
    assert again == made
    assert hash(again) == hash(made)
    assert again.digest == made.digest


def test_the_canonical_text_is_what_it_says() -> None:
    text = recipe(options={"b": 0.1, "a": 1e-07, "ü": True}).canonical()
    assert '"options":{"a":1e-07,"b":0.1,"\\u00fc":true}' in text
    assert " " not in text
    assert text.isascii()


def test_numbers_and_texts_that_look_alike_differ() -> None:
    digests = {recipe(options={"x": value}).digest for value in (1, 1.0, "1", True, None, [1], {"1": 1})}
    assert len(digests) == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_without_canonical_form_is_refused_by_place(value: float) -> None:
    with pytest.raises(ConfigError, match=r"planner\.caps\[1\]"):
        recipe(planner={"caps": [1.0, value]})


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), {1: "a"}])
def test_what_json_has_no_form_for_is_refused(value: object) -> None:
    with pytest.raises(ArgumentError, match="sampling"):
        recipe(sampling={"x": value})


def test_a_recipe_is_a_value() -> None:
    options = {"whiten": False, "list": [1]}
    made = recipe(options=options)
    digest = made.digest
    options["whiten"] = True
    options["list"].append(2)
    assert made.digest == digest
    with pytest.raises(TypeError):
        made.options["whiten"] = True


@pytest.mark.parametrize("data", [{}, {"method": "eva"}, {**recipe().as_dict(), "more": 1}])
def test_fields_must_be_exactly_those_of_a_recipe(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="exactly the fields"):
        Recipe.from_dict(data)


def test_a_field_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="planner"):
        Recipe.from_dict({**recipe().as_dict(), "planner": [1]})
