"""Adapters beside parallel layers compute what one beside the whole layer computes, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.collectives import exchange, gather, reduce_scatter, shard, spread, total
from smartinit.formats.rows import join_rows, shard_rows
from smartinit.megatron import LoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from ranks import Ranks

IN, OUT, RANK, TOKENS = 16, 24, 8, 12
COLUMN = [dict(), dict(sequence_parallel=True), dict(gather_output=True), dict(is_expert=True)]
ROW = [dict(), dict(sequence_parallel=True), dict(a2a=True, sequence_parallel=True), dict(input_is_parallel=False)]
ROW += [dict(is_expert=True)]
CASES = [("column", case) for case in COLUMN] + [("row", case) for case in ROW]


class Config:
    gated_linear_unit = True


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(x: torch.Tensor, dy: torch.Tensor, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """``W x + b + s·B A x`` and its gradients, of one process, from the numbers that every rank starts with."""
    w, bias = whole_weight()
    a, b = factors()
    w, bias, a, b, x, dy = (t.to(dtype) for t in (w, bias, a, b, x, dy))
    for t in (a, b, x):
        t.requires_grad_()
    y = x @ w.T + bias + (32 / RANK) * (x @ a.T @ b.T)
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(RANK, IN, seed=1), numbers(OUT, RANK, seed=2)


def whole_weight() -> tuple[torch.Tensor, torch.Tensor]:
    layer = ColumnParallelLinear(IN, OUT, generator=torch.Generator().manual_seed(5))
    return layer.weight.detach(), layer.bias.detach()


def parallel(kind: str, options: dict[str, Any], gated: bool) -> dict[str, torch.Tensor]:
    """The same on this rank of as many as there are, gathered by hand."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    options = dict(options)
    lora = LoRA(target_modules=["linear_fc1"], dim=RANK, a2a_experimental=options.pop("a2a", False))
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    generator = torch.Generator().manual_seed(5)
    halves = {"config": Config(), "stride": 2} if gated else {}
    base = make(IN, OUT, tp_group=group, generator=generator, **halves, **options)
    base.skip_bias_add = bool(options.get("is_expert"))
    model = lora(nn.ModuleDict({"linear_fc1": base}))
    layer = model["linear_fc1"]
    layer.adapter.set_whole(*factors())
    x, dy = numbers(TOKENS, 2, IN, seed=3), numbers(TOKENS, 2, OUT, seed=4)
    by_tokens = options.get("sequence_parallel", False)
    expert = options.get("is_expert", False)

    def cut(t: torch.Tensor, dim: int, gated: bool = False) -> torch.Tensor:
        return shard_rows(t, rank, size, gated=gated, dim=dim)

    if kind == "column":
        x = cut(x, 0) if by_tokens else x
        dy = dy if options.get("gather_output") else cut(dy, -1, gated)
    else:
        x = x if options.get("input_is_parallel") is False else cut(x, -1)
        dy = cut(dy, 0) if by_tokens else dy
    x = x.clone().requires_grad_()
    y, bias = layer(x)
    y.backward(dy)
    y = y.detach()
    if expert and kind == "column":  # addends of a column-parallel expert: the gradient of the input
        y = y + bias
        dist.all_reduce(x.grad)
    elif expert:
        dist.all_reduce(y)
        y = y + bias

    def joined(t: torch.Tensor, dim: int, gated: bool = False) -> torch.Tensor:
        parts = [torch.empty_like(t) for _ in range(size)]
        dist.all_gather(parts, t.contiguous())
        return join_rows(parts, gated=gated, dim=dim)

    if kind == "column":
        y = y if options.get("gather_output") else joined(y, -1, gated)
        dx = joined(x.grad, 0) if by_tokens else x.grad
    else:
        y = joined(y, 0) if by_tokens else y
        dx = x.grad if options.get("input_is_parallel") is False else joined(x.grad, -1)
    shapes = [tuple(layer.adapter.linear_in.weight.shape), tuple(layer.adapter.linear_out.weight.shape)]
    return {
        "y": y,
        "dx": dx,
        "da": joined(layer.adapter.linear_in.weight.grad, 0 if kind == "column" else 1),
        "db": joined(layer.adapter.linear_out.weight.grad, 0, gated),
        "shapes": shapes,
    }


