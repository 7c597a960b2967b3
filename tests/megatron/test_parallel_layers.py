"""Adapters beside parallel layers compute what one beside the whole layer computes, forward and backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.parallel.collectives import exchange, gather, reduce_scatter, shard, spread, total
from smartinit.errors import ModelError
from smartinit.formats.rows import join_rows, shard_rows
from smartinit.megatron import CanonicalLoRA, DoRA, LoRA
from smartinit.megatron.moe_stand_ins import TopKRouter
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from ranks import Ranks

IN, OUT, RANK, TOKENS = 16, 24, 8, 12
COLUMN = [dict(), dict(sequence_parallel=True), dict(gather_output=True), dict(is_expert=True)]
COLUMN += [dict(runtime=True), dict(gather_output=True, runtime=False), dict(sequence_parallel=True, runtime=True)]
COLUMN += [dict(disable_grad_reduce=True), dict(disable_grad_reduce=True, gather_output=True)]
COLUMN += [dict(disable_grad_reduce=True, sequence_parallel=True)]
ROW = [dict(), dict(sequence_parallel=True), dict(a2a=True, sequence_parallel=True), dict(input_is_parallel=False)]
ROW += [dict(is_expert=True)]
CASES = [("column", case) for case in COLUMN] + [("row", case) for case in ROW]


class Config:
    gated_linear_unit = True


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(
    x: torch.Tensor, dy: torch.Tensor, mask: torch.Tensor | None = None, position: str = "pre"
) -> dict[str, torch.Tensor]:
    """``W x + b + s·B A x`` and its gradients, of one process, from the numbers that every rank starts with.

    ``mask`` is what dropout leaves of x, or of the update.
    """
    w, bias = whole_weight()
    a, b = factors()
    w, bias, a, b, x, dy = (t.double() for t in (w, bias, a, b, x, dy))
    for t in (a, b, x):
        t.requires_grad_()
    before, after = (mask if mask is not None and position == at else 1 for at in ("pre", "post"))
    y = x @ w.T + bias + (32 / RANK) * ((x * before) @ a.T @ b.T) * after
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad}


def factors() -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(RANK, IN, seed=1), numbers(OUT, RANK, seed=2)


def whole_weight() -> tuple[torch.Tensor, torch.Tensor]:
    layer = ColumnParallelLinear(IN, OUT, generator=torch.Generator().manual_seed(5))
    return layer.weight.detach(), layer.bias.detach()


def watched(adapter: Any, position: str) -> list[tuple[torch.Tensor, bool]]:
    """What dropout leaves at a position, and whether ranks have different tokens or features there: to be filled."""
    masks: list[tuple[torch.Tensor, bool]] = []
    dropped = adapter.dropped

    def noted(x: torch.Tensor, at: str, *, apart: bool) -> torch.Tensor:
        if at != position:
            return x
        masks.append((dropped(torch.ones_like(x), at, apart=apart), apart))
        return x * masks[-1][0]

    adapter.dropped = noted
    return masks


def joined(t: torch.Tensor, dim: int, gated: bool = False) -> torch.Tensor:
    """The whole of all ranks' shards."""
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return join_rows(parts, gated=gated, dim=dim)


