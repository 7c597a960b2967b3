"""DoRA beside parallel layers is DoRA beside the whole layer: outputs, gradients, norms, starts."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.adapters.dora import BaseNorms
from smartinit.adapters.fake_quant import FakeQuantLinear
from smartinit.adapters.parallel.collectives import summed
from smartinit.errors import ConfigError, ModelError
from smartinit.formats.rows import join_rows, shard_rows
from smartinit.megatron import DoRA, LoRA, LoRAMerge, load_adapter, reset_magnitudes, save_adapter
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Ranks

IN, OUT, RANK, TOKENS = 16, 24, 8, 12
SCALING = 64 / RANK
COLUMN = [dict(), dict(skip_bias_add=True), dict(sequence_parallel=True), dict(gather_output=True)]
COLUMN += [dict(is_expert=True, skip_bias_add=True)]
COLUMN += [dict(runtime=True), dict(gather_output=True, runtime=False), dict(disable_grad_reduce=True)]
ROW = [dict(), dict(skip_bias_add=True), dict(sequence_parallel=True), dict(input_is_parallel=False)]
ROW += [dict(is_expert=True, skip_bias_add=True)]
CASES = [("column", case, False) for case in COLUMN] + [("row", case, False) for case in ROW]
CASES += [("column", case, True) for case in (COLUMN[0], COLUMN[2])]


class Config:
    gated_linear_unit = True


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A, B and m."""
    return numbers(RANK, IN, seed=1) / 8, numbers(OUT, RANK, seed=2) / 8, numbers(OUT, seed=6).abs() + 0.5


def whole_base() -> tuple[torch.Tensor, torch.Tensor]:
    layer = ColumnParallelLinear(IN, OUT, generator=torch.Generator().manual_seed(5))
    return layer.weight.detach(), layer.bias.detach()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(TOKENS, 2, IN, seed=3), numbers(TOKENS, 2, OUT, seed=4)


