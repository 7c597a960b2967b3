"""Merged weights are those of the dense model, adapters are counted once, and what was comes back bit for bit."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.fake_quant import FakeQuantLinear
from smartinit.errors import ConfigError, ModelError
from smartinit.formats.rows import join_rows, shard_rows
from smartinit.megatron import CanonicalLoRA, DoRA, LoRA, LoRAMerge
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from collections.abc import Callable

    from ranks import Ranks

H, F, RANK, GROUPS, WIDTH = 16, 32, 4, 4, 2
QKV = 8 * WIDTH + 2 * GROUPS * WIDTH
CONFIG = SimpleNamespace(
    num_attention_heads=8,
    num_query_groups=GROUPS,
    kv_channels=WIDTH,
    hidden_size=H,
    gated_linear_unit=True,
)
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: LoRA(dim=RANK, lora_B_init_method="normal"),
    "lora, an adapter for each expert": lambda: LoRA(
        dim=RANK, lora_B_init_method="normal", share_expert_adapters=False
    ),
    "dora": lambda: DoRA(dim=RANK, lora_B_init_method="normal"),
    "canonical": lambda: CanonicalLoRA(dim=RANK, lora_B_init_method="normal"),
}


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Block(nn.Module):
    """All kinds of layers; experts in one module and in a list."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        group = dist.group.WORLD if dist.is_initialized() else None
        options: dict[str, Any] = dict(
            tp_group=group, config=CONFIG, generator=torch.Generator().manual_seed(5), bias=False
        )
        self.linear_qkv = ColumnParallelLinear(H, QKV, **options)
        self.linear_proj = RowParallelLinear(H, H, **options)
        options["is_expert"] = True
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        self.mlp.experts.linear_fc1 = ColumnParallelLinear(H, 2 * F, num_gemms=2, stride=2, **options)
        self.mlp.experts.linear_fc2 = RowParallelLinear(F, H, num_gemms=2, **options)
        self.mlp.experts.local_experts = nn.ModuleList(nn.Module() for _ in range(2))
        for expert in self.mlp.experts.local_experts:
            expert.linear_fc1 = ColumnParallelLinear(H, 2 * F, stride=2, **options)
            expert.linear_fc2 = RowParallelLinear(F, H, **options)
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of all layers, of addends the sum."""
        layers = [(self.linear_qkv, ()), (self.linear_proj, ())]
        for owner, rest in [(self.mlp.experts, ([3, 4],)), *((one, ()) for one in self.mlp.experts.local_experts)]:
            layers += [(owner.linear_fc1, rest), (owner.linear_fc2, rest)]
        made = []
        for layer, rest in layers:
            rows = x
            if layer.weight_dim_in_shards:
                rows = rows.repeat(1, layer.input_size // H)
                rows = shard_rows(rows, *ranks_here(), dim=-1)
            made.append(layer(rows, *rest)[0])
        return made


# The layers' own word on which of them take shards of the input.
ColumnParallelLinear.weight_dim_in_shards = False  # type: ignore[attr-defined]
RowParallelLinear.weight_dim_in_shards = True  # type: ignore[attr-defined]


def ranks_here() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def moved(model: nn.Module) -> nn.Module:
    """As if magnitudes had been trained."""
    for _, layer in adapted_layers(model):
        if hasattr(layer.adapter, "weight_magnitude"):
            m = layer.adapter.whole_magnitude()
            layer.adapter.set_whole_magnitude(m * (1.5 + numbers(*m.shape, seed=8).sigmoid()))
    return model


def made(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    return moved(KINDS[kind]()(Block(dtype)))


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The base weights of all layers as one process has them."""
    found = {}
    for place, layer in adapted_layers(model):
        base = layer.base
        for name, weight in layer.to_wrap.named_parameters():
            pieces = [weight.detach()]
            if base.size > 1:
                pieces = [torch.empty_like(pieces[0]) for _ in range(base.size)]
                dist.all_gather(pieces, weight.detach())
            found[f"{place.name}.{name}"] = join_rows(pieces, gated=base.gated, dim=base.weight_dim or 0)
    return found


