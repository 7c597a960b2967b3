"""An adapter beside the gate of a mixture of experts: its update is added to the logits before tokens are routed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.parallel.base import ParallelBase
from smartinit.adapters.parallel.collectives import size_of
from smartinit.adapters.parallel.layer import AdaptedLayer

if TYPE_CHECKING:
    from torch import nn


def is_router(module: nn.Module) -> bool:
    """Whether a module is a router like Megatron-Core's: ``weight (experts, hidden)``, ``gating`` and ``routing``."""
    weight = getattr(module, "weight", None)
    has_steps = callable(getattr(module, "gating", None)) and callable(getattr(module, "routing", None))
    return has_steps and isinstance(weight, torch.Tensor) and weight.dim() == 2  # noqa: PLR2004 - a matrix


def describe_router(module: Any) -> ParallelBase:  # noqa: ANN401 - known by its attributes
    """A router among tensor-parallel ranks: each has the whole weight; with sequence parallelism, tokens of its own."""
    experts, hidden = (int(n) for n in module.weight.shape)
    group = getattr(module, "tp_group", None)
    parallel = size_of(group) > 1
    sequence = bool(getattr(getattr(module, "config", None), "sequence_parallel", False))
    return ParallelBase(hidden, experts, group=group if parallel else None, sequence=sequence and parallel)


class AdaptedRouter(AdaptedLayer):
    """Stands where the router stood; all that one does around its gate (jitter, balancing, top-k) stays its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the router
        """What the router returns for logits with the adapter's update. Not for several threads at once."""
        router: Any = self.to_wrap
        if not self.adapter_enabled:
            return router(*args, **kwargs)
        gating, own = router.gating, vars(router).get("gating")

        def with_update(rows: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = gating(rows)
            update: torch.Tensor = self.adapter(rows)
            return logits + update.to(logits.dtype)

        router.gating = with_update
        try:
            return router(*args, **kwargs)
        finally:
            del router.gating
            if own is not None:
                router.gating = own