def norms_of(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (w + SCALING * b @ a).norm(dim=1)


def dense(dropped: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Eq. 5 as it is written, in float64, with the whole ``W + s·B A``; ``dropped`` is what remains of x in dropout."""
    w, bias, a, b, m, x, dy = (t.double() for t in (*whole_base(), *factors(), *inputs()))
    for t in (a, b, m, x):
        t.requires_grad_()
    q = m / norms_of(w, a, b).detach()
    if dropped is None:
        y = x @ (q[:, None] * (w + SCALING * b @ a)).T + bias
    else:
        kept = x * dropped.double()
        y = x @ w.T + kept @ ((q - 1)[:, None] * w + q[:, None] * SCALING * (b @ a)).T + bias
    y.backward(dy)
    return {"y": y.detach(), "dx": x.grad, "da": a.grad, "db": b.grad, "dm": m.grad}


def layer_of(kind: str, options: dict[str, Any], gated: bool = False, **dora: Any) -> Any:
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    group = dist.group.WORLD if dist.is_initialized() else None
    options = {**options, "config": Config(), "stride": 2} if gated else dict(options)
    options.pop("runtime", None)
    base = make(IN, OUT, tp_group=group, generator=torch.Generator().manual_seed(5), **options)
    return DoRA(["linear_fc1"], dim=RANK, **dora)(nn.ModuleDict({"linear_fc1": base}))["linear_fc1"]


def on_this_rank(kind: str, options: dict[str, Any], gated: bool, dropout: float = 0.0) -> dict[str, Any]:
    """The same on this rank of as many as there are, gathered by hand."""
    size, rank = dist.get_world_size(), dist.get_rank()
    said = {"runtime_gather_output": options["runtime"]} if "runtime" in options else {}
    gathers = options.get("runtime", options.get("gather_output"))
    layer = layer_of(kind, options, gated, dropout=dropout)
    a, b, m = factors()
    layer.adapter.set_whole(a, b)
    layer.adapter.set_whole_magnitude(m)
    torch.testing.assert_close(layer.adapter.whole_magnitude(), m, rtol=0, atol=0)
    by_tokens, expert = options.get("sequence_parallel", False), options.get("is_expert", False)

    def cut(t: torch.Tensor, dim: int, gated: bool = False) -> torch.Tensor:
        return shard_rows(t, rank, size, gated=gated, dim=dim)

    x, dy = inputs()
    if kind == "column":
        x = cut(x, 0) if by_tokens else x
        dy = dy if gathers else cut(dy, -1, gated)
    else:
        x = x if options.get("input_is_parallel") is False else cut(x, -1)
        dy = cut(dy, 0) if by_tokens else dy
    masks: list[torch.Tensor] = []
    if dropout:
        dropped = layer.adapter.dropped

        def noted(x: torch.Tensor, position: str, *, apart: bool) -> torch.Tensor:
            kept = dropped(torch.ones_like(x), position, apart=apart)
            masks.append(kept)
            return x * kept

        layer.adapter.dropped = noted
    x = x.clone().requires_grad_()
    torch.manual_seed(rank)  # ranks need not agree
    y, bias = layer(x, **said)
    y.backward(dy)
    y = y.detach()
    dm = layer.adapter.weight_magnitude.grad
    if (expert and kind == "column") or options.get("disable_grad_reduce"):  # addends: the gradient of the input
        dist.all_reduce(x.grad)
    elif expert:
        dist.all_reduce(y)

    def joined(t: torch.Tensor, dim: int, gated: bool = False) -> torch.Tensor:
        parts = [torch.empty_like(t) for _ in range(size)]
        dist.all_gather(parts, t.contiguous())
        return join_rows(parts, gated=gated, dim=dim)

    if kind == "column":
        y = y if bias is None else y + bias
        y = y if gathers else joined(y, -1, gated)
        dx = joined(x.grad, 0) if by_tokens else x.grad
        mask = [joined(mask, 0) if by_tokens else mask for mask in masks]
    else:
        y = y if bias is None else y + bias
        y = joined(y, 0) if by_tokens else y
        whole = options.get("input_is_parallel") is False
        dx = x.grad if whole else joined(x.grad, -1)
        mask = [mask if whole else joined(mask, -1) for mask in masks]
    assert len(masks) == bool(dropout)
    return {
        "y": y,
        "dx": dx,
        "da": joined(layer.adapter.linear_in.weight.grad, 0 if kind == "column" else 1),
        "db": joined(layer.adapter.linear_out.weight.grad, 0, gated),
        "dm": joined(dm, 0, gated) if kind == "column" else dm,
        "mask": mask,
        "shape": tuple(dm.shape),
    }


def check(found: list[dict[str, Any]], kind: str) -> None:
    world = len(found)
    mask = found[0]["mask"]
    expected = dense(mask[0] if mask else None)
    for one in found:
        assert one.pop("shape") == ((OUT // world,) if kind == "column" else (OUT,))
        for name in expected:
            torch.testing.assert_close(
                one[name].double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        torch.testing.assert_close(one["dm"], found[0]["dm"], rtol=0, atol=0)
        torch.testing.assert_close(one["mask"], mask, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "options", "gated"), CASES)
def test_outputs_and_gradients_are_those_of_the_whole_layer(
    ranks: Ranks, kind: str, options: dict[str, Any], gated: bool
) -> None:
    check(ranks.run(on_this_rank, kind, options, gated), kind)


@pytest.mark.parametrize(("kind", "options"), [c[:2] for c in CASES if not c[2] and not c[1].get("skip_bias_add")])
def test_dropout_has_one_mask_for_update_and_correction(two_ranks: Ranks, kind: str, options: dict[str, Any]) -> None:
    check(two_ranks.run(on_this_rank, kind, options, False, 0.4), kind)


def magnitude_and_start(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    layer = layer_of(kind, {}, lora_B_init_method="normal")
    a, b = layer.adapter.whole()
    fresh = layer_of(kind, {})
    x = inputs()[0]
    x = x if kind == "column" else shard_rows(x, dist.get_rank(), dist.get_world_size(), dim=-1)
    torch.testing.assert_close(fresh(x)[0], fresh.to_wrap(x)[0], rtol=0, atol=0)
    return layer.adapter.whole_magnitude(), a, b


@pytest.mark.parametrize("kind", ["column", "row"])
def test_defect_2_the_norm_is_that_of_whole_rows_on_every_rank(ranks: Ranks, kind: str) -> None:
    found = ranks.run(magnitude_and_start, kind)
    for m, a, b in found:
        torch.testing.assert_close(m, norms_of(whole_base()[0].double(), a.double(), b.double()).float())
        torch.testing.assert_close(m, found[0][0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_at_first_what_it_did_before(dtype: torch.dtype) -> None:
    base = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype))
    x = inputs()[0].to(dtype)
    expected = base(x)
    model = DoRA(["0"], dim=RANK)(base)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert model.state_dict()["0.adapter.weight_magnitude"].shape == (OUT,)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"0.adapter.{part}" for part in ("linear_in.weight", "linear_out.weight", "weight_magnitude")
    }


EXPERTS, COUNTS = 3, [5, 0, 7]


class Moe(nn.Module):
    """The second layers of three experts, in one module or in a list of them."""

    def __init__(self, grouped: bool, kind: str = "row") -> None:
        super().__init__()
        make = ColumnParallelLinear if kind == "column" else RowParallelLinear
        group = dist.group.WORLD if dist.is_initialized() else None
        options: dict[str, Any] = dict(
            tp_group=group, is_expert=True, generator=torch.Generator().manual_seed(5), skip_bias_add=True, bias=False
        )
        self.mlp = nn.Module()
        self.mlp.experts = nn.Module()
        if grouped:
            self.mlp.experts.linear_fc2 = make(IN, OUT, num_gemms=EXPERTS, **options)
            return
        self.mlp.experts.local_experts = nn.ModuleList(nn.Module() for _ in range(EXPERTS))
        for expert in self.mlp.experts.local_experts:
            expert.linear_fc2 = make(IN, OUT, **options)


def grouped_experts(kind: str) -> dict[str, Any]:
    """Output (addends summed), gradient of m, and start of a grouped layer of experts, against each by itself."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = DoRA(["linear_fc2"], dim=RANK)(Moe(True, kind))
    layer = model.mlp.experts.linear_fc2
    whole = [torch.stack([t + i for i in range(EXPERTS)]) for t in factors()]
    layer.adapter.set_whole(whole[0], whole[1])
    layer.adapter.set_whole_magnitude(whole[2])
    x, dy = (t[:, 0] for t in inputs())
    own = x if kind == "column" else shard_rows(x, rank, size, dim=-1)
    y, _ = layer(own, COUNTS)
    y.backward(shard_rows(dy, rank, size, dim=-1) if kind == "column" else dy)
    if kind == "row":
        y = y.detach()
        dist.all_reduce(y)
    return {"y": y.detach(), "dm": layer.adapter.weight_magnitude.grad}


@pytest.mark.parametrize("kind", ["column", "row"])
def test_each_expert_of_a_grouped_layer_has_its_own_magnitude(two_ranks: Ranks, kind: str) -> None:
    found = two_ranks.run(grouped_experts, kind)
    generator = torch.Generator().manual_seed(5)
    a, b, m = factors()
    x, dy = (t[:, 0].double().split(COUNTS) for t in inputs())
    ys, dms = [], []
    for i in range(EXPERTS):
        w = ColumnParallelLinear(IN, OUT, bias=False, generator=generator).weight.detach().double()
        norms = norms_of(w, a.double() + i, b.double() + i)
        part = x[i] @ (w + SCALING * (b.double() + i) @ (a.double() + i)).T / norms
        ys.append(part * (m.double() + i))
        dms.append((part * dy[i]).sum(0))
    for rank, one in enumerate(found):
        y, dm = torch.cat(ys), torch.stack(dms)
        if kind == "column":
            y, dm = shard_rows(y, rank, 2, dim=-1), shard_rows(dm, rank, 2, dim=-1)
        torch.testing.assert_close(one["y"].double(), y, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(one["dm"].double(), dm, rtol=1e-5, atol=1e-4)


def test_experts_in_a_list_have_adapters_of_their_own() -> None:
    model = DoRA(["linear_fc2"], dim=RANK)(Moe(False))
    layers = [expert.linear_fc2 for expert in model.mlp.experts.local_experts]
    assert len({id(layer.adapter) for layer in layers}) == EXPERTS
    for layer in layers:
        torch.testing.assert_close(layer.adapter.weight_magnitude, layer.to_wrap.weight.norm(dim=1))
    assert not torch.equal(layers[0].adapter.linear_in.weight, layers[1].adapter.linear_in.weight)


def dtensor(style: str) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    w, bias = whole_base()
    linear = nn.Linear(IN, OUT)
    with torch.no_grad():
        linear.weight.copy_(w)
        linear.bias.copy_(bias)
    model = nn.ModuleDict({"fc": linear})
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if style == "column":
        plan: Any = ColwiseParallel(output_layouts=Replicate())
    else:
        plan = RowwiseParallel(input_layouts=Replicate())
    parallelize_module(model, mesh, {"fc": plan})
    layer = DoRA(["fc"], dim=RANK)(model)["fc"]
    a, b, m = factors()
    layer.adapter.set_whole(a, b)
    layer.adapter.set_whole_magnitude(m)
    x, dy = inputs()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    adapter = layer.adapter
    dm = adapter.weight_magnitude.grad
    da, db = adapter.linear_in.weight.grad, adapter.linear_out.weight.grad
    return {
        "y": y.detach(),
        "dx": x.grad,
        "da": adapter.joined(da, "in"),
        "db": adapter.joined(db, "out"),
        "dm": adapter.joined(dm, "out") if style == "column" else dm,
    }


@pytest.mark.parametrize("style", ["column", "row"])
def test_layers_of_dtensors_are_decomposed_alike(two_ranks: Ranks, style: str) -> None:
    expected = dense()
    for found in two_ranks.run(dtensor, style):
        for name, value in found.items():
            torch.testing.assert_close(
                value.double(), expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_norm_follows_writes_to_the_base_and_is_kept_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("column", {})
    layer.eval()
    asked: list[int] = []
    squared = BaseNorms.squared

    def counting(self: BaseNorms, stored: torch.Tensor | None, matrix: torch.Tensor) -> torch.Tensor:
        before = self._kept
        result = squared(self, stored, matrix)
        asked.append(self._kept is not before)
        return result

    monkeypatch.setattr(BaseNorms, "squared", counting)
    x = inputs()[0]
    layer(x)
    layer(x)
    assert asked == [True, False]
    with torch.no_grad():
        layer.to_wrap.weight.mul_(2)
    y, _ = layer(x)
    torch.testing.assert_close(y, x @ layer.to_wrap.weight.T / 2 + layer.to_wrap.bias)
    assert asked == [True, False, True]
    layer.to_wrap.weight.data.mul_(2)  # which no counter sees
    layer.eval()
    y, _ = layer(x)
    torch.testing.assert_close(y, x @ layer.to_wrap.weight.T / 4 + layer.to_wrap.bias)


def test_copies_and_state_dicts_keep_the_magnitude() -> None:
    layer = layer_of("column", {})
    with torch.no_grad():
        layer.adapter.weight_magnitude.mul_(2)
    other = layer_of("row", {})
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.adapter.weight_magnitude, layer.adapter.weight_magnitude, rtol=0, atol=0)
    twin = copy.deepcopy(layer)
    assert twin.adapter.weight_magnitude.allreduce is True
    x = inputs()[0]
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)


def test_quantised_layers_are_decomposed_and_unreadable_ones_are_left_alone() -> None:
    linear = nn.Linear(64, OUT)
    quantised = FakeQuantLinear.from_linear(linear)
    model = DoRA(["0"], dim=RANK)(nn.Sequential(quantised))
    x = numbers(5, 64, seed=1)
    torch.testing.assert_close(model(x), quantised(x))
    odd = nn.Sequential(nn.Linear(IN, OUT).to(torch.float8_e4m3fn))
    with pytest.raises(ModelError, match="cannot be read as a matrix"):
        DoRA(["0"], dim=RANK)(odd)
    assert type(odd[0]) is nn.Linear


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(dropout_position="post"), "'post' cannot be with DoRA"),
        (dict(dropout=1.0), "dropout=1.0"),
        (dict(dim=0), "dim=0"),
        (dict(lora_A_init_method="xavire"), "closest: 'xavier'"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], said: str) -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=said):
        DoRA(["0"], **options)(base)
    assert type(base[0]) is nn.Linear


