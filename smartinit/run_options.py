"""What is the same for every request of one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from smartinit.planning.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from smartinit.rank_request import Planner
    from smartinit.store import Store
    from smartinit.targets.fingerprint import ModelFingerprint


@dataclass(frozen=True)
class Options:
    """The arguments of `compute` that are the same for all requests."""

    capture: Mapping[str, Any]
    max_batches: int | None = None
    planner: Planner | None = None
    limits: Limits = field(default_factory=Limits)
    captured: float | None = None
    seed: int = 0
    skip_bad_batches: bool = False
    adapter_name: str = "default"
    merge_ranks: bool = True
    none_means: Literal["defaults", "all"] = "defaults"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    show_progress_bar: bool = True
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    store: Store | None = None
    fingerprint: ModelFingerprint | None = None
    refresh: bool = False
