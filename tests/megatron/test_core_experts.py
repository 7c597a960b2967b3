"""Megatron-Core's own mixture of experts takes the adapters: its MoELayer, router and experts, on CPU and gloo.

Two things of it need a GPU, or Transformer Engine, only to be named: they are replaced while a case runs.
"""

from __future__ import annotations

import importlib.util
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from smartinit.errors import ModelError
from smartinit.formats.rows import shard_rows
from smartinit.megatron import LoRA
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ranks import Ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
    reason="needs megatron-core",
)

HIDDEN, FFN, RANK, TOPK, EXPERTS, TOKENS = 8, 12, 4, 2, 4, 8
SHAPES = {"linear_fc1": (2 * FFN, HIDDEN), "linear_fc2": (HIDDEN, FFN), "router": (EXPERTS, HIDDEN)}
LAYOUTS = [(1, 1, 1), (2, 1, 2), (2, 2, 1), (1, 2, 1)]  # tensor, expert, expert-tensor parallel; the rest is data


def numbers(name: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2


def parts_of(name: str, shared: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weight, A and B of a layer of the whole model."""
    rows, columns = SHAPES[name.rpartition(".")[2]]
    same = name.rpartition(".")[2] if shared and ".local_experts." in name else name
    return numbers(name, rows, columns), numbers(f"{same} A", RANK, columns), numbers(f"{same} B", rows, RANK)


def oracle(shared: bool) -> dict[str, torch.Tensor]:
    """Each token through its experts and the shared one, in float64."""
    x, dy = numbers("x", TOKENS, HIDDEN).requires_grad_(), numbers("dy", TOKENS, HIDDEN)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def apply(name: str, rows: torch.Tensor) -> torch.Tensor:
        weight, *pair = parts_of(name, shared)
        key = name.rpartition(".")[2] if shared and ".local_experts." in name else name
        a, b = factors.setdefault(key, tuple(f.requires_grad_() for f in pair))
        return rows @ (weight + 32 / RANK * b @ a).T

    def mlp(prefix: str, rows: torch.Tensor) -> torch.Tensor:
        gate, up = apply(f"{prefix}.linear_fc1", rows).chunk(2, -1)
        return apply(f"{prefix}.linear_fc2", functional.silu(gate) * up)

    top = apply("mlp.router", x).topk(TOPK)
    probabilities = torch.zeros(TOKENS, EXPERTS, dtype=x.dtype).scatter(1, top.indices, top.values.softmax(-1))
    y = mlp("mlp.shared_experts", x)
    for e in range(EXPERTS):
        y = y + probabilities[:, e : e + 1] * mlp(f"mlp.experts.local_experts.{e}", x)
    y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    for name, pair in factors.items():
        found |= {f"{name} {side}": f.grad for side, f in zip("AB", pair, strict=True)}
    return found


@contextmanager
def megatron(tp: int, ep: int, etp: int) -> Iterator[Any]:
    """Megatron-Core's process groups; afterwards as if it had never been there."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import moe_utils

    device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("cpu")
    missing = not hasattr(moe_utils, "te_general_gemm")  # it asks whether that is None, without having imported it
    if missing:
        moe_utils.te_general_gemm = None
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
        )
        yield ProcessGroupCollection.use_mpu_process_groups()
    finally:
        parallel_state.destroy_model_parallel()
        torch.cuda.current_device = device
        if missing:
            del moe_utils.te_general_gemm


def moe_config(tp: int, ep: int, etp: int) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=HIDDEN,
        num_attention_heads=2,
        ffn_hidden_size=FFN,
        moe_ffn_hidden_size=FFN,
        moe_shared_expert_intermediate_size=FFN,
        num_moe_experts=EXPERTS,
        moe_router_topk=TOPK,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",  # noqa: S106 - no password
        use_cpu_initialization=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=functional.silu,
        bias_activation_fusion=False,
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        sequence_parallel=tp > 1,
    )


def moe_layer(tp: int, ep: int, etp: int, groups: Any) -> nn.Module:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    layers = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    parts = MoESubmodules(
        experts=ModuleSpec(module=SequentialMLP, submodules=layers),
        shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=layers),
    )
    return nn.ModuleDict({"mlp": MoELayer(moe_config(tp, ep, etp), parts, layer_number=1, pg_collection=groups)})


def gathered(t: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts).flatten(0, 1)


def case(tp: int, ep: int, etp: int, shared: bool) -> dict[str, torch.Tensor]:
    rank, world = dist.get_rank(), dist.get_world_size()
    with megatron(tp, ep, etp) as groups:
        lora = LoRA(["linear_fc1", "linear_fc2", "router"], dim=RANK, share_expert_adapters=shared)
        model = lora(moe_layer(tp, ep, etp, groups))
        layers = [(place.whole_name, layer) for place, layer in adapted_layers(model)]
        for name, layer in layers:
            weight, a, b = parts_of(name, shared)
            if layer.base.weight_dim is not None:
                gated = layer.base.gated
                weight = shard_rows(weight, layer.base.rank, layer.base.size, gated=gated, dim=layer.base.weight_dim)
            layer.weight.data.copy_(weight)
            layer.adapter.set_whole(a, b)
        x = shard_rows(numbers("x", TOKENS, HIDDEN), rank, world).float().unsqueeze(1).requires_grad_()
        y, _ = model["mlp"](x)
        y.backward(shard_rows(numbers("dy", TOKENS, HIDDEN), rank, world).float().unsqueeze(1))
        found = {"y": gathered(y.detach()), "dx": gathered(x.grad)}
        for name, layer in layers:
            key = name.rpartition(".")[2] if shared and layer.adapter.expert else name
            for side, factor in (("in", layer.adapter.linear_in), ("out", layer.adapter.linear_out)):
                grad = layer.adapter.joined(factor.weight.grad, side).clone()
                if tp == 1 and (ep == 1 or not layer.adapter.expert):
                    dist.all_reduce(grad)  # what data parallelism does
                found[f"{key} {'A' if side == 'in' else 'B'}"] = grad
        return found


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize(("tp", "ep", "etp"), LAYOUTS)
def test_its_mixture_of_experts_with_adapters_is_the_dense_one(
    two_ranks: Ranks, tp: int, ep: int, etp: int, shared: bool
) -> None:
    expected = oracle(shared)
    seen: set[str] = set()
    for found in two_ranks.run(case, tp, ep, etp, shared):
        seen |= set(found)
        for name, value in found.items():
            torch.testing.assert_close(
                value.double(), expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert seen == set(expected)


def legacy_experts() -> None:
    with megatron(1, 1, 1) as groups:
        from megatron.core.transformer.moe import experts

        check = experts.gg.assert_grouped_gemm_is_available
        experts.gg.assert_grouped_gemm_is_available = lambda: None  # only its kernels are missing
        try:
            module = experts.GroupedMLP(2, moe_config(1, 1, 1), groups)
        finally:
            experts.gg.assert_grouped_gemm_is_available = check
        with pytest.raises(ModelError, match=r"'mlp.experts' \(GroupedMLP\) holds its experts' weights itself"):
            LoRA()(nn.ModuleDict({"mlp": nn.ModuleDict({"experts": module})}))


def test_its_experts_without_layers_are_refused(two_ranks: Ranks) -> None:
    two_ranks.run(legacy_experts)
