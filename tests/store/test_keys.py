from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartinit.errors import ArgumentError, ConfigError
from smartinit.store.keys import Key, canonical, check_name, differences

VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(), inner, max_size=4)),
    max_leaves=20,
)
LEAVES = st.dictionaries(st.text(), VALUES, max_size=5)


def shuffled(value):
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return tuple(map(shuffled, value)) if isinstance(value, list) else value


@given(LEAVES)
def test_the_digest_is_of_the_values_not_of_their_order(leaves):
    one, other = Key("kind", leaves), Key("kind", shuffled(leaves))
    assert one.digest == other.digest == str(other)
    assert hash(one) == hash(other)
    assert check_name(one) == one.digest
    assert canonical(leaves).isascii()
    assert json.loads(canonical(leaves)) == leaves


@given(LEAVES, LEAVES, st.text(), st.text())
def test_other_values_have_another_digest(leaves, others, kind, other_kind):
    told = differences(leaves, others)
    assert (Key(kind, leaves).digest == Key(kind, others).digest) == (canonical(leaves) == canonical(others))
    if canonical(leaves) == canonical(others):
        assert told == []
    assert (Key(kind, leaves).digest == Key(other_kind, leaves).digest) == (kind == other_kind)


@pytest.mark.parametrize("pair", [(1, True), (1, 1.0), (0.0, -0.0), ("1", 1), (None, 0), ([], {}), ([1], [[1]])])
def test_values_that_python_or_people_take_for_equal_are_not(pair):
    assert Key("kind", {"x": pair[0]}).digest != Key("kind", {"x": pair[1]}).digest


@pytest.mark.parametrize("pair", [(1, True), (1, 1.0), (0.0, -0.0), (None, 0), ([], {})])
def test_differences_tell_what_python_takes_for_equal(pair):
    assert differences({"x": [pair[0]]}, {"x": [pair[1]]}) == [("x[0]", *pair)]


def test_differences_name_the_leaf():
    ours = {"a": {"b": [1, {"c": 2}]}, "same": 1, "gone": "x"}
    theirs = {"a": {"b": [1, {"c": 3}]}, "same": 1, "new": [1]}
    assert differences(ours, theirs) == [("a.b[1].c", 2, 3), ("gone", "x", None), ("new", None, [1])]
    assert differences([1, 2], [1]) == [("", [1, 2], [1])]
    assert differences((1, 2), [1, 2]) == []


@given(st.text())
def test_a_name_is_one_plain_file_name_or_refused(text):
    if re.fullmatch(r"[a-z0-9_-]*", text) is None or not text:
        with pytest.raises(ConfigError) as told:
            check_name(text)
        assert str(told.value).isprintable()
        return
    with suppress(ConfigError):
        assert check_name(text) == text == Path(text).name


def test_names_that_are_keys():
    for name in ("a", "0", "a-b_c", "f" * 64, "x" * 128, "con-1", "aux_", "com10", "nullify"):
        assert check_name(name) == name
    with pytest.raises(ArgumentError):
        check_name(3)


@pytest.mark.parametrize("value", [object(), {1: 2}, float("nan"), float("inf"), {1, 2}, b"x", [[object()]]])
def test_what_json_has_no_form_for(value):
    with pytest.raises(ArgumentError):
        canonical({"a": value})


def test_lists_in_lists_are_bounded():
    value: object = 1
    for _ in range(60):
        value = [value]
    canonical(value)
    for _ in range(10):
        value = {"a": value}
    with pytest.raises(ArgumentError, match="in each other"):
        canonical(value)