def parallel(kind: str, options: dict[str, Any], gated: bool, position: str = "") -> dict[str, Any]:
    """The same on this rank of as many as there are, gathered by hand; with dropout at a position."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    options = dict(options)
    dropout = dict(dropout=0.5, dropout_position=position) if position else {}
    lora = LoRA(target_modules=["linear_fc1"], dim=RANK, a2a_experimental=options.pop("a2a", False), **dropout)
    said = {"runtime_gather_output": options.pop("runtime")} if "runtime" in options else {}
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
    gathers = said.get("runtime_gather_output", options.get("gather_output"))
    masks = watched(layer.adapter, position)
    torch.manual_seed(rank)  # ranks need not agree

    def cut(t: torch.Tensor, dim: int, gated: bool = False) -> torch.Tensor:
        return shard_rows(t, rank, size, gated=gated, dim=dim)

    if kind == "column":
        x = cut(x, 0) if by_tokens else x
        dy = dy if gathers else cut(dy, -1, gated)
    else:
        x = x if options.get("input_is_parallel") is False else cut(x, -1)
        dy = cut(dy, 0) if by_tokens else dy
    x = x.clone().requires_grad_()
    y, bias = layer(x, **said)
    y.backward(dy)
    y = y.detach()
    if (expert and kind == "column") or (options.get("disable_grad_reduce") and not by_tokens):
        dist.all_reduce(x.grad)  # addends
    if expert and kind == "row":
        dist.all_reduce(y)
    if expert:
        y = y + bias
    if kind == "column":
        y = y if gathers else joined(y, -1, gated)
        dx = joined(x.grad, 0) if by_tokens else x.grad
    else:
        y = joined(y, 0) if by_tokens else y
        dx = x.grad if options.get("input_is_parallel") is False else joined(x.grad, -1)
    along = 0 if (kind == "column") == (position == "pre") else -1
    shapes = [tuple(layer.adapter.linear_in.weight.shape), tuple(layer.adapter.linear_out.weight.shape)]
    return {
        "y": y,
        "dx": dx,
        "da": joined(layer.adapter.linear_in.weight.grad, 0 if kind == "column" else 1),
        "db": joined(layer.adapter.linear_out.weight.grad, 0, gated),
        "shapes": shapes,
        "masks": [joined(mask, along) if apart else mask for mask, apart in masks],
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
        assert found.pop("masks") == []
        column, row = [(RANK // t, IN), (OUT // t, RANK)], [(RANK, IN // t), (OUT // t, RANK)]
        assert found.pop("shapes") == (column if kind == "column" else row)
        for name, value in found.items():
            torch.testing.assert_close(
                value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


DROPS = [("column", case) for case in COLUMN[:3]] + [("row", case) for case in ROW if "a2a" not in case]


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize(("kind", "options"), DROPS)
def test_ranks_drop_the_same_of_what_they_all_have(
    two_ranks: Ranks, kind: str, options: dict[str, Any], position: str
) -> None:
    results = two_ranks.run(parallel, kind, options, False, position)
    masks = [found.pop("masks") for found in results]
    assert len(masks[0]) == 1
    torch.testing.assert_close(masks[0], masks[1], rtol=0, atol=0)
    assert 0.3 < (masks[0][0] == 0).float().mean() < 0.7
    expected = dense(numbers(TOKENS, 2, IN, seed=3), numbers(TOKENS, 2, OUT, seed=4), masks[0][0].double(), position)
    for found in results:
        del found["shapes"]
        for name, value in found.items():
            torch.testing.assert_close(
                value.double(), expected[name], rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def canonical(said: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A gated layer of whose projections each has an adapter: output ``[gate; up]`` and gradient of x."""
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    said = dict(said)
    base = ColumnParallelLinear(
        IN,
        OUT,
        tp_group=group,
        config=Config(),
        stride=2,
        gather_output=said.pop("gather_output", False),
        generator=torch.Generator().manual_seed(5),
    )
    made = CanonicalLoRA(["linear_fc1_gate", "linear_fc1_up"], dim=RANK)
    layer = made(nn.ModuleDict({"linear_fc1": base}))["linear_fc1"]
    a, b = factors()
    layer.adapter["adapter_gate"].set_whole(a, b[: OUT // 2])
    layer.adapter["adapter_up"].set_whole(a, b[OUT // 2 :])
    x = numbers(TOKENS, 2, IN, seed=3).requires_grad_()
    y, _ = layer(x, **said)
    dy = numbers(TOKENS, 2, OUT, seed=4)
    parts = [shard_rows(dy, i, size, gated=True, dim=-1) for i in range(size)]
    gathers = y.shape[-1] == OUT
    y.backward(torch.cat(parts, -1) if gathers else parts[rank])
    pieces = list(y.detach().chunk(size, -1))
    if not gathers:
        pieces = [torch.empty_like(y) for _ in range(size)]
        dist.all_gather(pieces, y.detach().contiguous())
    return join_rows(pieces, gated=True, dim=-1), x.grad


@pytest.mark.parametrize(
    "said", [dict(runtime_gather_output=True), dict(gather_output=True, runtime_gather_output=False)]
)
def test_projections_follow_a_call_that_says_whether_to_gather(two_ranks: Ranks, said: dict[str, Any]) -> None:
    x, dy = numbers(TOKENS, 2, IN, seed=3), numbers(TOKENS, 2, OUT, seed=4)
    expected = dense(x, dy)
    for y, dx in two_ranks.run(canonical, said):
        torch.testing.assert_close(y.double(), expected["y"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx.double(), expected["dx"], rtol=1e-5, atol=1e-5)


def test_projections_drop_the_same_on_all_ranks(two_ranks: Ranks) -> None:
    """Ones for all numbers: what a token has of the update is how many of its features are left."""
    for found in zip(*two_ranks.run(canonical_counts), strict=True):
        torch.testing.assert_close(*found, rtol=0, atol=0)
        assert found[0].unique().numel() > 1


def canonical_counts() -> list[torch.Tensor]:
    base = ColumnParallelLinear(IN, OUT, tp_group=dist.group.WORLD, config=Config(), stride=2, bias=False)
    made = CanonicalLoRA(["linear_fc1_gate", "linear_fc1_up"], dim=RANK, dropout=0.4)
    layer = made(nn.ModuleDict({"linear_fc1": base}))["linear_fc1"]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(float(parameter is not base.weight))
    torch.manual_seed(dist.get_rank())
    y = layer(torch.ones(TOKENS, IN))[0].detach()
    return [y[:, 0], y[:, -1]]  # of the gate, of the up projection


@pytest.mark.parametrize("kind", [LoRA, DoRA])
@pytest.mark.parametrize("word", ["own", "x"])
def test_the_input_may_be_a_keyword(kind: type[LoRA | DoRA], word: str) -> None:
    model = kind(["linear_fc1", "other"], dim=RANK, lora_B_init_method="normal")(
        nn.ModuleDict({"linear_fc1": ColumnParallelLinear(IN, OUT), "other": nn.Linear(IN, 3)})
    )
    x = numbers(TOKENS, IN, seed=3)
    for layer, own in ((model["linear_fc1"], "input_"), (model["other"], "input")):
        torch.testing.assert_close(layer(**{own if word == "own" else "x": x}), layer(x), rtol=0, atol=0)
        with pytest.raises(
            ModelError, match=f"called without an input: expected it as the first argument, or as {own}/x="
        ):
            layer()


class TransformerConfig:
    num_moe_experts, hidden_size, moe_router_topk = 4, IN, 2


def test_a_router_takes_its_input_as_a_keyword() -> None:
    model = LoRA(["router"], dim=RANK)(nn.ModuleDict({"router": TopKRouter(TransformerConfig())}))
    x = numbers(TOKENS, IN, seed=3)
    torch.testing.assert_close(model["router"](x=x), model["router"](x), rtol=0, atol=0)


def plain_under_a_gated_config(options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    group = dist.group.WORLD if dist.is_initialized() else None
    generator = torch.Generator().manual_seed(5)
    name = options.pop("name")
    base = ColumnParallelLinear(IN, OUT, tp_group=group, gather_output=True, generator=generator, **options)
    layer = LoRA([name], dim=RANK)(nn.ModuleDict({name: base}))[name]
    layer.adapter.set_whole(*factors())
    y = layer(numbers(TOKENS, IN, seed=3))[0].detach()
    if options["stride"] == 2:  # gathered by ranks
        y = join_rows(y.chunk(base.output_size // base.output_size_per_partition, -1), gated=True, dim=-1)
    return y, layer.adapter.whole()[1]


@pytest.mark.parametrize(("name", "stride"), [("linear_fc1", 1), ("gate_and_up", 2)])
def test_rows_lie_as_the_layer_says_that_it_cut_them(two_ranks: Ranks, name: str, stride: int) -> None:
    options = dict(name=name, config=Config(), stride=stride)
    expected = plain_under_a_gated_config(dict(options))
    for found in two_ranks.run(plain_under_a_gated_config, options):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [LoRA, DoRA])
def test_adapters_that_are_made_in_inference_mode_train(kind: type[LoRA | DoRA]) -> None:
    base = nn.ModuleDict({"linear_fc1": ColumnParallelLinear(IN, OUT)})
    with torch.inference_mode():
        model = kind(["linear_fc1"], dim=RANK)(base)
    model["linear_fc1"](numbers(TOKENS, IN, seed=3))[0].sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 + (kind is DoRA)
    assert all(p.grad is not None for p in trained)
    torch.optim.SGD(trained, lr=0.1).step()


def marks() -> dict[str, list[tuple[Any, ...]]]:
    """Of the parameters of an expert's adapter: at first, after assignment, after meta, after a copy."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for kind in (LoRA, DoRA):
        base = ColumnParallelLinear(IN, OUT, tp_group=dist.group.WORLD, is_expert=True)
        model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleDict({"linear_fc1": base})})})
        model = kind(["linear_fc1"], dim=RANK)(model)
        adapter = model["mlp"]["experts"]["linear_fc1"].adapter
        names = ("tensor_model_parallel", "partition_dim", "partition_stride", "allreduce")

        def read(adapter: Any = adapter, names: tuple[str, ...] = names) -> list[tuple[Any, ...]]:
            return [tuple(getattr(p, name, None) for name in names) for p in adapter.parameters()]

        state = {name: t.clone() for name, t in model.state_dict().items()}
        found[f"{kind.__name__} first"] = read()
        model.load_state_dict(state, assign=True)
        found[f"{kind.__name__} assigned"] = read()
        model.to("meta").to_empty(device="cpu")
        found[f"{kind.__name__} emptied"] = read()
        model.load_state_dict(state)
        found[f"{kind.__name__} loaded"] = read()
    return found


def test_parameters_keep_what_megatron_reads_of_them(two_ranks: Ranks) -> None:
    expected = (True, 0, 1, False)
    for found in two_ranks.run(marks):
        assert len(found) == 8
        for when, values in found.items():
            assert values == [expected] * (3 if when.startswith("DoRA") else 2), when


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


class TELinear(nn.Module):
    """As Transformer Engine's "duplicated" layers look: a whole weight on every rank, beside tokens of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(whole_weight()[0].double())
        self.in_features, self.out_features = IN, OUT
        self.parallel_mode, self.tp_size, self.tp_group, self.sequence_parallel = None, 1, dist.group.WORLD, True

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return nn.functional.linear(x, self.weight), None


def duplicated() -> dict[str, torch.Tensor]:
    rank, size = dist.get_rank(), dist.get_world_size()
    layer = LoRA(target_modules=["linear_fc1"], dim=RANK)(nn.ModuleDict({"linear_fc1": TELinear()}))["linear_fc1"]
    layer.adapter.set_whole(*factors())
    x = shard_rows(numbers(TOKENS, 2, IN, seed=3).double(), rank, size).requires_grad_()
    layer(x)[0].backward(shard_rows(numbers(TOKENS, 2, OUT, seed=4).double(), rank, size))
    assert layer.adapter.linear_in.weight.shape == (RANK, IN)
    return {"da": layer.adapter.linear_in.weight.grad, "db": layer.adapter.linear_out.weight.grad}


def test_whole_layers_beside_other_tokens_sum_their_gradients(two_ranks: Ranks) -> None:
    expected = dense(numbers(TOKENS, 2, IN, seed=3), numbers(TOKENS, 2, OUT, seed=4))
    for found in two_ranks.run(duplicated):
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name])
