r"""Ranks, alphas and target names as the few patterns that PEFT's matcher reads fast and rightly.

PEFT tries the keys of ``rank_pattern`` one by one, each as ``re.match(rf"(.*\.)?({key})$", name)``, for every module.
One key per layer is quadratic (34-55 s for 882 layers); one key per distinct rank, with all of its names in an
anchored alternation, takes 0.07 s and cannot match a longer name by its ending.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from smartinit.planning.plan import Plan

N = TypeVar("N", int, float)


@dataclass(frozen=True)
class CompactPatterns:
    """The four rank fields of an adapter's configuration.

    Attributes:
        r: the largest rank: what a server must reserve.
        lora_alpha: the commonest alpha among the targets of that rank.
        rank_pattern: anchored pattern -> rank, for every target with another rank.
        alpha_pattern: anchored pattern -> alpha, for every target with another alpha.
    """

    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]


def anchored(names: Iterable[str]) -> str:
    """A regular expression that matches exactly these full names, with PEFT's matcher too.

    Raises:
        ConfigError: no names: the pattern would match the empty name.
    """
    parts = [re.escape(name) for name in names]
    if not parts:
        raise ConfigError("a pattern needs at least one name")
    return f"^(?:{'|'.join(parts)})$"


def compact_patterns(plan: Plan) -> CompactPatterns:
    """The plan's ranks and alphas, grouped by value; targets of rank 0 appear nowhere.

    Raises:
        ConfigError: every target has rank 0.
    """
    ranks = {name: rank for name, rank in plan.ranks.items() if rank > 0}
    if not ranks:
        raise ConfigError(
            f"all {len(plan.ranks)} targets have rank 0, so there is no adapter to write; give a larger rank"
        )
    largest = max(ranks.values())
    alphas = {name: _plain(plan.alphas[name]) for name in ranks}
    alpha = Counter(alphas[name] for name, rank in ranks.items() if rank == largest).most_common(1)[0][0]
    return CompactPatterns(
        r=largest,
        lora_alpha=alpha,
        rank_pattern={anchored(names): rank for rank, names in _by_value(ranks).items() if rank != largest},
        alpha_pattern={anchored(names): value for value, names in _by_value(alphas).items() if value != alpha},
    )


def exact_target_modules(wanted: Iterable[str], others: Iterable[str], *, complete: bool) -> list[str] | str:
    """What to write as ``target_modules`` so that exactly ``wanted`` are selected.

    A list of full names where PEFT's rule (the name itself, or any longer name that ends with ``.<entry>``)
    selects nothing else, since lists are what most tools read; an anchored expression otherwise.

    Args:
        wanted: full names of the modules with an adapter.
        others: names of other modules of the model.
        complete: ``others`` are all there are. If not, the list is given up as soon as one name has no dot,
            because such a short name may well end a longer one.

    Cost: O(number of names · depth of the names).
    """
    names = list(dict.fromkeys(wanted))
    chosen = set(names)
    ambiguous = any(_endings(other) & chosen for other in others if other not in chosen)
    if not complete:
        ambiguous |= any("." not in name for name in names)
    return anchored(names) if ambiguous else names


def _endings(name: str) -> set[str]:
    """Every proper dotted ending: ``a.b.c`` -> ``b.c``, ``c``."""
    parts = name.split(".")
    return {".".join(parts[start:]) for start in range(1, len(parts))}


def _by_value(values: dict[str, N]) -> dict[N, list[str]]:
    groups: dict[N, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups


def _plain(value: float) -> float:
    """16.0 as 16: PEFT documents ``lora_alpha`` as an integer, and some readers insist on it."""
    return int(value) if float(value).is_integer() else float(value)
