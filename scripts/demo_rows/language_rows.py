"""Tasks on letters, words, lists, records and short texts.

Each function draws one (prompt, completion) pair; the answer is computed. See :mod:`demo_rows.rows`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from demo_rows import facts

if TYPE_CHECKING:
    from random import Random

    Pair = tuple[str, str]


def string_task(rng: Random) -> Pair:
    """Change, count and reorder the letters of a phrase."""
    text = _phrase(rng, rng.randint(1, 3))
    letter = rng.choice("aeinrst")
    words = text.split()
    return rng.choice(
        (
            (f"Write '{text}' in capital letters.", text.upper()),
            (f"Reverse the text '{text}'.", text[::-1]),
            (f"How many letters has '{words[0]}'?", f"'{words[0]}' has {len(words[0])} letters."),
            (
                f"How often does '{letter}' occur in '{text}'?",
                f"'{letter}' occurs {_counted(text.count(letter), 'time')}.",
            ),
            (f"Sort the letters of '{words[0]}'.", "".join(sorted(words[0]))),
            (f"Remove the vowels from '{text}'.", "".join(c for c in text if c not in "aeiou")),
            (f"Turn '{text}' into snake case.", "_".join(words)),
            (f"Turn '{text}' into camel case.", words[0] + "".join(w.capitalize() for w in words[1:])),
            (f"Spell '{words[-1]}' letter by letter.", " ".join(words[-1])),
            (f"Give the first letters of '{text}'.", "".join(w[0] for w in words)),
        )
    )


def list_task(rng: Random) -> Pair:
    """Sort, select and summarise a list of numbers or words."""
    numbers = [rng.randint(1, 60) for _ in range(rng.randint(3, 7))]
    words = rng.sample(facts.WORDS, rng.randint(3, 5))
    shown = ", ".join(map(str, numbers))
    return rng.choice(
        (
            (f"Sort these numbers: {shown}.", ", ".join(map(str, sorted(numbers)))),
            (f"Sort from large to small: {shown}.", ", ".join(map(str, sorted(numbers, reverse=True)))),
            (f"What is the largest of {shown}?", f"The largest is {max(numbers)}."),
            (f"Add up {shown}.", f"{' + '.join(map(str, numbers))} = {sum(numbers)}."),
            (f"Which of {shown} are even?", ", ".join(str(n) for n in numbers if n % 2 == 0) or "None of them."),
            (f"Put in alphabetical order: {', '.join(words)}.", ", ".join(sorted(words))),
            (f"Which word is the longest: {', '.join(words)}?", f"The longest is '{max(words, key=len)}'."),
            (f"Write as a bulleted list: {', '.join(words)}.", "\n".join(f"- {w}" for w in words)),
        )
    )


def vocabulary(rng: Random) -> Pair:
    """Categories and opposites of everyday words."""
    kind, other = rng.sample(sorted(facts.CATEGORIES), 2)
    word, stray = rng.choice(facts.CATEGORIES[kind]), rng.choice(facts.CATEGORIES[other])
    three = [*rng.sample(facts.CATEGORIES[kind], 3), stray]
    rng.shuffle(three)
    left, right = rng.choice(facts.OPPOSITES)
    return rng.choice(
        (
            (f"Is '{word}' a kind of {kind} or a kind of {other}?", f"'{word}' is a kind of {kind}."),
            (
                f"Name three words of the category {kind}, but not '{word}'.",
                ", ".join([w for w in facts.CATEGORIES[kind] if w != word][:3]),
            ),
            (
                f"Which word does not fit: {', '.join(three)}?",
                f"'{stray}' does not fit: it is a kind of {other}, the rest are of the kind {kind}.",
            ),
            (
                f"What is the opposite of '{left}'? Use the word {_phrase(rng, 1)} too.",
                f"The opposite of '{left}' is '{right}'.",
            ),
        )
    )


def record(rng: Random) -> Pair:
    """Move facts between prose, JSON and CSV."""
    who, place, age = rng.choice(facts.NAMES), rng.choice(facts.PLACES), rng.randint(18, 80)
    data = {"name": who, "age": age, "place": place}
    prose = f"{who} is {age} years old and works at the {place}."
    as_json, as_csv = json.dumps(data, ensure_ascii=False), f"name,age,place\n{who},{age},{place}"
    return rng.choice(
        (
            (f"Turn this into JSON: {prose}", as_json),
            (f"Turn this into CSV with a header: {prose}", as_csv),
            (f"Say this in a sentence: {as_json}", prose),
            (f"How old is {who}? {prose}", f"{who} is {age} years old."),
            (f"Where does {who} work? {prose}", f"{who} works at the {place}."),
        )
    )


def log_summary(rng: Random) -> Pair:
    """Count the levels of a small log."""
    levels = [rng.choice(("INFO", "INFO", "WARNING", "ERROR")) for _ in range(rng.randint(3, 6))]
    lines = [f"{8 + i:02d}:{rng.randint(0, 59):02d} {level} {_phrase(rng, 2)}" for i, level in enumerate(levels)]
    errors, warnings = levels.count("ERROR"), levels.count("WARNING")
    return (
        "Summarise this log:\n" + "\n".join(lines),
        f"{len(levels)} lines, {_counted(errors, 'error')} and {_counted(warnings, 'warning')}. "
        + ("Look at the errors first." if errors else "All is well."),
    )


def story(rng: Random) -> Pair:
    """A few plain sentences about a person, a place and a thing."""
    who, other = rng.sample(facts.NAMES, 2)
    place, find = rng.choice(facts.PLACES), rng.choice(facts.FINDS)
    return f"Tell a very short story about {who}, {other} and {find}.", (
        f"{rng.choice(facts.WEATHER)} when {who} walked to the {place}. {other} was already there and looked at the "
        f"{_phrase(rng, 1)}. Under it lay {find}. {rng.choice(facts.ENDINGS)}"
    )


def _phrase(rng: Random, count: int = 3) -> str:
    return " ".join(rng.sample(facts.WORDS, count))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
