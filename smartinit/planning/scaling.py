"""Alphas that keep every layer's scaling when its rank changes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Mapping


def plan_with_alphas(
    ranks: Mapping[str, int],
    asked: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    use_rslora: bool = False,
    adjust: bool = True,
) -> Plan:
    """A `Plan` whose alphas follow the ranks.

    With ``adjust``, ``alpha ← alpha·new/asked`` (``alpha·√(new/asked)`` for rank-stabilised LoRA, whose scaling is
    ``alpha/√rank``), so that redistribution changes no layer's scaling. Rank 0 keeps its alpha.

    Args:
        ranks: target -> the rank it gets.
        asked: target -> the rank that its alpha was meant for.
        alphas: target -> alpha.
        use_rslora: see above.
        adjust: False leaves the alphas alone.
    """
    out: dict[str, float] = {}
    for name, rank in ranks.items():
        alpha = float(alphas[name])
        if adjust and rank:
            ratio = rank / asked[name]
            alpha *= math.sqrt(ratio) if use_rslora else ratio
        out[name] = int(alpha) if alpha == int(alpha) else alpha
    return Plan(ranks=ranks, alphas=out, use_rslora=use_rslora)