@pytest.mark.parametrize(
    ("kind", "options", "gated"), [(*c, False) for c in CASES] + [("column", c, True) for c in COLUMN[:2]]
)
def test_outputs_and_gradients_are_those_of_the_whole_layer(
    ranks: Ranks, kind: str, options: dict[str, Any], gated: bool
) -> None:
    expected = dense(numbers(TOKENS, 2, IN, seed=3), numbers(TOKENS, 2, OUT, seed=4))
    t = ranks.world
    for found in ranks.run(parallel, kind, options, gated):
        column, row = [(RANK // t, IN), (OUT // t, RANK)], [(RANK, IN // t), (OUT // t, RANK)]
        assert found.pop("shapes") == (column if kind == "column" else row)
        for name, value in found.items():
            torch.testing.assert_close(
                value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def second_derivatives() -> None:
    group = dist.group.WORLD
    size = dist.get_world_size()
    x = numbers(4, 4, seed=dist.get_rank()).double().requires_grad_()
    shards, whole = dict(group=group), numbers(4, 4, seed=9).double().requires_grad_()
    for gradient in ("slice", "sum"):
        assert gather(x, 1, **shards, gradient=gradient).shape == (4, 4 * size)
    for func, t in (
        (lambda t: spread(t, group), whole),
        (lambda t: total(t, group), x),
        (lambda t: reduce_scatter(t, 0, group), x),
        (lambda t: exchange(t, 0, 1, group), x),
        (lambda t: shard(t, 1, group), whole),
    ):
        (first,) = torch.autograd.grad(func(t).square().sum(), t, create_graph=True)
        first.square().sum().backward()


def test_collectives_have_second_derivatives(two_ranks: Ranks) -> None:
    two_ranks.run(second_derivatives)


def start(method: str, size: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole factors of a new adapter on the first `size` ranks, a group of its own."""
    groups = [dist.new_group(range(i, i + size)) for i in range(0, dist.get_world_size(), size)]
    group = groups[dist.get_rank() // size]
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    torch.manual_seed(dist.get_rank() + 7)  # ranks need not agree
    model = LoRA(["linear_fc1"], dim=RANK, lora_A_init_method=method, lora_B_init_method=method)(
        nn.ModuleDict({"linear_fc1": make(IN, OUT, tp_group=group, config=Config(), stride=2)})
    )
    return model["linear_fc1"].adapter.whole()


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("method", ["xavier", "normal", "kaiming", "uniform"])
def test_starts_do_not_depend_on_the_number_of_ranks(four_ranks: Ranks, method: str, kind: str) -> None:
    torch.manual_seed(7)
    model = LoRA(["linear_fc1"], dim=RANK, lora_A_init_method=method, lora_B_init_method=method)(
        nn.ModuleDict({"linear_fc1": ColumnParallelLinear(IN, OUT)})
    )
    expected = model["linear_fc1"].adapter.whole()
    for size in (1, 2, 4):
        for found in four_ranks.run(start, method, size, kind):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_state_dicts_have_the_names_of_megatron_bridge_and_load() -> None:
    base = nn.ModuleDict({"linear_fc1": ColumnParallelLinear(IN, OUT), "other": nn.Linear(3, 3)})
    before = {name: t.clone() for name, t in base.state_dict().items()}
    model = LoRA(["linear_fc1"], dim=RANK)(base)
    state = model.state_dict()
    adapter = {"linear_fc1.adapter.linear_in.weight", "linear_fc1.adapter.linear_out.weight"}
    assert set(state) == set(before) | adapter
    twin = LoRA(["linear_fc1"], dim=RANK)(
        nn.ModuleDict({"linear_fc1": ColumnParallelLinear(IN, OUT), "other": nn.Linear(3, 3)})
    )
    twin.load_state_dict(state)
    torch.testing.assert_close(dict(twin.state_dict()), dict(state), rtol=0, atol=0)
    missing = model.load_state_dict(before, strict=False)
    assert set(missing.missing_keys) == adapter
    assert not missing.unexpected_keys
