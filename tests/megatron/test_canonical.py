"""Separate adapters for q, k, v, gate and up are those of separate layers, whatever the ranks and the subset."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.errors import ConfigError
from smartinit.formats.rows import join_rows, shard_rows
from smartinit.megatron import CanonicalLoRA, load_adapter, save_adapter
from smartinit.megatron.stand_ins import ColumnParallelLinear

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Ranks

HEADS, GROUPS, WIDTH, IN, RANK, SCALING = 8, 4, 3, 10, 8, 4.0
ROWS = {
    "linear_qkv": (HEADS + 2 * GROUPS) * WIDTH,
    "linear_fc1": 2 * 12,
}
SIZES = {"q": HEADS * WIDTH, "k": GROUPS * WIDTH, "v": GROUPS * WIDTH, "gate": 12, "up": 12}
PARTS = {"linear_qkv": ("q", "k", "v"), "linear_fc1": ("gate", "up")}
TARGETS = {"q": "linear_q", "k": "linear_k", "v": "linear_v", "gate": "linear_fc1_gate", "up": "linear_fc1_up"}
CONFIG = SimpleNamespace(
    num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=WIDTH, hidden_size=7, gated_linear_unit=True
)


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    seed = sum(part.encode())
    return numbers(RANK, IN, seed=seed) / 4, numbers(SIZES[part], RANK, seed=seed + 1) / 4


def rows_of(layer: str, part: str) -> list[int]:
    """The rows of the fused weight, of one process, that are a projection's, in the projection's own order."""
    if layer == "linear_fc1":
        return list(range(12)) if part == "gate" else list(range(12, 24))
    per_group, found = HEADS // GROUPS, []
    for group in range(GROUPS):
        first = group * (per_group + 2) * WIDTH
        heads = {"q": range(per_group), "k": [per_group], "v": [per_group + 1]}[part]
        found += [first + head * WIDTH + i for head in heads for i in range(WIDTH)]
    return found


def whole_base(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    made = ColumnParallelLinear(IN, ROWS[layer], generator=torch.Generator().manual_seed(5))
    return made.weight.detach(), made.bias.detach()


def dense(layer: str, parts: tuple[str, ...], x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    w, bias = (t.double() for t in whole_base(layer))
    x = x.double().requires_grad_()
    y = x @ w.T + bias
    found, pairs = {}, {}
    for part in parts:
        a, b = pairs[part] = tuple(t.double().requires_grad_() for t in factors(part))
        update = torch.zeros_like(y)
        y = y + update.index_copy(-1, torch.tensor(rows_of(layer, part)), SCALING * (x @ a.T @ b.T))
    y.backward(dy.double())
    for part, (a, b) in pairs.items():
        found[f"{part}.da"], found[f"{part}.db"] = a.grad, b.grad
    return {"y": y.detach(), "dx": x.grad, **found}


def inputs(layer: str, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(tokens, 2, IN, seed=3), numbers(tokens, 2, ROWS[layer], seed=4)


def on_this_rank(layer: str, parts: tuple[str, ...], options: dict[str, Any], tokens: int) -> dict[str, Any]:
    group = dist.group.WORLD if dist.is_initialized() else None
    size, rank = (dist.get_world_size(), dist.get_rank()) if group else (1, 0)
    gated = layer == "linear_fc1"
    options = {**options, "stride": 1 + gated, "generator": torch.Generator().manual_seed(5)}
    base = ColumnParallelLinear(IN, ROWS[layer], tp_group=group, config=CONFIG, **options)
    calls: list[int] = []
    base.register_forward_hook(lambda *_: calls.append(1))
    canonical = CanonicalLoRA([TARGETS[part] for part in parts], dim=RANK, alpha=SCALING * RANK)
    made = canonical(nn.ModuleDict({layer: base}))[layer]
    assert set(made.adapter) == {f"adapter_{part}" for part in parts}
    for part in parts:
        made.adapter[f"adapter_{part}"].set_whole(*factors(part))
    x, dy = inputs(layer, tokens)
    by_tokens, whole = options.get("sequence_parallel"), options.get("gather_output")

    def gathered(t: torch.Tensor, dim: int, gated: bool = False) -> torch.Tensor:
        if size == 1:
            return t
        pieces = [torch.empty_like(t) for _ in range(size)]
        dist.all_gather(pieces, t.contiguous())
        return join_rows(pieces, gated=gated, dim=dim)

    x = (shard_rows(x, rank, size) if by_tokens else x).clone().requires_grad_()
    pieces = [shard_rows(dy, i, size, gated=gated, dim=-1) for i in range(size)]
    y, _ = made(x)
    y.backward(torch.cat(pieces, -1) if whole else pieces[rank])
    y = join_rows(y.detach().chunk(size, -1), gated=gated, dim=-1) if whole else gathered(y.detach(), -1, gated)
    found = {"y": y, "dx": gathered(x.grad, 0) if by_tokens else x.grad}
    for part in parts:
        adapter = made.adapter[f"adapter_{part}"]
        found[f"{part}.da"] = gathered(adapter.linear_in.weight.grad, 0)
        found[f"{part}.db"] = gathered(adapter.linear_out.weight.grad, 0)
    assert len(calls) == 1
    return found


CASES: list[tuple[str, tuple[str, ...], dict[str, Any], int]] = [
    ("linear_qkv", ("q", "k", "v"), {}, 4),
    ("linear_qkv", ("q", "v"), dict(sequence_parallel=True), 4),
    ("linear_qkv", ("k",), dict(gather_output=True), 4),
    ("linear_fc1", ("gate", "up"), {}, 4),
    ("linear_fc1", ("gate", "up"), dict(sequence_parallel=True), 4),
    ("linear_fc1", ("up",), dict(gather_output=True), 4),
]


def check(found: list[dict[str, Any]], layer: str, parts: tuple[str, ...], tokens: int) -> None:
    expected = dense(layer, parts, *inputs(layer, tokens))
    for one in found:
        assert set(one) == set(expected)
        for name, value in one.items():
            torch.testing.assert_close(
                value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize(("layer", "parts", "options", "tokens"), CASES)
def test_outputs_and_gradients_are_those_of_separate_layers(
    ranks: Ranks, layer: str, parts: tuple[str, ...], options: dict[str, Any], tokens: int
) -> None:
    check(ranks.run(on_this_rank, layer, parts, options, tokens), layer, parts, tokens)


@pytest.mark.parametrize(
    ("layer", "parts"), [("linear_qkv", ("q",)), ("linear_qkv", ("k", "v")), ("linear_fc1", ("gate",))]
)
def test_defect_6_a_subset_and_a_single_token_work(two_ranks: Ranks, layer: str, parts: tuple[str, ...]) -> None:
    check([on_this_rank(layer, parts, {}, 1)], layer, parts, 1)
    check(two_ranks.run(on_this_rank, layer, parts, {}, 1), layer, parts, 1)


def block(**config: Any) -> nn.Module:
    """Two layers of a small transformer, unfused from any parallelism, with the config on the model."""
    model = nn.Module()
    model.config = SimpleNamespace(**{**vars(CONFIG), **config})
    model.layers = nn.ModuleList()
    for _ in range(2):
        layer = nn.Module()
        layer.linear_qkv = nn.Linear(IN, ROWS["linear_qkv"])
        layer.linear_proj = nn.Linear(IN, IN)
        layer.linear_fc1 = nn.Linear(IN, ROWS["linear_fc1"])
        layer.linear_fc2 = nn.Linear(12, IN)
        model.layers.append(layer)
    return model


def adapters(model: nn.Module) -> set[str]:
    return {name.removesuffix(".linear_in.weight") for name in model.state_dict() if name.endswith(".linear_in.weight")}


def test_plain_layers_take_the_config_of_the_model_and_keys_are_megatron_bridges() -> None:
    model = CanonicalLoRA(dim=2)(block())
    expected = {"linear_qkv.adapter.adapter_q", "linear_qkv.adapter.adapter_k", "linear_qkv.adapter.adapter_v"}
    expected |= {"linear_fc1.adapter.adapter_gate", "linear_fc1.adapter.adapter_up"}
    expected |= {"linear_proj.adapter", "linear_fc2.adapter"}
    assert adapters(model) == {f"layers.{i}.{name}" for i in range(2) for name in expected}
    x = numbers(5, IN, seed=1)
    layer = model.layers[0].linear_qkv
    torch.testing.assert_close(layer(x), layer.to_wrap(x), rtol=0, atol=0)
    starts = [layer.adapter[f"adapter_{part}"].linear_in.weight for part in "qkv"]
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["*.0.linear_q"], {"layers.0.linear_qkv.adapter.adapter_q"}),
        (
            ["layers.0.linear_q", "linear_k"],
            {f"layers.{i}.linear_qkv.adapter.adapter_{p}" for i, p in ((0, "q"), (0, "k"), (1, "k"))},
        ),
        (
            ["linear_q", "*.0.linear_k"],  # the second finds nothing that the first has not found
            {f"layers.{i}.linear_qkv.adapter.adapter_{p}" for i, p in ((0, "q"), (0, "k"), (1, "q"))},
        ),
        (
            ["*1.linear_fc1_up", "*1.linear_fc2"],
            {"layers.1.linear_fc1.adapter.adapter_up", "layers.1.linear_fc2.adapter"},
        ),
    ],
)
def test_patterns_choose_projections(targets: list[str], expected: set[str]) -> None:
    assert adapters(CanonicalLoRA(targets, dim=2)(block())) == expected


def test_exclusion_gives_a_fused_layer_all_that_it_can_have() -> None:
    canonical = CanonicalLoRA([], ["linear_proj", "linear_fc2", "layers.1.*"], dim=2)
    found = adapters(canonical(block()))
    assert found == {f"layers.0.linear_qkv.adapter.adapter_{part}" for part in "qkv"} | {
        f"layers.0.linear_fc1.adapter.adapter_{part}" for part in ("gate", "up")
    }
    plain = adapters(canonical(block(gated_linear_unit=False)))
    assert "layers.0.linear_fc1.adapter" in plain


def test_the_mapping_is_that_of_the_targets() -> None:
    canonical = CanonicalLoRA(["linear_q", "linear_k", "*.0.linear_fc1_up", "linear_proj"], dim=4)
    expected = {"linear_qkv": {"linear_q", "linear_k"}, "*.0.linear_fc1": {"linear_fc1_up"}}
    assert canonical.canonical_mapping == {**expected, "linear_proj": {"linear_proj"}}
    assert dataclasses.replace(canonical, dim=2).canonical_mapping == canonical.canonical_mapping
    given = CanonicalLoRA([], canonical_mapping={"linear_qkv": {"linear_v"}}, dim=2)
    assert adapters(given(block())) == {f"layers.{i}.linear_qkv.adapter.adapter_v" for i in range(2)}


@pytest.mark.parametrize(
    ("targets", "mapping", "config", "said"),
    [
        (["*.linear_qkv"], {}, {}, "name some of linear_q, linear_k, linear_v instead"),
        (["linear_fc1"], {}, {}, "name some of linear_fc1_gate, linear_fc1_up instead"),
        (["linear_q"], {"linear_qkv": {"linear_k"}}, {}, "give one of the two"),
        ([], {"linear_qkv": {"linear_x"}}, {}, "'linear_x' is no projection of 'layers.0.linear_qkv'"),
        (["linear_q"], {}, dict(num_query_groups=3), "which are not those of q, k and v"),
        (["linear_q"], {}, dict(kv_channels=4), "which are not those of q, k and v"),
        (["linear_q"], {}, dict(num_attention_heads=None), "has no num_attention_heads"),
        (["linear_q"], {}, dict(kv_channels=None, hidden_size=None), "has no kv_channels"),
        (["linear_fc1_up"], {}, dict(gated_linear_unit=False), "gated_linear_unit=True"),
    ],
)
def test_what_cannot_be_is_refused(
    targets: list[str], mapping: dict[str, set[str]], config: dict[str, Any], said: str
) -> None:
    model = block(**config)
    with pytest.raises(ConfigError, match=said):
        CanonicalLoRA(targets, canonical_mapping=mapping, dim=2)(model)
    assert not any(isinstance(module, AdaptedLayer) for module in model.modules())


def test_without_query_groups_every_head_has_its_own() -> None:
    model = nn.Module()
    model.config = SimpleNamespace(num_attention_heads=4, num_query_groups=None, kv_channels=None, hidden_size=8)
    model.linear_qkv = nn.Linear(8, 24)
    adapter = CanonicalLoRA(["linear_q"], dim=2)(model).linear_qkv.adapter
    assert adapter.rows.groups == 4
    assert adapter.rows.units == 3


def torn_group() -> str:
    base = ColumnParallelLinear(IN, (8 + 2 * 2) * WIDTH, tp_group=dist.group.WORLD)
    base.config = SimpleNamespace(num_attention_heads=8, num_query_groups=2, kv_channels=WIDTH)
    with pytest.raises(ConfigError) as caught:
        CanonicalLoRA(["linear_q"], dim=RANK)(nn.ModuleDict({"linear_qkv": base}))
    return str(caught.value)


def start() -> tuple[torch.Tensor, torch.Tensor]:
    group = dist.group.WORLD if dist.is_initialized() else None
    torch.manual_seed(7)
    base = ColumnParallelLinear(IN, ROWS["linear_qkv"], tp_group=group, config=CONFIG)
    canonical = CanonicalLoRA(["linear_q"], dim=RANK, lora_B_init_method="normal")
    torch.manual_seed(7)
    return canonical(nn.ModuleDict({"linear_qkv": base}))["linear_qkv"].adapter["adapter_q"].whole()


def test_four_ranks_have_whole_groups_and_the_start_of_one(four_ranks: Ranks) -> None:
    for said in four_ranks.run(torn_group):
        assert "2 query groups of 'linear_qkv' cannot be shared evenly by 4 tensor-parallel ranks" in said
    for found in four_ranks.run(start):
        torch.testing.assert_close(found, start(), rtol=0, atol=0)


def grouped_experts(size: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output of the first layer of two experts in one module, of which only the gate has adapters."""
    group = dist.group.WORLD if size > 1 else None
    config = SimpleNamespace(gated_linear_unit=True)
    generator = torch.Generator().manual_seed(5)
    options = dict(generator=generator, num_gemms=2, is_expert=True, bias=False, stride=2)
    base = ColumnParallelLinear(IN, 24, tp_group=group, config=config, **options)
    model = nn.Module()
    model.mlp = nn.Module()
    model.mlp.experts = nn.ModuleDict({"linear_fc1": base})
    layer = CanonicalLoRA(["linear_fc1_gate"], dim=RANK)(model).mlp.experts["linear_fc1"]
    a, b = factors("gate")
    layer.adapter["adapter_gate"].set_whole(torch.stack([a, a + 1]), torch.stack([b, b - 1]))
    y = layer(inputs("linear_fc1", 5)[0][:, 0], [2, 3])[0]
    return y.detach(), [base.weight0.detach(), base.weight1.detach()]


