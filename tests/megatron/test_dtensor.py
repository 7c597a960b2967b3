"""Adapters beside layers of PyTorch's own tensor parallelism compute what they compute beside whole layers."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from smartinit.errors import ConfigError, ModelError
from smartinit.megatron import LoRA

if TYPE_CHECKING:
    from ranks import Ranks

IN, MIDDLE, OUT, RANK = 8, 16, 12, 4
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, MIDDLE), nn.Linear(MIDDLE, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp() -> MLP:
    torch.manual_seed(5)
    return MLP()


def adapted(model: nn.Module, targets: tuple[str, ...] = ("up", "down"), **options: Any) -> nn.Module:
    model = LoRA(list(targets), dim=RANK, alpha=RANK, **options)(model)
    for i, (_, layer) in enumerate(sorted((n, m) for n, m in model.named_modules() if hasattr(m, "to_wrap"))):
        a, b = layer.adapter.whole_shapes()
        layer.adapter.set_whole(numbers(*a, seed=10 + i) / 4, numbers(*b, seed=30 + i) / 4)
    return model


def whole_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the factors, joined."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "to_wrap"):
            for side, factor in (("in", layer.adapter.linear_in), ("out", layer.adapter.linear_out)):
                found[f"{name}.{side}"] = layer.adapter.joined(factor.weight.grad, side)
    return found


def results(y: torch.Tensor, x: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **whole_gradients(model)}


def dense(shape: tuple[int, ...], targets: tuple[str, ...] = ("up", "down")) -> dict[str, torch.Tensor]:
    """What one process computes."""
    model = adapted(mlp(), targets)
    x = numbers(*shape, IN, seed=3).requires_grad_()
    y = model(x)
    y.backward(numbers(*shape, OUT, seed=4) / 4)
    return results(y, x, model)


def layouts() -> dict[str, Any]:
    """Name -> (options of ColwiseParallel, of RowwiseParallel): where tensors are placed outside of the layers."""
    from torch.distributed.tensor import Replicate, Shard

    return {
        "default": ({}, {}),
        "tokens 0": ({"input_layouts": Shard(0)}, {"output_layouts": Shard(0)}),
        "tokens 1": ({"input_layouts": Shard(1)}, {"output_layouts": Shard(1)}),
        "dtensors": ({"use_local_output": False}, {"use_local_output": False}),
        "gathered": ({"output_layouts": Replicate()}, {"input_layouts": Replicate()}),
        "features": ({"input_layouts": Shard(-1)}, {"output_layouts": Shard(-1)}),
        "tokens within": ({"output_layouts": Shard(0)}, {"input_layouts": Shard(0)}),
        "dtensors, tokens 0": (
            {"use_local_output": False, "input_layouts": Shard(0)},
            {"use_local_output": False, "output_layouts": Shard(0)},
        ),
        "mixed": ({"input_layouts": Shard(1)}, {"output_layouts": Shard(0)}),
    }


LAYOUTS = ["default", "tokens 0", "tokens 1", "dtensors", "gathered", "features", "tokens within"]
LAYOUTS += ["mixed", "dtensors, tokens 0"]


def parallel(layout: str, shape: tuple[int, ...], targets: tuple[str, ...] = ("up", "down")) -> dict[str, torch.Tensor]:
    """The same on this rank of as many as there are, gathered by DTensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    up, down = layouts()[layout]
    model = parallelize_module(mlp(), mesh, {"up": ColwiseParallel(**up), "down": RowwiseParallel(**down)})
    model = adapted(model, targets)
    before, after = up.get("input_layouts", Replicate()), down.get("output_layouts", Replicate())
    local = down.get("use_local_output", True)
    x = distribute_tensor(numbers(*shape, IN, seed=3), mesh, [before]).requires_grad_()
    dy = distribute_tensor(numbers(*shape, OUT, seed=4) / 4, mesh, [after])
    if local:
        own = x.to_local().detach().requires_grad_()
        y = model(own)
        y.backward(dy.to_local())
        y = DTensor.from_local(y.detach(), mesh, [after], shape=dy.shape, stride=dy.stride())
        dx = DTensor.from_local(own.grad, mesh, [before], shape=x.shape, stride=x.stride())
    else:
        y = model(x)
        assert y.placements == (after,)
        y.backward(dy)
        dx = x.grad
    grads = whole_gradients(model)
    return {"y": y.full_tensor().detach(), "dx": dx.full_tensor(), **grads}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_those_of_the_whole_model(ranks: Ranks, layout: str) -> None:
    expected = dense((8, 4))
    for found in ranks.run(parallel, layout, (8, 4)):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("targets", [("up",), ("down",)])