def saved(folder: str, lost: str = "") -> None:
    """Two ranks write, after their parameters' marks were lost in some way; one process reads."""
    group = dist.group.WORLD if dist.is_initialized() else None
    model = nn.ModuleDict(
        {
            "linear_fc1": ColumnParallelLinear(IN, OUT, tp_group=group, config=Config(), stride=2),
            "linear_fc2": RowParallelLinear(IN, OUT, tp_group=group),
        }
    )
    dora = DoRA(["linear_fc1", "linear_fc2"], dim=RANK)
    dora(model)
    m = factors()[2]
    if group is not None:
        for layer in model.values():
            layer.adapter.set_whole_magnitude(m)
        state = {name: t.clone() for name, t in model.state_dict().items()}
        if lost == "assigned":
            model.load_state_dict(state, assign=True)
        elif lost == "emptied":
            model.to("meta").to_empty(device="cpu").load_state_dict(state)
        elif lost == "replaced":
            for layer in model.values():
                layer.adapter.weight_magnitude = nn.Parameter(layer.adapter.weight_magnitude.detach())
        save_adapter(model, folder, dora)
        return
    load_adapter(model, folder)
    for layer in model.values():
        torch.testing.assert_close(layer.adapter.weight_magnitude.detach(), m, rtol=0, atol=0)


