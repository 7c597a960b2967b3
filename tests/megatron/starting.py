"""A small model cut up as Megatron does it, and what the methods make of it on as many ranks as there are."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from smartinit.adapters.parallel.collectives import gather, shard
from smartinit.formats.rows import join_rows
from smartinit.megatron import LoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear
from smartinit.megatron.walk import adapted_layers
from smartinit.methods import available_methods

H, FFN, VOCABULARY, RANK = 16, 24, 50, 4
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "plain"]
METHODS = {name: kind for name, kind in available_methods().items() if name not in ("kaiming", "random")}
Options = dict[str, Any]


class Config:
    gated_linear_unit = True


class Block(nn.Module):
    """A layer of a transformer as Megatron cuts it up, with something simple where attention is."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear_qkv = ColumnParallelLinear(H, 2 * H, **options)
        self.linear_proj = RowParallelLinear(2 * H, H, **options)
        self.linear_fc1 = ColumnParallelLinear(H, 2 * FFN, config=Config(), stride=2, **options)
        self.linear_fc2 = RowParallelLinear(FFN, H, **options)
        self.plain = nn.Linear(H, H)
        nn.init.normal_(self.plain.weight, std=0.2, generator=options["generator"])
        nn.init.normal_(self.plain.bias, std=0.2, generator=options["generator"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.linear_proj(torch.tanh(self.linear_qkv(x)[0]))[0]
        gate, up = self.linear_fc1(x)[0].chunk(2, -1)
        x = x + self.linear_fc2(functional.silu(gate) * up)[0]
        return x + self.plain(x)


class Model(nn.Module):
    """Random tokens in, hidden states out; the residual stream is cut by tokens under sequence parallelism."""

    def __init__(self, group: Any = None, sequence: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.group, self.sequence = group, sequence
        self.embedding = nn.Embedding(VOCABULARY, H)
        nn.init.normal_(self.embedding.weight, generator=generator)
        options = dict(tp_group=group, sequence_parallel=sequence, generator=generator)
        self.layers = nn.ModuleList([Block(**options)])
        self.to(dtype)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        x = self.embedding(input_ids).transpose(0, 1)  # (tokens, batch, features)
        x = shard(x, 0, self.group) if self.sequence else x
        for layer in self.layers:
            x = layer(x)
        return gather(x, 0, self.group, gradient="slice") if self.sequence else x


def batches(count: int = 2, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    found = [{"input_ids": torch.randint(0, VOCABULARY, (3, 24), generator=generator)} for _ in range(count)]
    for batch in found:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][1, 17:] = 0
    return found


def loss(output: torch.Tensor, batch: Any) -> torch.Tensor:
    del batch
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return (output * weights).sum() + 0.1 * output.square().sum()


def adapt(model: nn.Module, method: Any, data: Any = None, **options: Any) -> tuple[LoRA, Any]:
    """The configuration, and the artefact if there is one."""
    lora = LoRA(options.pop("targets", TARGETS), dim=RANK, alpha=8, lora_A_init_method=method, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora(model)
    needs = METHODS[method].needs if isinstance(method, str) else method.needs
    if not needs:
        return lora, None
    return lora, lora.initialize(model, data or batches(), loss_fn=loss, show_progress_bar=False)


def started(method: str, sequence: bool, dtype: torch.dtype = torch.float32, parallel: bool = True) -> Options:
    """What one method makes of the model on this rank: whole factors, and outputs before and after."""
    torch.manual_seed(0)
    model = Model(dist.group.WORLD if parallel else None, sequence, dtype)
    probe = batches(1, seed=9)[0]
    with torch.no_grad():
        before = model(**probe)
        adapt(model, method)
        after = model(**probe)
    factors = {place.whole_name: layer.adapter.whole() for place, layer in adapted_layers(model)}
    weights = {place.whole_name: whole_weight(layer) for place, layer in adapted_layers(model)}
    return {"factors": factors, "weights": weights, "before": before, "after": after}


def whole_weight(layer: Any) -> torch.Tensor:
    """The base weight, gathered by hand."""
    weight, base = layer.to_wrap.weight.detach(), layer.base
    if base.size == 1:
        return weight
    parts = [torch.empty_like(weight) for _ in range(base.size)]
    dist.all_gather(parts, weight.contiguous(), group=base.group)
    return join_rows(parts, gated=base.gated, dim=1 if base.split == "row" else 0)


@cache
def alone(method: str, dtype: torch.dtype = torch.float32) -> Options:
    """The same on a single process."""
    return started(method, False, dtype, parallel=False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


def original_weights() -> dict[str, torch.Tensor]:
    return {name: m.weight.detach() for name, m in Model().named_modules() if name.rpartition(".")[2] in TARGETS}
