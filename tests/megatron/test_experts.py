"""Adapters of experts compute what a dense mixture of experts with them computes, however the ranks share it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from smartinit.adapters.parallel.base import describe
from smartinit.adapters.parallel.collectives import gather, reduce_scatter
from smartinit.errors import ConfigError, ModelError, TargetError
from smartinit.formats.rows import shard_rows
from smartinit.megatron import LoRA
from smartinit.megatron.moe_stand_ins import SequentialMLP, TEGroupedMLP
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from ranks import Ranks

    from smartinit.adapters.parallel.base import ParallelBase

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


def starts(kind: str, ep: int, etp: int, shared: bool) -> dict[int, list[torch.Tensor]]:
    """Expert -> whole factors of its new adapters."""
    lora = LoRA(["linear_fc1", "linear_fc2"], dim=RANK, share_expert_adapters=shared, lora_B_init_method="normal")
    model = experts_model(kind, ep, etp)
    torch.manual_seed(3 if ep * etp == 1 else dist.get_rank() * 100 + 3)  # the first rank's counts
    model = lora(model)
    experts = model["mlp"]["experts"]
    local = EXPERTS // ep
    first = (dist.get_rank(experts.ep_group) if ep > 1 else 0) * local
    found: dict[int, list[torch.Tensor]] = {}
    for i in range(local):
        for name in LAYERS:
            layer = getattr(experts if kind == "grouped" else experts.local_experts[i], name)
            own = kind == "grouped" and not shared
            found.setdefault(first + i, []).extend(f[i] if own else f for f in layer.adapter.whole())
    return found


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_starts_do_not_depend_on_where_an_expert_is(four_ranks: Ranks, kind: str, shared: bool) -> None:
    expected = starts(kind, 1, 1, shared)
    different = not torch.equal(expected[0][0], expected[1][0])
    assert different is not shared
    for ep, etp in [(2, 2), (4, 1), (1, 4)]:
        seen: set[int] = set()
        for found in four_ranks.run(starts, kind, ep, etp, shared):
            seen |= set(found)
            for expert, factors in found.items():
                torch.testing.assert_close(factors, expected[expert], rtol=0, atol=0)
        assert seen == set(range(EXPERTS))


def test_one_adapter_of_sequential_experts_is_one_module_and_in_the_state_of_each() -> None:
    model = LoRA(["linear_fc1", "linear_fc2"], dim=RANK)(experts_model("sequential", 1, 1))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4
    keys = [key for key in model.state_dict() if ".adapter." in key]
    assert len(keys) == 4 * EXPERTS
    apart = LoRA(["linear_fc1"], dim=RANK, share_expert_adapters=False)(experts_model("sequential", 1, 1))
    assert len([p for p in apart.parameters() if p.requires_grad]) == 2 * EXPERTS
    grouped = LoRA(["linear_fc1"], dim=RANK, share_expert_adapters=False)(experts_model("grouped", 1, 1))
    assert [tuple(p.shape) for p in grouped.parameters() if p.requires_grad] == [
        (EXPERTS, RANK, HIDDEN),
        (EXPERTS, 2 * FFN, RANK),
    ]


def test_chunks_without_layer_numbers_share_no_adapter() -> None:
    chunks = LoRA(["linear_fc1"], dim=RANK)([experts_model("sequential", 1, 1) for _ in range(2)])
    first, second = (chunk["mlp"]["experts"].local_experts[0].linear_fc1.adapter for chunk in chunks)
    assert first is not second


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_the_rank_of_experts_is_divided_and_their_alpha_is_not(kind: str, shared: bool) -> None:
    model = experts_model(kind, 1, 1)
    model["mlp"]["shared_experts"] = nn.ModuleDict({"linear_fc1": ColumnParallelLinear(HIDDEN, FFN, config=config())})
    lora = LoRA(["linear_fc1"], dim=8, alpha=16, normalize_moe_lora=True, share_expert_adapters=shared)
    mlp = lora(model)["mlp"]
    adapter = (mlp["experts"] if kind == "grouped" else mlp["experts"].local_experts[0]).linear_fc1.adapter
    assert (adapter.dim, adapter.alpha, adapter.scaling) == (4, 16, 4)
    assert adapter.whole()[0].shape[-2:] == (4, HIDDEN)
    everyone = mlp["shared_experts"]["linear_fc1"].adapter
    assert (everyone.dim, everyone.scaling, everyone.expert) == (8, 2, False)


def refused(dim: int, ep: int, etp: int) -> str:
    model = experts_model("grouped", ep, etp)
    with pytest.raises(ConfigError) as caught:
        LoRA(["linear_fc1"], dim=dim, normalize_moe_lora=True)(model)
    assert not any(".adapter." in name for name, _ in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    return str(caught.value)


def test_a_rank_that_cannot_be_divided_is_refused(two_ranks: Ranks) -> None:
    model = experts_model("grouped", 1, 1)
    with pytest.raises(ConfigError, match="dim=5 cannot be divided by moe_router_topk=2"):
        LoRA(["linear_fc1"], dim=5, normalize_moe_lora=True)(model)
    del model["mlp"]["experts"].linear_fc1.config.moe_router_topk
    with pytest.raises(ConfigError, match=r"moe_router_topk, which the config of 'mlp.experts.linear_fc1' does not"):
        LoRA(["linear_fc1"], dim=8, normalize_moe_lora=True)(model)
    for text in two_ranks.run(refused, 6, 1, 2):
        assert "divided by moe_router_topk=2 is 3" in text
        assert "multiple of 4" in text


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_wrong_or_missing_expert_parallel_group_is_refused(kind: str) -> None:
    model = experts_model(kind, 1, 1, expert_model_parallel_size=2)
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size=2, but .* no expert-parallel group"):
        LoRA(["linear_fc1"], dim=RANK)(model)
    right = experts_model(kind, 1, 1, expert_model_parallel_size=1)
    assert LoRA(["linear_fc1"], dim=RANK)(right) is right


class GroupedMLP(nn.Module):
    """What Megatron-Core's class of this name has."""

    def __init__(self) -> None:
        super().__init__()
        self.num_local_experts = EXPERTS
        self.weight1, self.weight2 = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(8, 2))


