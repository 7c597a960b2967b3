"""An adapter beside a router changes the logits by which tokens are routed, and nothing else of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from mixture import (
    EXPERTS,
    HIDDEN,
    RANK,
    TOKENS,
    TOPK,
    config,
    gather_all,
    numbers,
)
from torch import nn

from smartinit.megatron import LoRA
from smartinit.megatron.moe_stand_ins import TopKRouter

if TYPE_CHECKING:
    from ranks import Ranks


def router(group: Any = None, sequence: bool = False, **options: Any) -> nn.Module:
    gate = config(num_moe_experts=EXPERTS, hidden_size=HIDDEN, sequence_parallel=sequence)
    module = TopKRouter(gate, tp_group=group).double()
    module.weight.data.copy_(numbers(EXPERTS, HIDDEN, seed=50))
    model = LoRA(["router"], dim=RANK, **options)(nn.ModuleDict({"mlp": nn.ModuleDict({"router": module})}))
    model["mlp"]["router"].adapter.set_whole(numbers(RANK, HIDDEN, seed=51), numbers(EXPERTS, RANK, seed=52))
    return model["mlp"]["router"]


def routed(layer: nn.Module, rows: slice = slice(None)) -> list[torch.Tensor]:
    x = numbers(TOKENS, HIDDEN, seed=1)[rows].clone().requires_grad_()
    probabilities, chosen = layer(x)
    probabilities.backward(numbers(TOKENS, EXPERTS, seed=53)[rows])
    grads = [factor.weight.grad for factor in (layer.adapter.linear_in, layer.adapter.linear_out)]
    return [probabilities.detach(), chosen, x.grad, *grads]


def routed_in_shards() -> list[torch.Tensor]:
    size, rank = dist.get_world_size(), dist.get_rank()
    part = slice(rank * TOKENS // size, (rank + 1) * TOKENS // size)
    *by_token, da, db = routed(router(dist.group.WORLD, sequence=True), part)
    return [*(gather_all(t) for t in by_token), da, db]


def test_a_router_routes_by_logits_with_the_update(ranks: Ranks) -> None:
    a, b = (numbers(*s, seed=n).requires_grad_() for s, n in (((RANK, HIDDEN), 51), ((EXPERTS, RANK), 52)))
    x = numbers(TOKENS, HIDDEN, seed=1).requires_grad_()
    logits = x @ (numbers(EXPERTS, HIDDEN, seed=50) + 32 / RANK * b @ a).T
    ordered = logits.detach().argsort(descending=True)[:, :TOPK]
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, ordered, value=True)
    probabilities = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
    probabilities.backward(numbers(TOKENS, EXPERTS, seed=53))
    expected = [probabilities.detach(), chosen, x.grad, a.grad, b.grad]
    for found in [routed(router()), *ranks.run(routed_in_shards)]:
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_router_is_left_as_it_was() -> None:
    layer = router()
    base, x = layer.to_wrap, numbers(TOKENS, HIDDEN, seed=1)
    with_update = layer(x)[0]
    assert "gating" not in vars(base)
    layer.disable_adapter_layers()
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)
    assert not torch.equal(layer(x)[0], with_update)
    layer.enable_adapter_layers()
    own = base.gating
    base.gating = own  # one that the user has put there
    with pytest.raises(RuntimeError):
        layer(x[:, 1:])
    assert vars(base)["gating"] is own
    assert set(layer.state_dict()) == {"weight", "adapter.linear_in.weight", "adapter.linear_out.weight"}
