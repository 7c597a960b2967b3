"""Questions about numbers, quantities and days, with computed answers.

Each function draws one (prompt, completion) pair; the answer is computed. See :mod:`demo_rows.rows`.
"""

from __future__ import annotations

import math
from datetime import date, timedelta
from typing import TYPE_CHECKING

from demo_rows import facts

if TYPE_CHECKING:
    from random import Random

    Pair = tuple[str, str]


def arithmetic(rng: Random) -> Pair:
    """Sums, differences, products, remainders and percentages of whole numbers."""
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    small = rng.randint(2, 12)
    percent = rng.choice((10, 20, 25, 50))
    question, answer = rng.choice(
        (
            (f"{a} + {b}", f"{a} + {b} = {a + b}."),
            (f"{max(a, b)} - {min(a, b)}", f"{max(a, b)} - {min(a, b)} = {max(a, b) - min(a, b)}."),
            (f"{a} times {small}", f"{a} times {small} is {a * small}."),
            (f"{a * small} divided by {small}", f"{a * small} divided by {small} is {a}."),
            (
                f"the remainder of {a} divided by {small}",
                f"{a} = {a // small} * {small} + {a % small}, so it is {a % small}.",
            ),
            (f"{percent} percent of {a * 20}", f"{percent} percent of {a * 20} is {a * 20 * percent // 100}."),
        )
    )
    return rng.choice(("What is {}?", "Compute {}.", "Please work out {}.", "How much is {}?")).format(question), answer


def word_problem(rng: Random) -> Pair:
    """A short story with one sum in it."""
    who, other = rng.sample(facts.NAMES, 2)
    thing = rng.choice(facts.CATEGORIES[rng.choice(("fruit", "tool", "instrument"))])
    have, more = rng.randint(3, 40), rng.randint(2, 20)
    if rng.random() < 0.5:  # noqa: PLR2004  a fair coin
        return (
            (
                f"{who} has {have} boxes with {_article(thing)} in each. {other} brings {more} more. "
                "How many boxes are there now?"
            ),
            (
                f"{who} starts with {have} and gets {more} more. {have} + {more} = {have + more}, "
                f"so there are {have + more} boxes."
            ),
        )
    return (
        f"{who} packs {more} bags, each with {have} {thing} stickers. How many stickers is that?",
        f"{more} bags with {have} stickers each make {more} * {have} = {more * have} stickers.",
    )


def conversion(rng: Random) -> Pair:
    """Units, temperatures, number bases and Roman numerals."""
    source, target, factor = rng.choice(facts.UNITS)
    n = rng.randint(2, 90)
    roman, rest = "", n
    for size, letters in facts.ROMAN:
        roman, rest = roman + letters * (rest // size), rest % size
    return rng.choice(
        (
            (
                f"Convert {n} {source} to {target}.",
                f"{n} {source} are {n * factor} {target}, since one makes {factor}.",
            ),
            (f"How many {target} are {n} {source}?", f"{n} {source} are {n * factor} {target}."),
            (f"Convert {5 * n} degrees Celsius to Fahrenheit.", f"{5 * n} °C are {9 * n + 32} °F."),
            (f"Write {n} in binary.", f"{n} in binary is {n:b}."),
            (f"Write {n * 7} in hexadecimal.", f"{n * 7} in hexadecimal is {n * 7:x}."),
            (f"Write {n} as a Roman numeral.", f"{n} as a Roman numeral is {roman}."),
        )
    )


def number_property(rng: Random) -> Pair:
    """Parity, primes, divisors, common divisors, sequences."""
    n, step = rng.randint(4, 99), rng.randint(2, 9)
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    prime = "Yes, it has no divisor but 1 and itself." if divisors[1] == n else f"No, {divisors[1]} divides it."
    sequence = [n + step * i for i in range(6)]
    a, b = n, rng.randint(4, 99)
    return rng.choice(
        (
            (f"Is {n} a prime number?", prime),
            (f"Is {n} even or odd?", f"{n} is {'odd' if n % 2 else 'even'}."),
            (f"List the divisors of {n}.", ", ".join(map(str, divisors))),
            (
                f"Continue the sequence {', '.join(map(str, sequence[:4]))}.",
                f"{sequence[4]}, {sequence[5]} (it grows by {step}).",
            ),
            (f"What is the greatest common divisor of {a} and {b}?", f"gcd({a}, {b}) = {math.gcd(a, b)}."),
            (
                f"Which is larger, {a * step} or {b * step}?",
                f"{max(a, b) * step} is larger." if a != b else "They are equal.",
            ),
        )
    )


def calendar_task(rng: Random) -> Pair:
    """Week days, leap years and distances between days."""
    day, shift = date(2000, 1, 1) + timedelta(days=rng.randint(0, 12000)), rng.randint(2, 60)
    later = day + timedelta(days=shift)
    leap = day.year % 4 == 0 and (day.year % 100 != 0 or day.year % 400 == 0)
    return rng.choice(
        (
            (f"Which day of the week was {day}?", f"{day} was a {facts.WEEKDAYS[day.weekday()]}."),
            (f"Which date is {shift} days after {day}?", f"{shift} days after {day} is {later}."),
            (f"How many days lie between {day} and {later}?", f"From {day} to {later} it is {shift} days."),
            (f"Is {day.year} a leap year?", f"{'Yes' if leap else 'No'}, {day.year} has {366 if leap else 365} days."),
        )
    )


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