@pytest.mark.parametrize("target", ["linear_fc1", "experts", "*.experts.linear_fc2", "*mlp*"])
def test_experts_without_layers_are_refused_with_the_way_out(target: str) -> None:
    dense = nn.ModuleDict({"linear_fc1": ColumnParallelLinear(HIDDEN, FFN)})
    model = nn.ModuleDict({"dense": dense, "mlp": nn.ModuleDict({"experts": GroupedMLP()})})
    with pytest.raises(
        ModelError, match=r"'mlp.experts' \(GroupedMLP\) holds its experts' weights itself.*TEGroupedMLP"
    ):
        LoRA([target])(model)
    assert all(p.requires_grad for p in model.parameters())
    assert LoRA(["*dense.linear_fc1"], dim=RANK)(model) is model
    with pytest.raises(TargetError, match="linear_fc3"):
        LoRA(["linear_fc3"])(model)


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


def dropped(kind: str, shared: bool, position: str, layer: str) -> tuple[torch.Tensor, bool]:
    """The update of one layer of the first expert-parallel rank's experts, joined; the other rank never calls it."""
    ep_group, etp_group = grid(2, 2)
    torch.manual_seed(dist.get_rank())
    lora = LoRA([layer], dim=RANK, dropout=0.5, dropout_position=position, share_expert_adapters=shared)
    experts = lora(experts_model(kind, 2, 2))["mlp"]["experts"]
    adapted = getattr(experts if kind == "grouped" else experts.local_experts[0], layer)
    adapter = adapted.adapter
    with torch.no_grad():
        adapter.linear_in.weight.fill_(1)
        adapter.linear_out.weight.fill_(1)
    took_part = dist.get_rank(ep_group) == 0
    update = torch.zeros(())
    if took_part:
        counts = [3, 2] if kind == "grouped" and not shared else None
        features = LAYERS[layer][1] // (2 if layer == "linear_fc2" else 1)
        update = adapter(torch.ones(5, features, dtype=torch.float64), None, counts).detach()
        if layer == "linear_fc2":  # addends
            dist.all_reduce(update, group=etp_group)
    return update, took_part


