"""Adapters of experts compute what a dense mixture of experts with them computes, however the ranks share it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from mixture import (
    EXPERTS,
    FFN,
    HIDDEN,
    KINDS,
    LAYERS,
    RANK,
    TOKENS,
    TOPK,
    config,
    experts_model,
    factors_of,
    gather_all,
    numbers,
    set_factors,
    weight_of,
)
from torch import nn
from torch.nn import functional

from smartinit.adapters.parallel.collectives import gather, reduce_scatter
from smartinit.formats.rows import shard_rows
from smartinit.megatron import LoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from ranks import Ranks


Grads = dict[str, torch.Tensor]


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
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    assert seen == set(expected)


class AllToAll(torch.autograd.Function):
    """Rows to the ranks that have their experts, as Megatron's all-to-all dispatcher sends them; gradients back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sent: list[int], received: list[int], group: Any) -> torch.Tensor:
        ctx.route = (received, sent, group)
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return AllToAll.apply(grad, *ctx.route), None, None, None


def exchanged(kind: str, ep: int, shared: bool) -> Grads:
    """Tokens of two experts only travel in an all-to-all: of the ranks behind the first one, none has any."""
    rank, local = dist.get_rank(), EXPERTS // ep
    model = LoRA(["linear_fc1", "linear_fc2"], dim=RANK, share_expert_adapters=shared)(experts_model(kind, ep, 1))
    set_factors(model, kind, ep, shared)
    experts = model["mlp"]["experts"]
    chosen, probabilities = (shard_rows(t, rank, ep) for t in routes(few=True))
    x = shard_rows(numbers(TOKENS, HIDDEN, seed=1), rank, ep).clone().requires_grad_()
    pairs = torch.nonzero(chosen >= 0)
    order = torch.argsort(chosen.flatten(), stable=True)  # by expert, so by the rank that has it
    row, slot = pairs[order].unbind(1)
    sizes = torch.bincount(chosen.flatten(), minlength=EXPERTS)
    table = gather_all(sizes.view(1, -1))[:, rank * local : (rank + 1) * local]  # (from rank, own expert)
    sent, received = sizes.view(ep, local).sum(1).tolist(), table.sum(1).tolist()
    rows = AllToAll.apply(x[row], sent, received, experts.ep_group)
    probs = AllToAll.apply(probabilities[row, slot], sent, received, experts.ep_group)
    owner = torch.cat([torch.arange(local).repeat_interleave(counts) for counts in table])
    by_expert = torch.argsort(owner, stable=True)
    y, _ = experts(rows[by_expert], table.sum(0), probs[by_expert])
    back = AllToAll.apply(y[torch.argsort(by_expert)], received, sent, experts.ep_group)
    out = torch.zeros_like(x).index_add(0, row, back)
    out.backward(shard_rows(numbers(TOKENS, HIDDEN, seed=2), rank, ep))
    found = {"y": gather_all(out.detach()), "dx": gather_all(x.grad)}
    if shared:
        for name in LAYERS:
            adapter = getattr(experts if kind == "grouped" else experts.local_experts[0], name).adapter
            found[f"{name}.0.a"], found[f"{name}.0.b"] = adapter.linear_in.weight.grad, adapter.linear_out.weight.grad
    return found


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_rank_without_tokens_takes_part_in_an_all_to_all(ranks: Ranks, kind: str, shared: bool) -> None:
    expected = oracle(shared, few=True)
    for found in ranks.run(exchanged, kind, ranks.world, shared):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def deltas(kind: str, etp: int, shared: bool) -> None:
    """Each adapter's shard of the update against that of the whole one, in the shape of the base weight's shards."""
    lora = LoRA(["linear_fc1", "linear_fc2"], dim=RANK, share_expert_adapters=shared)
    model = lora(experts_model(kind, 1, etp))
    set_factors(model, kind, 1, shared)
    experts = model["mlp"]["experts"]
    for name in LAYERS:
        for i in range(EXPERTS):
            layer = getattr(experts if kind == "grouped" else experts.local_experts[i], name)
            a, b = factors_of(name, i, shared)
            expected = layer.to_wrap._own(32 / RANK * b @ a)
            delta = layer.adapter.delta()
            if kind == "grouped" and not shared:
                assert delta.shape == (EXPERTS, *layer.weight0.shape)
                delta = delta[i]
            torch.testing.assert_close(delta, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_deltas_are_shards_of_the_update(ranks: Ranks, kind: str, shared: bool) -> None:
    deltas(kind, 1, shared)
    ranks.run(deltas, kind, ranks.world, shared)


def overlapped() -> dict[str, torch.Tensor]:
    """A shared expert as with overlap: sequence-parallel layers whose communication is done outside of them."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    options: dict[str, Any] = dict(bias=False, skip_bias_add=True, tp_group=group, sequence_parallel=True)
    fc1 = ColumnParallelLinear(HIDDEN, 2 * FFN, config=config(), stride=2, **options).double()
    fc2 = RowParallelLinear(FFN, HIDDEN, **options).double()
    for layer, name in ((fc1, "linear_fc1"), (fc2, "linear_fc2")):
        layer.weight.data.copy_(layer._own(weight_of(name, 0)))
        layer.explicit_expert_comm = True
    mlp = nn.ModuleDict({"shared_experts": nn.ModuleDict({"linear_fc1": fc1, "linear_fc2": fc2})})
    shared = LoRA(["linear_fc1", "linear_fc2"], dim=RANK)(nn.ModuleDict({"mlp": mlp}))["mlp"]["shared_experts"]
    for name in LAYERS:
        assert (shared[name].base.partial, shared[name].base.sequence) == (True, False)
        shared[name].adapter.set_whole(*factors_of(name, 0, True))
    x = shard_rows(numbers(TOKENS, HIDDEN, seed=1), rank, size).clone().requires_grad_()
    gate, up = shared["linear_fc1"](gather(x, 0, group, gradient="sum"))[0].chunk(2, -1)
    y = reduce_scatter(shared["linear_fc2"](functional.silu(gate) * up)[0], 0, group)
    y.backward(shard_rows(numbers(TOKENS, HIDDEN, seed=2), rank, size))
    found = {"y": gather_all(y.detach()), "dx": gather_all(x.grad)}
    for name in LAYERS:
        adapter = shared[name].adapter
        found[f"{name}.a"] = adapter.joined(adapter.linear_in.weight.grad, "in")
        found[f"{name}.b"] = adapter.joined(adapter.linear_out.weight.grad, "out")
    return found


def test_shared_experts_with_overlap_are_those_of_one_process(ranks: Ranks) -> None:
    x, dy = numbers(TOKENS, HIDDEN, seed=1).requires_grad_(), numbers(TOKENS, HIDDEN, seed=2)
    pairs = {name: [f.requires_grad_() for f in factors_of(name, 0, True)] for name in LAYERS}
    w1, w2 = (weight_of(name, 0) + 32 / RANK * pairs[name][1] @ pairs[name][0] for name in LAYERS)
    gate, up = (x @ w1.T).chunk(2, -1)
    y = (functional.silu(gate) * up) @ w2.T
    y.backward(dy)
    expected = {"y": y.detach(), "dx": x.grad}
    expected |= {f"{name}.{side}": f.grad for name in LAYERS for side, f in zip("ab", pairs[name], strict=True)}
    for found in ranks.run(overlapped):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