@pytest.mark.parametrize("lost", ["", "assigned", "emptied", "replaced"])
def test_magnitudes_that_two_ranks_save_one_process_loads(two_ranks: Ranks, tmp_path: Path, lost: str) -> None:
    two_ranks.run(saved, str(tmp_path / "adapter"), lost)
    saved(str(tmp_path / "adapter"))


def one_rank_fails(what: str) -> list[str]:
    """Only rank 1 has a layer that cannot be adapted; then all adapt a model that can be."""
    group, rank = dist.group.WORLD, dist.get_rank()
    layers = {"linear_fc2": RowParallelLinear(IN, OUT, tp_group=group)}
    layers["linear_fc1"] = ColumnParallelLinear(IN, OUT, tp_group=group)
    layers["linear_fc3"] = RowParallelLinear(IN, OUT, tp_group=group)
    if rank == 1 and what == "kind":
        layers["linear_fc1"] = nn.Embedding(3, 4)
    elif rank == 1:
        layers["linear_fc2"].weight = nn.Parameter(layers["linear_fc2"].weight.to(torch.int8), requires_grad=False)
    model = nn.ModuleDict(layers)
    with pytest.raises(ModelError) as caught:
        DoRA(list(layers), dim=RANK)(model)
    assert {type(layer).__name__ for layer in model.values()} <= {
        "Embedding",
        *(f"{k}ParallelLinear" for k in ("Row", "Column")),
    }
    assert rank == 1 or all(p.requires_grad for p in model.parameters())
    found = DoRA(["linear_fc3"], dim=RANK).transform(layers["linear_fc3"], "linear_fc3").adapter.whole_magnitude()
    torch.testing.assert_close(found, summed(layers["linear_fc3"].weight.detach().square().sum(1), group).sqrt())
    return str(caught.value)


