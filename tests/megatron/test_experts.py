"""Adapters of experts compute what a dense mixture of experts with them computes, however the ranks share it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from smartinit.adapters.parallel.collectives import gather, reduce_scatter
from smartinit.errors import ConfigError, ModelError, TargetError
from smartinit.formats.rows import shard_rows
from smartinit.megatron import LoRA
from smartinit.megatron.moe_stand_ins import SequentialMLP, TEGroupedMLP
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from ranks import Ranks

HIDDEN, FFN, RANK, TOPK, EXPERTS, TOKENS = 8, 12, 4, 2, 4, 16
LAYERS = {"linear_fc1": (2 * FFN, HIDDEN), "linear_fc2": (HIDDEN, FFN)}
KINDS = {"grouped": TEGroupedMLP, "sequential": SequentialMLP}
Grads = dict[str, torch.Tensor]


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


def routes(few: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token ``(TOKENS, TOPK)`` and their probabilities; with `few`, only the first two have tokens."""
    first = torch.arange(TOKENS) % (2 if few else EXPERTS)
    second = (first + 1 + (0 if few else torch.arange(TOKENS) % 3)) % (2 if few else EXPERTS)
    probabilities = torch.softmax(numbers(TOKENS, TOPK, seed=7), -1)
    return torch.stack([first, second], 1), probabilities


def oracle(shared: bool, few: bool, rank: int = RANK) -> Grads:
    """Every token through each of its experts, one after another, in float64."""
    x, dy = numbers(TOKENS, HIDDEN, seed=1).requires_grad_(), numbers(TOKENS, HIDDEN, seed=2)
    factors = {
        (layer, e): tuple(f.requires_grad_() for f in factors_of(layer, e, shared))
        for layer in LAYERS
        for e in ([0] if shared else range(EXPERTS))
    }

    def apply(layer: str, e: int, rows: torch.Tensor) -> torch.Tensor:
        a, b = factors[layer, 0 if shared else e]
        return rows @ (weight_of(layer, e) + 32 / rank * b @ a).T

    chosen, probabilities = routes(few)
    y = []
    for t in range(TOKENS):
        parts = []
        for e, p in zip(chosen[t].tolist(), probabilities[t], strict=True):
            gate, up = apply("linear_fc1", e, x[t]).chunk(2)
            parts.append(p * apply("linear_fc2", e, functional.silu(gate) * up))
        y.append(sum(parts))
    out = torch.stack(y)
    out.backward(dy)
    found = {"y": out.detach(), "dx": x.grad}
    for (layer, e), pair in factors.items():
        for side, f in zip("ab", pair, strict=True):
            found[f"{layer}.{e}.{side}"] = f.grad if f.grad is not None else torch.zeros_like(f)
    return found


_GROUPS: dict[tuple[int, int], tuple[Any, Any]] = {}


def grid(ep: int, etp: int) -> tuple[Any, Any]:
    """This rank's expert-parallel and expert-tensor-parallel groups; the latter are neighbours."""
    if (ep, etp) not in _GROUPS:
        rank = dist.get_rank()
        by_ep = [dist.new_group([e * etp + t for e in range(ep)]) for t in range(etp)]
        by_etp = [dist.new_group([e * etp + t for t in range(etp)]) for e in range(ep)]
        _GROUPS[ep, etp] = by_ep[rank % etp], by_etp[rank // etp]
    return _GROUPS[ep, etp]


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


def moe_layer(experts: nn.Module, x: torch.Tensor, few: bool, ep: int) -> torch.Tensor:
    """As Megatron's all-gather dispatcher: all tokens to every rank, those of its experts through them, sums back."""
    world = dist.group.WORLD if dist.is_initialized() else None
    chosen, probabilities = routes(few)
    local = EXPERTS // ep
    first = (dist.get_rank(experts.ep_group) if ep > 1 else 0) * local
    x = gather(x, 0, world, gradient="sum")
    rows, slots = zip(*[torch.nonzero(chosen == first + i, as_tuple=True) for i in range(local)], strict=True)
    counts = torch.tensor([len(one) for one in rows])
    row, slot = torch.cat(rows), torch.cat(slots)
    y, _ = experts(x[row], counts, probabilities[row, slot])
    return reduce_scatter(x.new_zeros(TOKENS, HIDDEN).index_add(0, row, y), 0, world)


def on_a_grid(kind: str, ep: int, etp: int, shared: bool, few: bool) -> dict[str, Any]:
    """What this rank has of outputs and gradients, gathered by hand."""
    world, rank = dist.get_world_size(), dist.get_rank()
    lora = LoRA(["linear_fc1", "linear_fc2"], dim=RANK, share_expert_adapters=shared)
    model = lora(experts_model(kind, ep, etp))
    set_factors(model, kind, ep, shared)
    experts = model["mlp"]["experts"]
    x = shard_rows(numbers(TOKENS, HIDDEN, seed=1), rank, world).clone().requires_grad_()
    y = moe_layer(experts, x, few, ep)
    y.backward(shard_rows(numbers(TOKENS, HIDDEN, seed=2), rank, world))
    found = {"y": gather(y.detach(), 0, dist.group.WORLD, gradient="sum"), "dx": gather_all(x.grad)}
    local = EXPERTS // ep
    first = dist.get_rank(experts.ep_group) * local if ep > 1 else 0
    for name in LAYERS:
        for i in [0] if shared else range(local):
            adapter = getattr(experts if kind == "grouped" else experts.local_experts[i], name).adapter
            for side, factor in (("in", adapter.linear_in), ("out", adapter.linear_out)):
                grad = adapter.joined(factor.weight.grad, side)
                own = kind == "grouped" and not shared
                found[f"{name}.{0 if shared else first + i}.{'a' if side == 'in' else 'b'}"] = grad[i] if own else grad
    return found


def gather_all(t: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


GRIDS = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


@pytest.mark.parametrize("few", [False, True], ids=["all", "some-without-tokens"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize(("ep", "etp"), GRIDS)
def test_outputs_and_gradients_are_those_of_the_dense_mixture(
    request: pytest.FixtureRequest, ep: int, etp: int, kind: str, shared: bool, few: bool
) -> None:
    ranks: Ranks = request.getfixturevalue("two_ranks" if ep * etp == 2 else "four_ranks")
    expected = oracle(shared, few)
    seen: set[str] = set()
    for found in ranks.run(on_a_grid, kind, ep, etp, shared, few):
        seen |= set(found)
        for name, value in found.items():
            torch.testing.assert_close(
                value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert seen == set(expected)
