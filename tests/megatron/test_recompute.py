"""Adapters get their gradients where activations are recomputed, although what is before them is frozen."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from smartinit.megatron import LoRA
from smartinit.megatron.stand_ins import ColumnParallelLinear


class Block(nn.Module):
    """Recomputes each of its layers, as Megatron's does (reentrant), or as torch recommends."""

    def __init__(self, granularity: str | None, reentrant: bool) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"linear_fc1": ColumnParallelLinear(8, 8, generator=draw)}) for _ in range(2)
        )
        self.config = SimpleNamespace(recompute_granularity=granularity)
        self.reentrant = reentrant

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            run = lambda x, layer=layer: layer["linear_fc1"](x)[0]  # noqa: E731
            hidden_states = (
                run(hidden_states)
                if self.config.recompute_granularity is None
                else checkpoint(run, hidden_states, use_reentrant=self.reentrant)
            )
        return hidden_states


class Model(nn.Module):
    def __init__(self, granularity: str | None, reentrant: bool, by_name: bool) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(4, 8)
        self.decoder = Block(granularity, reentrant)
        self.by_name = by_name

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        return self.decoder(hidden_states=x) if self.by_name else self.decoder(x)


def gradients(granularity: str | None, reentrant: bool = True, by_name: bool = False) -> list[torch.Tensor]:
    model = Model(granularity, reentrant, by_name)
    torch.manual_seed(6)
    lora = LoRA(["linear_fc1"], dim=2, lora_B_init_method="normal", dropout=0.5)
    model = lora(lora(model))
    assert len(model.decoder._forward_pre_hooks) == (granularity is not None)
    torch.manual_seed(7)
    model(torch.tensor([0, 1, 2])).square().sum().backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_gradients_are_those_without_recompute(granularity: str, reentrant: bool, by_name: bool) -> None:
    expected = gradients(None)
    assert len(expected) == 4
    torch.testing.assert_close(gradients(granularity, reentrant, by_name), expected, rtol=0, atol=0)


def test_nothing_is_changed_in_evaluation_and_where_none_is_asked_for() -> None:
    model = LoRA(["linear_fc1"], dim=2)(Model("full", True, False), training=False)
    assert not model.decoder._forward_pre_hooks
    model = LoRA(["linear_fc1"], dim=2)(Model("full", False, False)).eval()
    with torch.no_grad():
        assert not model(torch.tensor([0])).requires_grad