def oracle(kind: str) -> dict[str, torch.Tensor]:
    """``W + s·B A``, by hand, of one process, in float64."""
    model = made(kind)
    expected = whole_weights(model)
    for place, layer in adapted_layers(model):
        for i, name in enumerate(name for name in expected if name.startswith(f"{place.name}.")):
            w = expected[name].double()
            if kind == "canonical" and place.attribute in {"linear_qkv", "linear_fc1"}:
                for part, adapter in layer.adapter.items():
                    a, b = (t.double() if t.dim() == 2 else t[i].double() for t in adapter.whole())
                    w[rows_of(part)] += adapter.scaling * b @ a
            else:
                a, b = (t.double() if t.dim() == 2 else t[i].double() for t in layer.adapter.whole())
                w += layer.adapter.scaling * b @ a
            if kind == "dora":
                m = layer.adapter.weight_magnitude
                m = m.double() if m.dim() == 1 else m[i].double()
                w *= (m / w.norm(dim=1))[:, None]
            expected[name] = w.detach()
    return expected


def rows_of(part: str) -> list[int]:
    if part in {"adapter_gate", "adapter_up"}:
        return list(range(F)) if part == "adapter_gate" else list(range(F, 2 * F))
    heads = {"adapter_q": [0, 1], "adapter_k": [2], "adapter_v": [3]}[part]
    return [(4 * g + head) * WIDTH + i for g in range(GROUPS) for head in heads for i in range(WIDTH)]


