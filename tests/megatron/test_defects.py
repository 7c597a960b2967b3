"""One test for each defect of the reference's adapters: what is right, on one process and, where it matters, on two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.layer import AdaptedLayer
from smartinit.errors import TargetError
from smartinit.formats.rows import shard_rows
from smartinit.megatron import CanonicalLoRA, DoRA, LoRA, LoRAMerge, VLMLoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from ranks import Ranks

IN, OUT, RANK = 8, 12, 4
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 2


def group() -> Any:
    return dist.group.WORLD if dist.is_initialized() else None


def me() -> tuple[int, int]:
    """Rank and size; of a single process 0 and 1."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def own(t: torch.Tensor, dim: int) -> torch.Tensor:
    return shard_rows(t, *me(), dim=dim)


def parallel(kind: str, name: str = "linear_fc1", **options: Any) -> nn.ModuleDict:
    """One parallel layer of the same whole weight on any number of ranks."""
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    generator = torch.Generator().manual_seed(5)
    return nn.ModuleDict({name: make(IN, OUT, bias=False, tp_group=group(), generator=generator, **options)})


def whole_weight() -> torch.Tensor:
    return ColumnParallelLinear(IN, OUT, bias=False, generator=torch.Generator().manual_seed(5)).weight.detach()


def both(two_ranks: Ranks, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What a single process finds, and what each of two ranks finds."""
    return [function(*args), *two_ranks.run(function, *args)]


def decoder() -> nn.Module:
    blocks = [nn.ModuleDict({"self_attention": nn.ModuleDict({"linear_qkv": nn.Linear(2, 2)})}) for _ in range(101)]
    return nn.ModuleDict({"decoder": nn.ModuleDict({"layers": nn.ModuleList(blocks)})})


@pytest.mark.parametrize(
    ("pattern", "layer"), [("*.layers.1.*.linear_qkv", 1), ("*.layers.10.*qkv", 10), ("decoder.layers.0.*_qkv", 0)]
)
def test_defect_1_dots_in_patterns_are_dots(pattern: str, layer: int) -> None:
    model = LoRA([pattern], dim=1)(decoder())
    found = [name for name, module in model.named_modules() if isinstance(module, AdaptedLayer)]
    assert found == [f"decoder.layers.{layer}.self_attention.linear_qkv"]


def decomposed(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output of a DoRA layer on this rank and its gradient for the magnitude, both whole."""
    layer = DoRA(["linear_fc1"], dim=RANK, alpha=RANK)(parallel(kind))["linear_fc1"]
    layer.adapter.set_whole(numbers(RANK, IN, seed=1), numbers(OUT, RANK, seed=2))
    layer.adapter.set_whole_magnitude(numbers(OUT, seed=3).abs() + 1)
    x = numbers(5, IN, seed=4)
    y, _ = layer(x if kind == "column" else own(x, -1))
    y.backward(own(numbers(5, OUT, seed=6), -1) if kind == "column" else numbers(5, OUT, seed=6))
    if kind == "column":
        return layer.adapter.joined(y.T, "out").T, layer.adapter.joined(layer.adapter.weight_magnitude.grad, "out")
    return y.detach(), layer.adapter.weight_magnitude.grad


@pytest.mark.parametrize("kind", ["column", "row"])
def test_defect_2_the_norms_of_dora_are_those_of_whole_rows(two_ranks: Ranks, kind: str) -> None:
    w, a, b = whole_weight().double(), numbers(RANK, IN, seed=1).double(), numbers(OUT, RANK, seed=2).double()
    m = (numbers(OUT, seed=3).abs() + 1).double().requires_grad_()
    whole = w + b @ a
    y = numbers(5, IN, seed=4).double() @ (m[:, None] * whole / whole.norm(dim=1, keepdim=True)).T
    y.backward(numbers(5, OUT, seed=6).double())
    for found, gradient in both(two_ranks, decomposed, kind):
        torch.testing.assert_close(found.double(), y.detach(), **TOLERANCE)
        torch.testing.assert_close(gradient.double(), m.grad, **TOLERANCE)


def expert(name: str) -> dict[str, torch.Tensor]:
    """A layer of a tensor-parallel expert, whose output is summed up by whoever called it."""
    kind = "column" if name == "linear_fc1" else "row"
    made = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": parallel(kind, name, is_expert=True)})})
    layer = LoRA([name], dim=RANK, alpha=RANK)(made)["mlp"]["experts"][name]
    layer.adapter.set_whole(numbers(RANK, IN, seed=1), numbers(OUT, RANK, seed=2))
    x = (numbers(5, IN, seed=4) if kind == "column" else own(numbers(5, IN, seed=4), -1)).requires_grad_()
    y, _ = layer(x)
    y.backward(own(numbers(5, OUT, seed=6), -1) if kind == "column" else numbers(5, OUT, seed=6))
    summed = y.detach() if kind == "row" else x.grad
    if group() is not None:
        dist.all_reduce(summed)
    adapter = layer.adapter
    return {
        "summed": summed,
        "da": adapter.joined(adapter.linear_in.weight.grad, "in"),
        "db": adapter.joined(adapter.linear_out.weight.grad, "out"),
    }


@pytest.mark.parametrize("name", ["linear_fc1", "linear_fc2"])
def test_defect_3_updates_of_experts_are_addends_as_the_outputs_are(two_ranks: Ranks, name: str) -> None:
    w, a, b = whole_weight().double(), numbers(RANK, IN, seed=1).double(), numbers(OUT, RANK, seed=2).double()
    x = numbers(5, IN, seed=4).double()
    for t in (x, a, b):
        t.requires_grad_()
    y = x @ (w + b @ a).T
    y.backward(numbers(5, OUT, seed=6).double())
    expected = {"summed": y.detach() if name == "linear_fc2" else x.grad, "da": a.grad, "db": b.grad}
    for found in both(two_ranks, expert, name):
        torch.testing.assert_close({k: t.double() for k, t in found.items()}, expected, **TOLERANCE)


def options_taken(kind: str) -> None:
    made = parallel(kind) if kind != "linear" else nn.ModuleDict({"linear_fc1": nn.Linear(IN, OUT)})
    lora = LoRA(["linear_fc1"], dim=RANK, lora_dtype=torch.float64, dropout=0.5, dropout_position="post")
    lora.lora_B_init_method = "normal"
    layer = lora(made)["linear_fc1"]
    assert {p.dtype for p in layer.adapter.parameters()} == {torch.float64}
    a, b = layer.adapter.whole()
    assert b.any()
    if kind == "row" or me()[1] == 1:  # the whole output is here: what is dropped of the update are outputs
        x = numbers(50, IN, seed=4)
        x = own(x, -1) if kind == "row" else x
        with lora.disable_adapter(made):
            before = layer(x)
        after = layer(x)
        before, after = (t if isinstance(t, torch.Tensor) else t[0] for t in (before, after))
        kept = after != before
        assert 0.3 < kept.float().mean() < 0.7
        update = 32 / RANK * (numbers(50, IN, seed=4).double() @ a.T @ b.T)
        torch.testing.assert_close((after - before)[kept].double(), 2 * update[kept], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["column", "row", "linear"])
def test_defect_4_dtype_dropout_position_and_start_of_b_hold_for_all_layers(two_ranks: Ranks, kind: str) -> None:
    both(two_ranks, options_taken, kind)


def start(kind: str, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(11)
    lora = LoRA(["linear_fc1"], dim=RANK, lora_A_init_method=method, lora_B_init_method="normal")
    return lora(parallel(kind))["linear_fc1"].adapter.whole()


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("method", ["xavier", "kaiming"])
def test_defect_5_starts_do_not_depend_on_the_tensor_parallel_size(two_ranks: Ranks, kind: str, method: str) -> None:
    alone, *others = both(two_ranks, start, kind, method)
    for found in others:
        torch.testing.assert_close(found, alone, rtol=0, atol=0)
    if method == "xavier":
        assert alone[0].std() == pytest.approx((2 / (IN + RANK)) ** 0.5, rel=0.4)


def canonical(tokens: int) -> torch.Tensor:
    """Two heads in two groups, of two numbers each: rows q0 k0 v0 q1 k1 v1; only q is adapted."""
    config = SimpleNamespace(num_attention_heads=2, num_query_groups=2, kv_channels=2)
    made = parallel("column", "linear_qkv", config=config)
    layer = CanonicalLoRA(["linear_q"], dim=RANK, alpha=RANK)(made)["linear_qkv"]
    adapter = layer.adapter["adapter_q"]
    adapter.set_whole(numbers(RANK, IN, seed=1), numbers(4, RANK, seed=2))
    y, _ = layer(numbers(tokens, IN, seed=4))
    if group() is None:
        return y.detach()
    parts = [torch.empty_like(y) for _ in range(2)]
    dist.all_gather(parts, y.detach().contiguous())
    return torch.cat(parts, -1)


@pytest.mark.parametrize("tokens", [1, 3])
def test_defect_6_canonical_adapters_of_a_subset_and_of_one_token(two_ranks: Ranks, tokens: int) -> None:
    x = numbers(tokens, IN, seed=4)
    expected = x @ whole_weight().T
    expected[:, [0, 1, 6, 7]] += x @ numbers(RANK, IN, seed=1).T @ numbers(4, RANK, seed=2).T
    for found in both(two_ranks, canonical, tokens):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def test_defect_7_vlm_lora_takes_bare_models_missing_parts_and_all_chunks() -> None:
    def chunk(*parts: str) -> nn.ModuleDict:
        return nn.ModuleDict({part: nn.ModuleDict({"linear_proj": nn.Linear(2, 2)}) for part in parts})

    chunks = [chunk("vision_model"), chunk("language_model")]  # neither wrapped nor with a vision_projection
    VLMLoRA(["linear_proj"], dim=1, freeze_vision_model=False)(chunks)
    vision, language = chunks[0]["vision_model"]["linear_proj"], chunks[1]["language_model"]["linear_proj"]
    assert isinstance(vision, nn.Linear), "what trains in full has no adapter"
    assert vision.weight.requires_grad
    assert isinstance(language, AdaptedLayer)
    assert not language.weight.requires_grad


def test_defect_8_state_dicts_load_and_a_second_call_freezes_nothing() -> None:
    model = LoRA(["linear_fc1"], dim=RANK)(parallel("column"))
    model.load_state_dict(model.state_dict())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert names == ["linear_fc1.adapter.linear_in.weight", "linear_fc1.adapter.linear_out.weight"]
    LoRA(["linear_fc1"], dim=RANK)(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names
    root = LoRA([], dim=1)(nn.Linear(2, 2))
    assert isinstance(root, AdaptedLayer)


def merged(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's output before and after its merge; and `LoRAMerge.merge` makes the same weight from shards."""
    made = LoRA(["linear_fc1"], dim=RANK, alpha=8)(parallel(kind))
    layer = made["linear_fc1"]
    layer.adapter.set_whole(numbers(RANK, IN, seed=1), numbers(OUT, RANK, seed=2))
    x = numbers(5, IN, seed=4)
    x = x if kind == "column" else own(x, -1)
    before = layer(x)[0].detach()
    a, b = layer.adapter.linear_in.weight, layer.adapter.linear_out.weight
    weight = LoRAMerge().merge(layer.weight, b, a, 8, RANK, tp_size=me()[1], tp_group=group())
    LoRAMerge()(made)
    torch.testing.assert_close(layer.weight, weight, **TOLERANCE)
    dense = whole_weight() + 2 * numbers(OUT, RANK, seed=2) @ numbers(RANK, IN, seed=1)
    torch.testing.assert_close(layer.weight, own(dense, 0 if kind == "column" else 1), **TOLERANCE)
    return before, layer(x)[0].detach()


@pytest.mark.parametrize("kind", ["column", "row"])
def test_defect_9_a_merged_update_counts_once(two_ranks: Ranks, kind: str) -> None:
    for before, after in both(two_ranks, merged, kind):
        torch.testing.assert_close(after, before, **TOLERANCE)


def misspelt() -> None:
    made = parallel("column")
    with pytest.raises(TargetError, match=r"'linear_fc2'.*closest: 'linear_fc1'"):
        LoRA(["linear_fc1", "linear_fc2"], dim=RANK)(made)
    assert isinstance(made["linear_fc1"], ColumnParallelLinear)
    assert made["linear_fc1"].weight.requires_grad


def test_defect_10_misspelt_targets_are_refused(two_ranks: Ranks) -> None:
    both(two_ranks, misspelt)