@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_dropout_asks_only_ranks_with_the_same_experts(
    four_ranks: Ranks, shared: bool, position: str, layer: str
) -> None:
    for kind in KINDS:
        a, b, *_ = [update for update, took_part in four_ranks.run(dropped, kind, shared, position, layer) if took_part]
        if layer == "linear_fc2" and position == "pre":
            assert a.unique().numel() > 1  # each rank drops from features of its own
        elif position == "post":
            assert set(a.unique().tolist()) == {0.0, 2.0 * 32 * LAYERS[layer][1]}
        if layer == "linear_fc2" or position == "pre":  # whole numbers: equal on both ranks
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def overlapped() -> dict[str, torch.Tensor]:
    """A shared expert as with overlap: sequence-parallel layers whose communication is done outside of them."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    options: dict[str, Any] = dict(bias=False, skip_bias_add=True, tp_group=group, sequence_parallel=True)
    fc1 = ColumnParallelLinear(HIDDEN, 2 * FFN, config=config(), **options).double()
    fc2 = RowParallelLinear(FFN, HIDDEN, **options).double()
    for layer, name in ((fc1, "linear_fc1"), (fc2, "linear_fc2")):
        layer.weight.data.copy_(layer._own(weight_of(name, 0)))
        layer.explicit_expert_comm = True
    mlp = nn.ModuleDict({"shared_experts": nn.ModuleDict({"linear_fc1": fc1, "linear_fc2": fc2})})
    shared = LoRA(["linear_fc1", "linear_fc2"], dim=RANK)(nn.ModuleDict({"mlp": mlp}))["mlp"]["shared_experts"]
    for name in LAYERS:
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


@pytest.mark.parametrize("counts", [None, [3, 2], [3, 2, 0, 1]])
def test_counts_that_do_not_fit_are_refused(counts: list[int] | None) -> None:
    model = LoRA(["linear_fc1"], dim=RANK, share_expert_adapters=False)(experts_model("grouped", 1, 1))
    adapter = model["mlp"]["experts"].linear_fc1.adapter
    with pytest.raises(ModelError, match="number of tokens of each expert" if counts is None else "was told of"):
        adapter(torch.ones(5, HIDDEN, dtype=torch.float64), None, counts)


class TEParallelGroupedLinear(nn.Module):
    """What Megatron-Core's wrapper of Transformer Engine's grouped layer has among several ranks."""

    def __init__(self, out_features: int, in_features: int, group: Any) -> None:
        super().__init__()
        self.num_gemms, self.parallel_mode, self.tp_size, self.tp_group, self._tp_group = 2, None, 1, None, group
        self.sequence_parallel, self.config = True, config()
        for i in range(self.num_gemms):
            self.register_parameter(f"weight{i}", nn.Parameter(torch.ones(out_features, in_features)))


class TEColumnParallelGroupedLinear(TEParallelGroupedLinear):
    pass


class TERowParallelGroupedLinear(TEParallelGroupedLinear):
    pass


def described() -> list[ParallelBase]:
    group, size = dist.group.WORLD, dist.get_world_size()
    column = TEColumnParallelGroupedLinear(2 * FFN // size, HIDDEN, group)
    row = TERowParallelGroupedLinear(HIDDEN, FFN // size, group)
    bases = [
        describe(column, "mlp.experts.linear_fc1", expert=True),
        describe(row, "mlp.experts.linear_fc2", expert=True),
    ]
    return [replace(base, group=None) for base in bases if base.group is group]


def test_layers_of_transformer_engine_that_know_nothing_of_their_ranks_are_whole_among_them(two_ranks: Ranks) -> None:
    for column, row in two_ranks.run(described):
        assert (column.out_features, column.in_features, column.split) == (2 * FFN, HIDDEN, "column")
        assert (row.out_features, row.in_features, row.split) == (HIDDEN, FFN, "row")
        assert column.gated
        assert not row.gated
        for base in (column, row):
            assert (base.partial, base.sequence, base.experts) == (True, False, 2)
