"""The parameters of an adapter, and what of the whole each of them is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smartinit.adapters.parallel.adapter import Factor, LowRankAdapter
from smartinit.adapters.parallel.experts import ExpertAdapter

if TYPE_CHECKING:
    import torch
    from torch import nn

    from smartinit.adapters.parallel.base import ParallelBase


@dataclass(frozen=True)
class Stored:
    """One parameter of an adapter on this rank.

    Attributes:
        path: its name in the adapted layer, ``adapter.linear_in.weight``.
        parameter: the numbers.
        base: what it is an adapter of: the layer, or one of the projections in it.
        partition_dim: along which the tensor-parallel ranks share it; None: each has all of it.
        gated: whether it has, along that dimension, rows of a gate and then of an up projection.
        by_expert: whether it has those of each of this rank's experts, along dimension 0.
        expert: whether it is of an expert, or of several.
        dim: rank of the low-rank pair that it belongs to; 0: of none.
        alpha: of that pair.
    """

    path: str
    parameter: torch.Tensor
    base: ParallelBase
    partition_dim: int | None
    gated: bool
    by_expert: bool
    expert: bool
    dim: int
    alpha: float


def stored(adapter: nn.Module, layer: ParallelBase) -> list[Stored]:
    """All parameters of an adapter, in the order of ``named_parameters``, beside a layer."""
    modules = dict(adapter.named_modules())
    pairs = [(path, one) for path, one in modules.items() if isinstance(one, LowRankAdapter)]
    out = []
    for path, parameter in adapter.named_parameters(remove_duplicate=False):
        owner = next((one for at, one in reversed(pairs) if not at or path.startswith(f"{at}.")), None)
        base = layer if owner is None else owner.base
        holder = modules[path.rpartition(".")[0]]
        factor = isinstance(holder, Factor)
        dim = holder.partition_dim if isinstance(holder, Factor) else _dim_of_rows(parameter, base)
        rows = path.endswith("linear_out.weight") or not factor
        by_expert = isinstance(owner, ExpertAdapter) if factor else base.experts > 0 and parameter.dim() > 1
        out.append(
            Stored(
                f"adapter.{path}",
                parameter,
                base,
                dim,
                base.gated and rows and dim is not None,
                by_expert,
                bool(owner is not None and owner.expert),
                0 if owner is None else owner.dim,
                0.0 if owner is None else float(owner.alpha),
            )
        )
    return out


def _dim_of_rows(magnitude: torch.Tensor, base: ParallelBase) -> int | None:
    """Along which dimension numbers of the rows ``([E,] out)`` are in shards.

    By the layer, not by the parameter's marks, which do not outlive ``load_state_dict(…, assign=True)`` everywhere.
    """
    return magnitude.dim() - 1 if base.split == "column" and base.size > 1 else None