def merge_on_this_rank(kind: str) -> dict[str, torch.Tensor]:
    model = made(kind)
    x = numbers(7, H, seed=3)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    expected = model(x)
    assert LoRAMerge()(model) is model
    merged = whole_weights(model)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert list(state) == [name for name in before if ".adapter." not in name]  # or the update would count twice
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    LoRAMerge()(model)  # once more is nothing
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    LoRAMerge().unmerge(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    LoRAMerge().unload(LoRAMerge()(model))
    assert not list(adapted_layers(model))
    torch.testing.assert_close(model(x), found, rtol=0, atol=0)
    return merged


@pytest.mark.parametrize("kind", KINDS)
def test_defect_9_merged_models_compute_the_same_and_unmerging_is_exact(two_ranks: Ranks, kind: str) -> None:
    expected = oracle(kind)
    for found in [merge_on_this_rank(kind), *two_ranks.run(merge_on_this_rank, kind)]:
        assert set(found) == set(expected)
        for name, weight in found.items():
            torch.testing.assert_close(
                weight.double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def documented_example() -> tuple[torch.Tensor, torch.Tensor]:
    """H=16, F=32, r=4 on two ranks: linear_fc1 column-parallel, linear_fc2 row-parallel."""
    group, rank = dist.group.WORLD, dist.get_rank()
    merged = []
    for out, columns, dims in ((F, H, (0, 0, 0)), (H, F, (1, 1, 0))):  # of W, A, B
        whole = [numbers(*shape, seed=i) for i, shape in enumerate([(out, columns), (RANK, columns), (out, RANK)])]
        w, a, b = (t.chunk(2, dim)[rank].contiguous() for t, dim in zip(whole, dims, strict=True))
        expected = {F: ([16, 16], [2, 16], [16, 4]), H: ([16, 16], [4, 16], [8, 4])}[out]
        assert [list(t.shape) for t in (w, a, b)] == list(expected)
        kept = [t.clone() for t in (w, a, b)]
        merged.append(LoRAMerge().merge(w, b, a, 8, RANK, tp_size=2, tp_group=group))
        torch.testing.assert_close([w, a, b], kept, rtol=0, atol=0)
        torch.testing.assert_close(merged[-1], LoRAMerge().merge(w, b, a, 8, RANK, tp_size=2), rtol=0, atol=0)
        with pytest.raises(ConfigError, match="tp_size=4, but the group has 2 ranks"):
            LoRAMerge().merge(w, b, a, 8, RANK, tp_size=4, tp_group=group)
        with pytest.raises(ConfigError, match="tp_size=1, but the group has 2 ranks"):
            LoRAMerge().merge(w, b, a, 8, RANK, tp_group=group)
        with pytest.raises(ConfigError, match="do not fit base_weight"):
            LoRAMerge().merge(w[:5], b, a, 8, RANK, tp_size=2, tp_group=group)
    return merged[0], merged[1]


def test_defect_9_the_documented_example_merges_on_two_ranks(two_ranks: Ranks) -> None:
    found = two_ranks.run(documented_example)
    for i, (out, columns) in enumerate(((F, H), (H, F))):
        w, a, b = (numbers(*s, seed=j).double() for j, s in enumerate([(out, columns), (RANK, columns), (out, RANK)]))
        whole = torch.cat([one[i] for one in found], i)
        torch.testing.assert_close(whole.double(), w + 2 * b @ a, rtol=1e-5, atol=1e-5)


def test_the_sum_is_rounded_once_to_the_dtype_of_the_weight() -> None:
    w, a, b = numbers(6, 5, seed=0).bfloat16(), numbers(3, 5, seed=1).bfloat16(), numbers(6, 3, seed=2).bfloat16()
    expected = (w.double() + 4 / 3 * (b.double() @ a.double())).bfloat16()
    found = LoRAMerge().merge(w, b, a, 4, 3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        ([(6, 5), (6, 3), (3, 4)], {}, "do not fit base_weight"),
        ([(6, 5), (7, 3), (3, 5)], {}, "do not fit base_weight"),
        ([(6, 5), (6, 2), (2, 5)], {}, "do not fit base_weight"),
        ([(6, 5), (2, 6, 3), (2, 3, 5)], {}, "do not fit base_weight"),
        ([(6, 5), (6, 3), (3, 5)], dict(tp_size=2), "there is no process group"),
        ([(6, 5), (6, 3), (3, 5)], dict(tp_size=0), "tp_size=0"),
        ([(6, 5), (6, 3), (3, 5)], dict(dim=0), "dim=0"),
        ([(6, 5), (6, 3), (3, 5)], dict(alpha=float("nan")), "alpha=nan"),
    ],
)
def test_shapes_that_fit_nothing_are_refused(shapes: list[Any], options: dict[str, Any], said: str) -> None:
    w, b, a = (torch.zeros(*shape) for shape in shapes)
    with pytest.raises(ConfigError, match=said):
        LoRAMerge().merge(w, b, a, **{"alpha": 3, "dim": 3, **options})


def test_a_weight_of_integers_is_refused() -> None:
    with pytest.raises(ConfigError, match="dequantise it first"):
        LoRAMerge().merge(torch.zeros(6, 5, dtype=torch.int8), torch.zeros(6, 3), torch.zeros(3, 5), 3, 3)


def broken_on_one_rank(how: str) -> str:
    """One rank cannot merge: none does, and every rank has the model that it had."""
    model = made("lora")
    if dist.get_rank() == 1:
        fc2 = model.mlp.experts.local_experts[0].linear_fc2
        if how == "nan":
            fc2.to_wrap.weight.data[0, 0] = torch.nan
        else:
            fc2.to_wrap.weight.data = fc2.to_wrap.weight.data.to(torch.float8_e4m3fn)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        LoRAMerge()(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert not any(layer.merged for _, layer in adapted_layers(model))
    layer = model.mlp.experts.local_experts[0].linear_fc2
    with pytest.raises(ModelError):
        LoRAMerge().transform(layer)
    assert not layer.merged
    return str(caught.value)


@pytest.mark.parametrize(("how", "said"), [("nan", "would hold NaN or Inf"), ("quantised", "float8_e4m3fn")])
def test_an_error_on_one_rank_leaves_all_as_they_were(two_ranks: Ranks, how: str, said: str) -> None:
    other, own = two_ranks.run(broken_on_one_rank, how)
    assert said in own
    assert "local_experts.0.linear_fc2" in own
    assert said in other
    assert "rank 1" in other


def dtensor_merge() -> tuple[torch.Tensor, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(H, F), nn.Linear(F, H))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    torch.manual_seed(4)
    model = DoRA(["0", "1"], dim=RANK, lora_B_init_method="normal")(model)
    x = numbers(5, H, seed=1)
    before = [layer.to_wrap.weight.to_local().clone() for layer in model]
    expected = model(x)
    LoRAMerge()(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(model[0].to_wrap.weight.to_local(), before[0])
    LoRAMerge().unmerge(model)
    after = [layer.to_wrap.weight.to_local() for layer in model]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    return expected.detach(), x


def test_layers_of_dtensors_merge_and_unmerge(two_ranks: Ranks) -> None:
    two_ranks.run(dtensor_merge)


def plain(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    base = nn.Sequential(nn.Linear(H, F, dtype=dtype), nn.Linear(F, H, dtype=dtype))
    return LoRA(["0", "1"], dim=RANK, lora_B_init_method="normal")(base)


def test_one_module_merges_and_other_modules_are_left_alone() -> None:
    model = plain()
    x = numbers(3, H, seed=1)
    expected = model[0](x)
    assert LoRAMerge().transform(model[0], "0", "decoder") is model[0]
    assert model[0].merged
    assert not model[1].merged
    torch.testing.assert_close(model[0](x), expected, rtol=1e-5, atol=1e-4)
    other = nn.Linear(3, 3)
    assert LoRAMerge().transform(other, "other") is other


def test_a_merged_adapter_cannot_be_switched_off_and_one_switched_off_is_merged_all_the_same() -> None:
    model, lora = plain(), LoRA(["0", "1"], dim=RANK)
    x = numbers(3, H, seed=1)
    adapted = model(x)
    lora.disable_adapter_layers(model)
    without = model(x)
    LoRAMerge()(model, training=False)
    assert not model.training
    torch.testing.assert_close(model(x), adapted, rtol=1e-5, atol=1e-4)
    with pytest.raises(ModelError, match="take it out first"), lora.disable_adapter(model):
        pass
    LoRAMerge().unmerge(model)
    torch.testing.assert_close(model(x), without, rtol=0, atol=0)


def test_copies_of_a_merged_model_unmerge_by_themselves() -> None:
    model = plain()
    x = numbers(3, H, seed=1)
    expected = model(x)
    twin = copy.deepcopy(LoRAMerge()(model))
    LoRAMerge().unmerge(twin)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    assert model[0].merged


def test_unloading_gives_the_base_layers_back_also_a_root() -> None:
    linear = nn.Linear(H, F)
    weight = linear.weight.detach().clone()
    root = LoRA([], dim=RANK, lora_B_init_method="normal")(linear)
    assert root is not linear
    assert LoRAMerge().unload(root) is linear
    torch.testing.assert_close(linear.weight, weight, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_do_not_depend_on_autocast(kind: str) -> None:
    model, other = made(kind), made(kind)
    LoRAMerge()(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        LoRAMerge()(other)
    torch.testing.assert_close(dict(other.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


def second_expert_broken() -> nn.Module:
    model = made("lora")
    with torch.no_grad():
        model.mlp.experts.linear_fc1.to_wrap.weight1[0, 0] = torch.inf
    return model


def tied() -> nn.Module:
    base = nn.Sequential(nn.Linear(H, H), nn.Linear(H, H), nn.Linear(H, H))
    base[2].weight = base[1].weight
    return LoRA(["0", "1"], dim=RANK)(base)


def quantised() -> nn.Module:
    base = nn.Sequential(nn.Linear(64, 64), FakeQuantLinear.from_linear(nn.Linear(64, 64)))
    return LoRA(["0", "1"], dim=RANK)(base)


def parametrised() -> nn.Module:
    model = plain()
    nn.utils.parametrizations.weight_norm(model[1].to_wrap)
    return model


def overflowing() -> nn.Module:
    model = plain(torch.float16)
    with torch.no_grad():
        model[1].adapter.linear_in.weight.fill_(6e4)
    return model


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (tied, "'1' shares its weight with '2'"),
        (quantised, "'1' .* is stored as .*quantised"),
        (parametrised, "not a parameter but computed"),
        (overflowing, "the weight of '1' would hold NaN or Inf"),
        (second_expert_broken, "the weight1 of 'mlp.experts.linear_fc1' would hold NaN or Inf"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is(build: Callable[[], nn.Module], said: str) -> None:
    model = build()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ModelError, match=said):
        LoRAMerge()(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert not any(layer.merged for _, layer in adapted_layers(model))


def test_a_merged_state_is_that_of_a_plain_model_and_none_comes_into_a_merged_one() -> None:
    model, fresh, plain = (
        LoRA(["linear_fc1"], dim=4)(nn.ModuleDict({"linear_fc1": nn.Linear(6, 8)})) for _ in range(3)
    )
    nn.init.normal_(model["linear_fc1"].adapter.linear_out.weight)
    x = torch.randn(3, 6)
    expected = model["linear_fc1"](x)
    LoRAMerge()(model)
    state = model.state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*linear_fc1.adapter.linear_in.weight"):
        fresh.load_state_dict(state)
    LoRAMerge().unload(plain)
    plain.load_state_dict(state)
    torch.testing.assert_close(plain["linear_fc1"](x), expected)
    with pytest.raises(ModelError, match="'linear_fc1' is merged, so no state can be loaded into it; take the adapter"):
        model.load_state_dict(state)
    LoRAMerge().unmerge(model)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(fresh["linear_fc1"](x), expected)


def test_unload_takes_back_what_recompute_needed() -> None:
    block = nn.Module()
    block.config = SimpleNamespace(recompute_granularity="full")
    block.layers = nn.ModuleList([nn.ModuleDict({"linear_fc1": nn.Linear(6, 8)})])
    LoRA(["linear_fc1"], dim=4)(block)
    assert len(block._forward_pre_hooks) == 1
    LoRAMerge().unload(block)
    assert not block._forward_pre_hooks
    assert not block._forward_pre_hooks_with_kwargs