def test_each_expert_of_a_grouped_layer_has_its_own_adapters(two_ranks: Ranks) -> None:
    y, weights = grouped_experts(1)
    a, b = factors("gate")
    x = inputs("linear_fc1", 5)[0][:, 0].split([2, 3])
    expected = []
    for i, w in enumerate(weights):
        update = (b - i) @ (a + i) * 32 / RANK
        expected.append(x[i] @ (w + torch.cat([update, torch.zeros_like(update)])).T)
    torch.testing.assert_close(y, torch.cat(expected), rtol=1e-4, atol=1e-4)
    shards = [found[0] for found in two_ranks.run(grouped_experts, 2)]
    torch.testing.assert_close(join_rows(shards, gated=True, dim=-1), y, rtol=1e-4, atol=1e-4)


def saved(folder: str) -> None:
    group = dist.group.WORLD if dist.is_initialized() else None
    model = nn.ModuleDict(
        {
            "linear_qkv": ColumnParallelLinear(IN, ROWS["linear_qkv"], tp_group=group),
            "linear_fc1": ColumnParallelLinear(IN, ROWS["linear_fc1"], tp_group=group, config=CONFIG, stride=2),
            "linear_fc2": nn.Linear(12, IN),
        }
    )
    model["linear_qkv"].config = CONFIG
    canonical = CanonicalLoRA(dim=RANK, alpha=8, target_modules=["linear_q", "linear_v", "linear_fc1_up", "linear_fc2"])
    canonical(model)
    for part, layer in (("q", "linear_qkv"), ("v", "linear_qkv"), ("up", "linear_fc1")):
        model[layer].adapter[f"adapter_{part}"].set_whole(*factors(part))
    if group is not None:
        save_adapter(model, folder, canonical)
        return
    for part, layer in (("q", "linear_qkv"), ("v", "linear_qkv"), ("up", "linear_fc1")):
        model[layer].adapter[f"adapter_{part}"].set_whole(*(torch.zeros_like(t) for t in factors(part)))
    load_adapter(model, folder)
    for part, layer in (("q", "linear_qkv"), ("v", "linear_qkv"), ("up", "linear_fc1")):
        found = model[layer].adapter[f"adapter_{part}"].whole()
        torch.testing.assert_close(found, factors(part), rtol=0, atol=0)


def test_what_two_ranks_save_one_process_loads(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(saved, str(tmp_path / "adapter"))
    saved(str(tmp_path / "adapter"))
