"""A small mixture of experts with known numbers, on any grid of ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from smartinit.megatron.moe_stand_ins import SequentialMLP, TEGroupedMLP

HIDDEN, FFN, RANK, TOPK, EXPERTS, TOKENS = 8, 12, 4, 2, 4, 16
LAYERS = {"linear_fc1": (2 * FFN, HIDDEN), "linear_fc2": (HIDDEN, FFN)}
KINDS = {"grouped": TEGroupedMLP, "sequential": SequentialMLP}


def config(**more: Any) -> SimpleNamespace:
    return SimpleNamespace(gated_linear_unit=True, moe_router_topk=TOPK, **more)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 2


def weight_of(layer: str, expert: int) -> torch.Tensor:
    return numbers(*LAYERS[layer], seed=100 + 10 * expert + (layer == "linear_fc2"))


def factors_of(layer: str, expert: int, shared: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = LAYERS[layer]
    seed = 1000 + (0 if shared else 10 * expert) + 2 * (layer == "linear_fc2")
    return numbers(RANK, columns, seed=seed), numbers(rows, RANK, seed=seed + 1)


def grid(ep: int, etp: int) -> tuple[Any, Any]:
    """This rank's expert-parallel and expert-tensor-parallel groups; the latter are neighbours."""
    rank = dist.get_rank()
    by_ep = [dist.new_group([e * etp + t for e in range(ep)]) for t in range(etp)]
    by_etp = [dist.new_group([e * etp + t for t in range(etp)]) for e in range(ep)]
    return by_ep[rank % etp], by_etp[rank // etp]


def experts_model(kind: str, ep: int, etp: int, **more: Any) -> nn.Module:
    """``mlp.experts`` with this rank's experts, their weights those of `weight_of`."""
    ep_group, etp_group = grid(ep, etp) if ep * etp > 1 else (None, None)
    local = EXPERTS // ep
    experts = KINDS[kind](local, HIDDEN, FFN, config=config(**more), ep_group=ep_group, tp_group=etp_group).double()
    first = (dist.get_rank(ep_group) if ep > 1 else 0) * local
    for i in range(local):
        owner = experts if kind == "grouped" else experts.local_experts[i]
        for name in LAYERS:
            layer = getattr(owner, name)
            weight = getattr(layer, f"weight{i}" if kind == "grouped" else "weight")
            weight.data.copy_(layer._own(weight_of(name, first + i)))
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": experts})})


def set_factors(model: nn.Module, kind: str, ep: int, shared: bool) -> None:
    experts = model["mlp"]["experts"]
    local = EXPERTS // ep
    first = (dist.get_rank(experts.ep_group) if ep > 1 else 0) * local
    for name in LAYERS:
        pairs = [factors_of(name, first + i, shared) for i in range(local)]
        if kind == "grouped":
            whole = pairs[0] if shared else tuple(torch.stack(side) for side in zip(*pairs, strict=True))
            getattr(experts, name).adapter.set_whole(*whole)
        else:
            for expert, pair in zip(experts.local_experts, pairs, strict=True):
                getattr(expert, name).adapter.set_whole(*pair)


def gather_all(t: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)
