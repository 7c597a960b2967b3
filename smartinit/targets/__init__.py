"""Which layers get an adapter, what they are called, and their weights as ``out x in``.

model + config → `select_targets` → `Target` → ``weight()``
"""

from __future__ import annotations

from smartinit.targets.defaults import DEFAULT_TARGETS
from smartinit.targets.names import match_names, normalise_name
from smartinit.targets.patterns import alpha_for, match_module, rank_for
from smartinit.targets.select import check_ranks, select_targets
from smartinit.targets.weight import Target

__all__ = [
    "DEFAULT_TARGETS",
    "Target",
    "alpha_for",
    "check_ranks",
    "match_module",
    "match_names",
    "normalise_name",
    "rank_for",
    "select_targets",
]
