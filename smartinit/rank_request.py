"""How many ranks are wanted of each target, before and after data was seen."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from smartinit.config import EvaConfig
from smartinit.errors import ConfigError
from smartinit.planning.captured import captured_ranks, short_targets
from smartinit.planning.scaling import plan_with_alphas
from smartinit.planning.uniform import uniform_ranks
from smartinit.planning.variance import component_limit, variance_ranks
from smartinit.targets.patterns import alpha_for, rank_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from smartinit.activations.sites import Site
    from smartinit.config import LoraConfig
    from smartinit.planning.limits import Limits
    from smartinit.planning.plan import Plan
    from smartinit.targets.weight import Target

Planner = Literal["variance", "uniform"]

# Without max_rank, a captured share is looked for among this many times the ranks asked for.
_CAPTURED_BOUND = 8


@dataclass(frozen=True)
class RankRequest:
    """What is wanted of the targets.

    Attributes:
        targets: the layers.
        config: ranks and alphas by name, EVA's rho.
        planner: how ranks are given out.
        limits: bounds that every planner keeps.
        captured: instead of the ranks asked for, as many as capture this share of each layer's spectrum, at most
            ``max_rank`` or eight times those asked for.
    """

    targets: Sequence[Target]
    config: LoraConfig
    planner: Planner
    limits: Limits
    captured: float | None = None

    @cached_property
    def asked(self) -> dict[str, int]:
        """Target -> the rank asked for."""
        return {t.name: rank_for(self.config, t.name) for t in self.targets}

    @cached_property
    def caps(self) -> dict[str, int]:
        """Target -> ``min(in, out)``."""
        return {t.name: min(t.in_features, t.out_features) for t in self.targets}

    @cached_property
    def candidates(self) -> dict[str, int]:
        """Target -> directions with which it competes."""
        rho = self.eva.rho if self.planner == "variance" and self.captured is None else 1.0
        caps, top = self.caps, self.limits.max_rank
        if self.captured is not None:  # how many it takes is not known before
            return {name: min(top or _CAPTURED_BOUND * rank, caps[name]) for name, rank in self.asked.items()}
        return {
            name: max(
                component_limit(rank, rho, caps[name])
                if top is None
                else min(top, component_limit(rank, rho, caps[name])),
                min(self.limits.min_rank, caps[name]),
            )
            for name, rank in self.asked.items()
        }

    @cached_property
    def components(self) -> dict[str, int]:
        """Target -> directions that its statistic must hold: siblings with inputs of one width may share one."""
        family = {t.name: (t.name.rpartition(".")[0], t.in_features) for t in self.targets}
        most: dict[tuple[str, int], int] = {}
        for name, count in self.candidates.items():
            most[family[name]] = max(count, most.get(family[name], 0))
        return {name: most[key] for name, key in family.items()}

    @property
    def eva(self) -> EvaConfig:
        """The EVA options; their defaults when the configuration has none (its method is another)."""
        return self.config.eva_config or EvaConfig()

    def alpha(self, name: str) -> float:
        """The alpha asked for at one target."""
        return alpha_for(self.config, name)

    def candidates_at(self, site: Site) -> dict[str, int]:
        """Target -> directions with which it competes at a site: all with as many as the most, as in PEFT."""
        names = [name for name in site.names if name in self.candidates]
        most = max((self.candidates[name] for name in names), default=0)
        return {name: min(most, self.caps[name], self.limits.max_rank or most) for name in names}

    def check(self) -> None:
        """Refuse bounds that cannot be kept before any data is read.

        Raises:
            ConfigError: see `variance_ranks`; or no layer would get any rank.
        """
        shares = {name: [2.0**-i for i in range(count)] for name, count in self.candidates.items()}
        if not sum(self.ranks(shares).values()):
            raise ConfigError(
                "no layer would get any rank: the budget, or the ranks asked for, are below one step of "
                f"{self.limits.multiple_of} ranks; raise budget, params or r, or lower rank_multiple_of"
            )

    def ranks(self, ratios: Mapping[str, Sequence[float]]) -> dict[str, int]:
        """Ranks for the targets in ``ratios``."""
        asked = {name: self.asked[name] for name in ratios}
        costs = {t.name: t.in_features + t.out_features for t in self.targets if t.name in ratios}
        if self.captured is not None:
            return captured_ranks(ratios, self.captured, costs, self.limits)
        if self.planner == "uniform":
            return uniform_ranks(asked, {n: self.caps[n] for n in ratios}, costs, self.limits)
        return variance_ranks(ratios, asked, costs, self.limits)

    def demand(self, sites: Sequence[Site]) -> dict[str, int]:
        """How many directions each target would get if the data ended now."""
        shares = {
            name: site.statistic.explained(count).tolist()
            for site in sites
            for name, count in self.candidates_at(site).items()
        }
        order = [t.name for t in self.targets if t.name in shares]
        return self.ranks({name: shares[name] for name in order})

    def plan(self, ratios: Mapping[str, Sequence[float]]) -> Plan:
        """Final ranks and alphas."""
        ranks = self.ranks(ratios)
        if self.captured is not None:
            short = short_targets(ratios, self.captured, ranks)
            if short:
                warnings.warn(
                    f"{len(short)} of {len(ranks)} layers do not reach captured={self.captured:g} with the directions "
                    f"they may have, for instance '{min(short)}'; raise max_rank, or the budget if there is one",
                    stacklevel=5,
                )
        # A layer that never ran has no share to compete with: what was asked for, unless the budget is explicit.
        free = self.limits.budget is None and self.limits.params is None
        return plan_with_alphas(
            {n: ranks[n] if n in ranks else self.limits.ceiling(self.asked[n]) * free for n in self.asked},
            self.asked,
            {t.name: self.alpha(t.name) for t in self.targets},
            use_rslora=self.config.use_rslora,
            adjust=self.eva.adjust_scaling_factors,
        )

    def as_options(self) -> dict[str, Any]:
        """For the recipe."""
        bounds = self.limits
        captured = {} if self.captured is None else {"captured": self.captured}
        return {
            "name": self.planner,
            "rho": self.eva.rho,
            "adjust_scaling_factors": self.eva.adjust_scaling_factors,
            "budget": bounds.budget,
            "params": bounds.params,
            "multiple_of": bounds.multiple_of,
            "min_rank": bounds.min_rank,
            "max_rank": bounds.max_rank,
            "ranks": self.asked,
            **captured,
        }