@pytest.mark.parametrize("layout", ["default", "tokens 0", "dtensors"])
def test_one_of_two_layers(two_ranks: Ranks, layout: str, targets: tuple[str, ...]) -> None:
    expected = dense((8, 4), targets)
    for found in two_ranks.run(parallel, layout, (8, 4), targets):
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize(("layout", "shape"), [("default", (1,)), ("default", (1, 1)), ("dtensors, tokens 0", (5, 3))])
def test_shapes_that_say_nothing_of_the_layout(two_ranks: Ranks, layout: str, shape: tuple[int, ...]) -> None:
    """One token; tokens in uneven shards."""
    expected = dense(shape)
    for found in two_ranks.run(parallel, layout, shape):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def as_it_comes(kind: str, placed: str) -> dict[str, torch.Tensor]:
    """DTensors in another layout than the layer was told of: torch lays them out, or computes with what it gets."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    style = ColwiseParallel(use_local_output=False) if kind == "column" else RowwiseParallel(use_local_output=False)
    model = adapted(parallelize_module(single(), mesh, {"up": style}), ("up",))
    x = distribute_tensor(numbers(8, 4, IN, seed=3), mesh, [Replicate()]).requires_grad_()
    if placed == "addends":
        given = DTensor.from_local(x.to_local() / mesh.size(), mesh, [Partial()])
    else:
        placement = {"tokens": Shard(0), "features": Shard(2), "whole": Replicate()}[placed]
        given = x.redistribute(placements=[placement])
    y = model.up(given)
    y.backward(distribute_tensor(numbers(8, 4, MIDDLE, seed=4) / 4, mesh, [Replicate()]))
    return {"y": y.full_tensor().detach(), "dx": x.grad.full_tensor(), **whole_gradients(model)}


def single() -> nn.Module:
    torch.manual_seed(5)
    return nn.ModuleDict({"up": nn.Linear(IN, MIDDLE)})


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("placed", ["tokens", "features", "whole", "addends"])
def test_dtensors_in_any_layout(two_ranks: Ranks, kind: str, placed: str) -> None:
    model = adapted(single(), ("up",))
    x = numbers(8, 4, IN, seed=3).requires_grad_()
    y = model.up(x)
    y.backward(numbers(8, 4, MIDDLE, seed=4) / 4)
    expected = results(y, x, model)
    for found in two_ranks.run(as_it_comes, kind, placed):
        if placed == "addends":  # torch takes the gradient of an addend as that of the sum
            found.pop("dx")
        torch.testing.assert_close(found, {name: expected[name] for name in found}, **TOLERANCE)


def whole_weight(tokens: bool) -> dict[str, torch.Tensor]:
    """A layer whose weight is a DTensor that every rank has whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = adapted(distribute_module(mlp(), mesh))
    x = distribute_tensor(numbers(8, 4, IN, seed=3), mesh, [Shard(0) if tokens else Replicate()]).requires_grad_()
    y = model(x)
    y.backward(distribute_tensor(numbers(8, 4, OUT, seed=4) / 4, mesh, [Shard(0) if tokens else Replicate()]))
    return {"y": y.full_tensor().detach(), "dx": x.grad.full_tensor(), **whole_gradients(model)}


@pytest.mark.parametrize("tokens", [False, True])
def test_weights_that_every_rank_has_whole(two_ranks: Ranks, tokens: bool) -> None:
    expected = dense((8, 4))
    for found in two_ranks.run(whole_weight, tokens):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def switched_off() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(mlp(), mesh, plan)
    x = numbers(3, IN, seed=3)
    before = model(x)
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in (model.up, model.down)]
    lora = LoRA(["up", "down"], dim=RANK, lora_B_init_method="normal")
    model = lora(model)
    changed = model(x)
    assert not torch.allclose(before, changed)
    with lora.disable_adapter(model):
        torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    torch.testing.assert_close(model(x), changed, rtol=0, atol=0)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), changed, rtol=0, atol=0)
    with torch.no_grad():
        twin.up.adapter.linear_in.weight.zero_()
    torch.testing.assert_close(model(x), changed, rtol=0, atol=0)
    assert not torch.allclose(twin(x), changed)
    after = [(len(m.to_wrap._forward_hooks), len(m.to_wrap._forward_pre_hooks)) for m in (model.up, model.down)]
    assert hooks == after
    state = model.state_dict()
    model.load_state_dict(state)
    assert "up.weight" in state


def test_switching_copying_and_state_dicts(two_ranks: Ranks) -> None:
    two_ranks.run(switched_off)


