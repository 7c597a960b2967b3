"""Every method of initialisation beside parallel layers: computed for whole layers, and shared out."""

from __future__ import annotations

import warnings
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import smartinit
from smartinit.adapters.parallel.collectives import gather, rank_of, shard
from smartinit.errors import ArtefactError, ConfigError, DataError, ModelError, NonFiniteError, TargetError
from smartinit.formats.rows import join_rows
from smartinit.megatron import LoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear
from smartinit.megatron.walk import adapted_layers
from smartinit.methods import available_methods
from smartinit.methods.corda import Corda

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Ranks

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
        self.linear_fc1 = ColumnParallelLinear(H, 2 * FFN, config=Config(), **options)
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
def alone(method: str) -> Options:
    """The same on a single process."""
    return started(method, False, parallel=False)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


@pytest.mark.parametrize("method", METHODS)
def test_the_start_is_that_of_one_process_and_the_same_on_all_ranks(ranks: Ranks, method: str) -> None:
    expected = alone(method)
    # Directions with least energy hang on the last digits of sums, whose order is another one here.
    allowed = 2e-4 if method == "lora_null" else 1e-5
    for sequence in (False, True):
        by_rank = ranks.run(started, method, sequence)
        for name, (a, b) in expected["factors"].items():
            for found in by_rank:
                assert all(map(torch.equal, found["factors"][name], by_rank[0]["factors"][name]))
            ours, theirs = by_rank[0]["factors"][name]
            if METHODS[method].effect == "keeps":
                assert relative(ours, a) < 1e-5, name
                assert relative(theirs, b) < 1e-5, name
            else:
                assert relative(theirs.double() @ ours.double(), b.double() @ a.double()) < allowed, name
            assert relative(by_rank[0]["weights"][name], expected["weights"][name]) < allowed, name
        for found in by_rank:
            torch.testing.assert_close(found["before"], expected["before"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found["after"], expected["after"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_starts_where_its_base_is(method: str) -> None:
    found = alone(method)
    error = relative(found["after"], found["before"])
    if METHODS[method].effect in ("keeps", "splits"):
        assert error < 1e-5
    else:
        assert 1e-3 < error < 0.5
    changed = any(not torch.equal(found["weights"][n], w) for n, w in original_weights().items())
    assert changed == (METHODS[method].effect in ("splits", "quantises"))


def original_weights() -> dict[str, torch.Tensor]:
    return {name: m.weight.detach() for name, m in Model().named_modules() if name.rpartition(".")[2] in TARGETS}