@pytest.mark.parametrize(("what", "said"), [("kind", "is a Embedding"), ("weight", "cannot be read as a matrix")])
def test_a_layer_that_one_rank_cannot_adapt_is_refused_on_all(two_ranks: Ranks, what: str, said: str) -> None:
    for text in two_ranks.run(one_rank_fails, what):
        assert said in text


def test_another_weight_than_the_layer_s_own_is_refused() -> None:
    layer, x = layer_of("column", {}), inputs()[0]
    torch.testing.assert_close(layer(x, weight=layer.weight), layer(x), rtol=0, atol=0)
    with pytest.raises(ModelError, match="'linear_fc1' was called with another weight than its own"):
        layer(x, weight=layer.weight + 1)
    base = ColumnParallelLinear(IN, OUT, bias=False)
    plain: Any = LoRA(["linear_fc1"], dim=RANK, lora_B_init_method="normal")(nn.ModuleDict({"linear_fc1": base}))
    w = base.weight.detach()
    difference = plain["linear_fc1"](x, weight=w + 1)[0] - plain["linear_fc1"](x)[0]
    torch.testing.assert_close(difference, (x.sum(-1, keepdim=True)).expand_as(difference), rtol=1e-4, atol=1e-4)


def net() -> nn.ModuleDict:
    group = dist.group.WORLD if dist.is_initialized() else None
    generator = torch.Generator().manual_seed(9)
    return nn.ModuleDict(
        {
            "linear_fc1": ColumnParallelLinear(IN, OUT, tp_group=group, generator=generator),
            "linear_fc2": RowParallelLinear(IN, OUT, tp_group=group, generator=generator),
        }
    )


