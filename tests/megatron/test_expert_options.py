"""Adapters of experts: where they start, what they share, their rank, their dropout, and what is refused."""

from __future__ import annotations

from dataclasses import replace
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
    config,
    experts_model,
    factors_of,
    grid,
    numbers,
    weight_of,
)
from torch import nn

from smartinit.adapters.parallel.base import describe
from smartinit.errors import ConfigError, ModelError, TargetError
from smartinit.megatron import CanonicalLoRA, DoRA, LoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear

if TYPE_CHECKING:
    from ranks import Ranks

    from smartinit.adapters.parallel.base import ParallelBase


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
@pytest.mark.parametrize("peft", [LoRA, DoRA, CanonicalLoRA])
def test_a_wrong_or_missing_expert_parallel_group_is_refused(peft: type[LoRA], kind: str) -> None:
    target = "linear_fc1_up" if peft is CanonicalLoRA else "linear_fc1"
    model = experts_model(kind, 1, 1, expert_model_parallel_size=2)
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size=2, but .* no expert-parallel group"):
        peft([target], dim=RANK)(model)
    right = experts_model(kind, 1, 1, expert_model_parallel_size=1)
    assert peft([target], dim=RANK)(right) is right


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


def without_its_group() -> str:
    model = experts_model("grouped", 1, 2)
    layer = model["mlp"]["experts"].linear_fc2
    layer.tp_group = None
    with pytest.raises(ConfigError) as caught:
        LoRA(["linear_fc2"], dim=RANK)(model)
    return str(caught.value)


def test_a_missing_expert_tensor_group_is_refused(two_ranks: Ranks) -> None:
    for text in two_ranks.run(without_its_group):
        assert "one of 2 shards, but the layer has no tensor-parallel group" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_may_have_another_dtype_than_the_experts(dtype: torch.dtype) -> None:
    model = experts_model("grouped", 1, 1).to(torch.bfloat16)
    lora = LoRA(["linear_fc1"], dim=RANK, share_expert_adapters=False, lora_dtype=dtype)
    experts = lora(model)["mlp"]["experts"]
    a, b = zip(*(factors_of("linear_fc1", i, False) for i in range(EXPERTS)), strict=True)
    experts.linear_fc1.adapter.set_whole(torch.stack(a), torch.stack(b))
    assert experts.linear_fc1.adapter.linear_in.weight.dtype == dtype
    x, counts = numbers(6, HIDDEN, seed=1), [1, 0, 3, 2]
    y, _ = experts.linear_fc1(x.bfloat16(), counts)
    assert y.dtype == torch.bfloat16
    of = [e for e, count in enumerate(counts) for _ in range(count)]
    for e, row, found in zip(of, x, y.double(), strict=True):
        expected = (weight_of("linear_fc1", e) + 32 / RANK * b[e] @ a[e]) @ row
        # Six roundings (x, W, A, z, B, y) to 8 bits, each of numbers that are at most what the absolute values make.
        largest = (weight_of("linear_fc1", e).abs() + 32 / RANK * b[e].abs() @ a[e].abs()) @ row.abs()
        assert ((found - expected).abs() <= 6 * 2**-8 * largest).all()
