"""Methods of initialisation for experts, for weight-decomposed adapters, and beside DTensors."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from starting import (
    FFN,
    METHODS,
    RANK,
    TARGETS,
    VOCABULARY,
    Config,
    H,
    Model,
    adapt,
    alone,
    batches,
    loss,
    relative,
)
from torch import nn

from smartinit.adapters.parallel.collectives import total
from smartinit.errors import ConfigError
from smartinit.megatron import DoRA, LoRA
from smartinit.megatron.moe_stand_ins import SequentialMLP, TEGroupedMLP
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from ranks import Ranks
    from starting import Options


def same_start(method: str, ours: Any, theirs: Any) -> bool:
    """Whether two pairs are one start: the same A where B is zero, else the same product."""
    if METHODS[method].effect == "keeps":
        return relative(ours[0], theirs[0]) < 1e-5
    return relative(ours[1].double() @ ours[0].double(), theirs[1].double() @ theirs[0].double()) < 1e-5


class Routed(nn.Module):
    """Tokens to experts by their numbers: each token has one."""

    def __init__(self, kind: str, group: Any = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.embedding = nn.Embedding(VOCABULARY, H)
        nn.init.normal_(self.embedding.weight, generator=generator)
        make = SequentialMLP if kind == "sequential" else TEGroupedMLP
        self.mlp = nn.ModuleDict({"experts": make(2, H, FFN, config=Config(), tp_group=group, generator=generator)})
        self.group = group

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids).reshape(-1, H)
        order = (input_ids.reshape(-1) % 2).argsort(stable=True)
        counts = torch.bincount(input_ids.reshape(-1) % 2, minlength=2)
        y = total(self.mlp["experts"](x[order], counts, torch.ones(len(x)))[0], self.group)
        return torch.empty_like(y).index_copy(0, order, y)


def experts_started(kind: str, method: str, share: bool, parallel: bool = True) -> Options:
    """Whole factors by layer, of each expert; outputs before and after."""
    torch.manual_seed(0)
    model = Routed(kind, dist.group.WORLD if parallel else None)
    tokens = {"input_ids": torch.arange(200).reshape(4, 50) % VOCABULARY}
    before = model(**tokens)
    options: Options = dict(targets=["linear_fc1", "linear_fc2"], share_expert_adapters=share)
    _, artefact = adapt(model, method, [tokens], **options)
    names = [] if artefact is None else sorted(artefact.factors)
    factors = {place.name: layer.adapter.whole() for place, layer in adapted_layers(model)}
    return {"factors": factors, "before": before.detach(), "after": model(**tokens).detach(), "names": names}


EXPERT_CASES = [("eva", True), ("gaussian", True), ("eva", False), ("pissa", False), ("corda", False)]
EXPERT_CASES += [("lora_ga", False)]


@pytest.mark.parametrize("kind", ["sequential", "grouped"])
@pytest.mark.parametrize(("method", "share"), EXPERT_CASES)
def test_experts_start_by_their_own_weights_and_tokens(two_ranks: Ranks, kind: str, method: str, share: bool) -> None:
    expected = experts_started(kind, method, share, parallel=False)
    for found in two_ranks.run(experts_started, kind, method, share):
        assert found["names"] == expected["names"]
        torch.testing.assert_close(found["after"], expected["before"], rtol=1e-4, atol=1e-5)
        for name, pair in expected["factors"].items():
            assert same_start(method, found["factors"][name], pair), name


@pytest.mark.parametrize("method", ["pissa", "corda", "eva", "lora_ga"])
def test_grouped_and_sequential_experts_start_alike(method: str) -> None:
    models = {kind: Routed(kind) for kind in ("sequential", "grouped")}
    grouped = models["grouped"].mlp["experts"]
    for i, expert in enumerate(models["sequential"].mlp["experts"].local_experts):
        for layer in ("linear_fc1", "linear_fc2"):
            getattr(grouped, layer).get_parameter(f"weight{i}").data.copy_(getattr(expert, layer).weight.data)
    tokens = {"input_ids": torch.arange(200).reshape(4, 50) % VOCABULARY}
    found = {}
    for kind, model in models.items():
        adapt(model, method, [tokens], targets=["linear_fc1", "linear_fc2"], share_expert_adapters=False)
        found[kind] = {place.name: layer.adapter.whole() for place, layer in adapted_layers(model)}
    for layer in ("linear_fc1", "linear_fc2"):
        both = found["grouped"][f"mlp.experts.{layer}"]
        pairs = [tuple(side[i] for side in both) for i in range(2)]
        assert not same_start(method, *pairs)
        for i, pair in enumerate(pairs):
            assert same_start(method, pair, found["sequential"][f"mlp.experts.local_experts.{i}.{layer}"])


@pytest.mark.parametrize("method", ["pissa", "corda", "lora_one", "loftq"])
def test_one_adapter_for_several_weights_cannot_start_from_one_of_them(method: str) -> None:
    lora = LoRA(["linear_fc1", "linear_fc2"], dim=RANK, lora_A_init_method=method)
    model = Routed("sequential")
    said = r"'mlp.experts.local_experts.\*.linear_fc1' serves several experts; set share_expert_adapters=False"
    if METHODS[method].needs is None:
        with pytest.raises(ConfigError, match=said):
            lora(model)
        assert not any(True for _ in adapted_layers(model))
        return
    with pytest.warns(UserWarning, match="reads data"):
        lora(model)
    with pytest.raises(ConfigError, match=said):
        lora.initialize(model, [{"input_ids": torch.arange(50).reshape(1, 50)}], show_progress_bar=False)


def decomposed(method: str) -> Options:
    """DoRA's start on this rank."""
    torch.manual_seed(0)
    model = Model(dist.group.WORLD)
    probe = batches(1, seed=9)[0]
    before = model(**probe)
    dora = DoRA(TARGETS, dim=RANK, alpha=8, lora_A_init_method=method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dora(model)
    if METHODS[method].needs:
        dora.initialize(model, batches(), loss_fn=loss, show_progress_bar=False)
    factors = {place.whole_name: layer.adapter.whole() for place, layer in adapted_layers(model)}
    return {"factors": factors, "before": before.detach(), "after": model(**probe).detach()}


@pytest.mark.parametrize("method", ["eva", "pissa", "lora_ga", "loftq", "lora_one"])
def test_dora_starts_by_the_same_methods(two_ranks: Ranks, method: str) -> None:
    for found in two_ranks.run(decomposed, method):
        # Magnitudes are what the norms are: it computes what LoRA does.
        torch.testing.assert_close(found["after"], alone(method)["after"], rtol=1e-4, atol=1e-4)
        for name, pair in alone(method)["factors"].items():
            assert same_start(method, found["factors"][name], pair), name


class Placed(nn.Module):
    """Batch first, for PyTorch's own tensor parallelism."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embedding = nn.Embedding(VOCABULARY, H)
        self.up, self.down = nn.Linear(H, FFN), nn.Linear(FFN, H)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.embedding(input_ids))))


def placed(method: str, parallel: bool = True) -> Options:
    """The start of layers that ``parallelize_module`` has cut."""
    model = Placed()
    if parallel:
        from torch.distributed.tensor import init_device_mesh
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    probe = batches(1, seed=9)[0]
    before = model(**probe)
    adapt(model, method, targets=["up", "down"])
    factors = {place.whole_name: layer.adapter.whole() for place, layer in adapted_layers(model)}
    after = model(**probe).detach() + 0  # which waits for a sum that may be under way
    return {"factors": factors, "before": before.detach(), "after": after}


@pytest.mark.parametrize("method", ["eva", "pissa", "corda", "lora_ga"])
def test_layers_of_dtensors_start_as_whole_ones(two_ranks: Ranks, method: str) -> None:
    expected = placed(method, parallel=False)
    for found in two_ranks.run(placed, method):
        torch.testing.assert_close(found["after"], expected["before"], rtol=1e-4, atol=1e-4)
        for name, pair in expected["factors"].items():
            assert same_start(method, found["factors"][name], pair), name