def base_arrives_late(
    start: str, trained: str
) -> tuple[list[str], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """What is warned of, and by layer the magnitudes before, after, and once they are reset; base weights double."""
    model = DoRA(["linear_fc1", "linear_fc2"], dim=RANK, lora_B_init_method=start)(net())
    state = {name: 2 * t for name, t in net().state_dict().items()}
    adapters = [layer.adapter for layer in model.values()]
    with torch.no_grad():
        for adapter in adapters:
            adapter.weight_magnitude.mul_(3 if trained else 1)
    before = [adapter.whole_magnitude().clone() for adapter in adapters]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.load_state_dict(state, strict=False)
    after = [adapter.whole_magnitude().clone() for adapter in adapters]
    reset_magnitudes(model)
    return [str(one.message) for one in caught], before, after, [adapter.whole_magnitude() for adapter in adapters]


def test_magnitudes_follow_base_weights_that_arrive_late(two_ranks: Ranks) -> None:
    said, before, after, reset = base_arrives_late("zero", "")
    assert not said
    torch.testing.assert_close(after, [2 * m for m in before])
    torch.testing.assert_close(reset, after, rtol=0, atol=0)
    said, before, after, reset = base_arrives_late("zero", "trained")  # by the steps that came before
    assert not said
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.testing.assert_close(reset, [m / 3 * 2 for m in before])
    said, before, after, reset = base_arrives_late("normal", "")  # whose B may be trained
    assert ["'linear_fc1'" in said[0], "'linear_fc2'" in said[1], len(said)] == [True, True, 2]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    for said, before, after, reset in two_ranks.run(base_arrives_late, "zero", ""):
        assert len(said) == 1
        assert "base weights of 'linear_fc2' were loaded without its magnitude" in said[0]
        assert "reset_magnitudes(model) on all ranks" in said[0]
        torch.testing.assert_close(after, [2 * before[0], before[1]])
        torch.testing.assert_close(reset, [2 * m for m in before])


def test_a_state_with_magnitudes_or_without_base_weights_resets_nothing() -> None:
    model = DoRA(["linear_fc1"], dim=RANK)(net())
    before = model["linear_fc1"].adapter.weight_magnitude.clone()
    state = {name: t + 1 for name, t in model.state_dict().items()}
    adapter_only = {name: t for name, t in state.items() if "adapter.linear" in name}
    model.load_state_dict(adapter_only, strict=False)
    torch.testing.assert_close(model["linear_fc1"].adapter.weight_magnitude, before, rtol=0, atol=0)
    model.load_state_dict(state)
    torch.testing.assert_close(model["linear_fc1"].adapter.weight_magnitude, before + 1, rtol=0, atol=0)


def test_models_without_magnitudes_have_none_to_reset() -> None:
    with pytest.raises(ModelError, match="no layer with a magnitude"):
        reset_magnitudes(LoRA(["linear_fc1"], dim=RANK)(net()))
    model = DoRA(["linear_fc1"], dim=RANK)(net())
    LoRAMerge()(model)
    with pytest.raises(ModelError, match="'linear_fc1' is merged"):
        reset_magnitudes(model)
