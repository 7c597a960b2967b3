"""Questions about Python, answered by running it.

Each function draws one (prompt, completion) pair; the answer is computed. See :mod:`demo_rows.rows`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo_rows import facts

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

    Pair = tuple[str, str]


def expression(rng: Random) -> Pair:
    """What a Python expression gives, computed by Python."""
    numbers = [rng.randint(0, 20) for _ in range(rng.randint(3, 7))]
    word, n = rng.choice(facts.WORDS), rng.randint(2, 5)
    source = rng.choice(
        (
            *(f"sorted({numbers})", f"{numbers}[::{n}]", f"{numbers}[-1]", f"len({numbers})", f"max({numbers}) - {n}"),
            *(f"'{word}'[:{n}]", f"'{word}' * {n}", f"'{word}'.upper()", f"'{word}'[-{n}:]", f"'{word}'.find('e')"),
            *(f"[x * {n} for x in range({n + 2})]", f"sum(range({numbers[0]}))", f"{n} ** {numbers[1] % 6}"),
            *(
                f"{numbers[0]} // {n}",
                f"{numbers[0]} % {n} == 0",
                f"dict(zip('ab', {numbers[:2]}))",
                f"list('{word}')[:{n}]",
            ),
        )
    )
    ask = rng.choice(
        ("What does `{}` return in Python?", "Evaluate the Python expression `{}`.", "What is the value of `{}`?")
    )
    return ask.format(source), f"It gives `{_value(source)}`."


def callable_fact(rng: Random) -> Pair:
    """What a built-in function or method is for, with an example."""
    name, does, example = rng.choice(facts.CALLABLES)
    ask = (
        f"What does {name} do?",
        f"Explain `{name}` in one sentence.",
        f"What is {name} good for in Python? Give an example.",
        f"{rng.choice(facts.NAMES)} asks what `{name}` does. What do you say?",
    )
    return rng.choice(ask), f"It {does}. For example, `{example}` gives `{_value(example)}`."


def failure(rng: Random) -> Pair:
    """Which exception an expression raises; found by running it."""
    source, reason = rng.choice(facts.FAILURES)
    try:
        _value(source)
    except Exception as error:  # noqa: BLE001  the type is what the row asks for
        name = type(error).__name__
    else:  # pragma: no cover - a test checks the table
        message = f"the expression {source!r} of facts.FAILURES does not fail; give one that does"
        raise AssertionError(message)
    who = rng.choice(facts.NAMES)
    ask = (
        f"Which exception does `{source}` raise?",
        f"{who} runs `{source}` and it fails. Why?",
        f"What is wrong with `{source}`?",
    )
    return rng.choice(ask), f"It raises {name}: {reason}."


def function(rng: Random) -> Pair:
    """Write a small function, with the result of one call."""
    task, body, argument = rng.choice(facts.FUNCTIONS)
    name = rng.choice(facts.FUNCTION_NAMES)
    code = f"def {name}(x):\n    {body.format(name=name)}"
    scope: dict[str, Callable[[object], object]] = {}
    exec(code, scope)  # noqa: S102  only functions written in this package
    result = scope[name](eval(argument, {}))  # noqa: S307  likewise
    return f"Write a Python function `{name}` that {task}.", f"{code}\n\n`{name}({argument})` gives `{result!r}`."


def _value(source: str) -> str:
    """What Python answers to an expression of this package's own tables and templates."""
    return repr(eval(source, {}))  # noqa: S307  only expressions written in this package reach this line
