"""Endless rows for the demo: pairs, conversations and plain text, from the families of the three `*_rows` modules.

Rows depend on the seed alone: the files under ``demo/data`` can be made again byte for byte. Licence: Apache-2.0.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from demo_rows import facts, language_rows, number_rows, python_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Pair = tuple[str, str]
    Family = Callable[[Random], Pair]

# The order is part of what a seed means: a new family goes to the end.
FAMILIES: tuple[Family, ...] = (
    number_rows.arithmetic,
    number_rows.word_problem,
    number_rows.conversion,
    number_rows.number_property,
    language_rows.string_task,
    language_rows.list_task,
    python_rows.expression,
    python_rows.callable_fact,
    python_rows.failure,
    python_rows.function,
    number_rows.calendar_task,
    language_rows.vocabulary,
    language_rows.record,
    language_rows.log_summary,
    language_rows.story,
)


def pairs(seed: int, *, without: frozenset[str] = frozenset()) -> Iterator[Pair]:
    """Endless (prompt, completion) pairs, families drawn evenly; none whose prompt is in ``without``."""
    rng = Random(seed)  # noqa: S311  reproducible rows, no secrets
    while True:
        prompt, completion = rng.choice(FAMILIES)(rng)
        if prompt not in without:
            yield prompt, completion


def conversations(seed: int, *, without: frozenset[str] = frozenset()) -> Iterator[list[dict[str, str]]]:
    """Endless conversations of one to three turns, a third of them with a system message."""
    rng = Random(seed + 1)  # noqa: S311  as above
    source = pairs(seed, without=without)
    while True:
        messages = [{"role": "system", "content": rng.choice(facts.SYSTEM_MESSAGES)}] if rng.random() < 1 / 3 else []
        for _ in range(rng.randint(1, 3)):
            prompt, completion = next(source)
            messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        yield messages


def texts(seed: int) -> Iterator[str]:
    """Endless short paragraphs without a question: a sentence about a person, then one or two stories."""
    rng = Random(seed)  # noqa: S311  as above
    while True:
        portrait = f"{rng.choice(facts.NAMES)} is {rng.randint(18, 80)} and works at the {rng.choice(facts.PLACES)}."
        yield " ".join((portrait, *(language_rows.story(rng)[1] for _ in range(rng.randint(1, 2)))))
