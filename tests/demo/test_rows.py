from __future__ import annotations

import itertools
from random import Random
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from demo_rows import facts, rows
else:
    facts = pytest.importorskip("demo_rows.facts", reason="scripts/ is not beside tests/")
    rows = pytest.importorskip("demo_rows.rows")


@pytest.mark.parametrize("family", rows.FAMILIES, ids=lambda f: f.__name__)
def test_each_family_gives_varied_plain_rows(family: rows.Family, seed: int):
    rng = Random(seed)
    drawn = [family(rng) for _ in range(300)]
    assert all(p.strip() == p != "" and c.strip() == c != "" for p, c in drawn)
    assert len({p for p, _ in drawn}) > 100


def test_arithmetic_answers_are_right(seed: int):
    checked = 0
    for prompt, answer in itertools.islice(rows.pairs(seed), 5000):
        left, equals, right = answer.rstrip(".").partition(" = ")
        if equals and set(left) <= set("0123456789 +-*"):
            assert eval(left) == eval(right.split(",")[0]), prompt  # noqa: S307  digits and signs only
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("entry", facts.CALLABLES, ids=lambda e: e[0])
def test_examples_use_what_they_explain(entry: tuple[str, str, str]):
    name, _, example = entry
    eval(example)  # noqa: S307  our own table
    assert f"{name.rpartition('.')[2]}(" in example


@pytest.mark.parametrize("entry", facts.FAILURES, ids=lambda e: e[0])
def test_failures_fail(entry: tuple[str, str]):
    with pytest.raises(Exception):  # noqa: B017, PT011  each entry has its own exception
        eval(entry[0])  # noqa: S307  our own table


def test_rows_depend_on_the_seed_alone(seed: int):
    def first(start: int) -> list[tuple[str, str]]:
        return list(itertools.islice(rows.pairs(start), 50))

    assert first(seed) == first(seed)
    assert first(seed) != first(seed + 1)


def test_conversations_avoid_the_given_prompts(seed: int):
    known = frozenset(p for p, _ in itertools.islice(rows.pairs(seed), 300))
    talks = itertools.islice(rows.conversations(seed, without=known), 300)
    assert not known & {m["content"] for talk in talks for m in talk}