def refused() -> list[str]:
    """Orders that cannot be: adapters before tensor parallelism, after data parallelism; dimensions that do not fit."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.distributed.tensor.placement_types import _StridedShard

    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    messages = []
    model = adapted(mlp())
    parallelize_module(model, mesh, {"up.to_wrap": ColwiseParallel(), "down.to_wrap": RowwiseParallel()})
    with pytest.raises(ModelError) as told:
        model(numbers(3, IN, seed=3))
    messages.append(str(told.value))

    model = fully_shard(mlp(), mesh=mesh)
    with pytest.raises(ConfigError) as told:
        adapted(model)
    messages.append(str(told.value))
    assert not any(hasattr(m, "to_wrap") for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())

    odd = nn.ModuleDict({"up": nn.Linear(IN, MIDDLE + 1)})
    with pytest.raises(ConfigError) as told:
        adapted(parallelize_module(odd, mesh, {"up": ColwiseParallel()}), ("up",))
    messages.append(str(told.value))

    model = parallelize_module(mlp(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model.up.forward = model.up.forward  # as transformers does with tp_plan
    with pytest.raises(ConfigError) as told:
        adapted(model)
    messages.append(str(told.value))

    model = mlp()
    strided = DTensor.from_local(model.up.weight.detach(), mesh, [_StridedShard(0, split_factor=2)])
    model.up.weight = nn.Parameter(strided)
    with pytest.raises(ConfigError) as told:
        adapted(model)
    messages.append(str(told.value))
    return messages


def test_orders_that_cannot_be_are_refused(two_ranks: Ranks) -> None:
    for before, after, odd, forward, strided in two_ranks.run(refused):
        assert "a forward of the module's own" in forward
        assert "is placed as _S" in strided
        assert "after parallelize_module" in before
        assert "before fully_shard" in after
        assert "(17, 8), is not shared evenly by 2 ranks" in odd


def data_and_tensor_parallel() -> dict[str, torch.Tensor]:
    """FSDP2 over two ranks, tensor parallelism over two: half of the batch on each pair."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = parallelize_module(mlp(), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model = adapted(model)
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "to_wrap")}
    fully_shard(model, mesh=mesh["dp"])
    half = mesh["dp"].get_local_rank()
    x, dy = numbers(8, 4, IN, seed=3).chunk(2)[half], numbers(8, 4, OUT, seed=4).div(4).chunk(2)[half]
    y = model(x)
    y.backward(dy * 2)  # gradients are means over dp
    found = {"y": y.detach()}
    for name, layer in layers.items():
        for side, factor in (("in", layer.adapter.linear_in), ("out", layer.adapter.linear_out)):
            found[f"{name}.{side}"] = layer.adapter.joined(factor.weight.grad.full_tensor(), side)
    return found


def test_with_fully_shard_over_another_dimension(four_ranks: Ranks) -> None:
    expected = dense((8, 4))
    expected.pop("dx")
    halves = expected.pop("y").chunk(2)
    for rank, found in enumerate(four_ranks.run(data_and_tensor_parallel)):
        torch.testing.assert_close(found.pop("y"), halves[rank // 2], **TOLERANCE)
        torch.testing.assert_close(found, expected, **TOLERANCE)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def llama_results(model: nn.Module) -> dict[str, torch.Tensor]:
    model = adapted(model, PROJECTIONS)
    tokens = torch.arange(12).view(2, 6)
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    return {"logits": out.logits.detach(), **whole_gradients(model)}


def parallel_llama() -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    row = ("o_proj", "down_proj")
    parts = {name: "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp" for name in PROJECTIONS}
    plan = {
        f"model.layers.*.{part}.{name}": RowwiseParallel() if name in row else ColwiseParallel()
        for name, part in parts.items()
    }
    return llama_results(parallelize_module(llama(), mesh, plan))


def test_a_llama_of_transformers(ranks: Ranks) -> None:
    expected = llama_results(llama())
    for found in ranks.run(parallel_llama):
        torch.testing.assert_close(found, expected, **TOLERANCE)


def computed_start(method: str) -> tuple[torch.Tensor, ...]:
    """The model's output, and the whole factors, after a start that is computed from the weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = mlp()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    model = LoRA(["up", "down"], dim=RANK, lora_A_init_method=method)(model)
    output = model(numbers(3, IN, seed=3)).detach()
    return (output, *model.up.adapter.whole(), *model.down.adapter.whole())


@pytest.mark.parametrize("method", ["xavier", "pissa", "olora"])
def test_starts_are_those_of_one_process_and_keep_the_function(two_ranks: Ranks, method: str) -> None:
    before = mlp()(numbers(3, IN, seed=3))
    expected = computed_start(method)
    for found in two_ranks.run(computed_start, method):
        torch.testing.assert_close(found[0], before, **TOLERANCE)
        torch.testing.assert_close(found, expected, **TOLERANCE)
