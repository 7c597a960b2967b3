"""Layers with a norm in front, as Transformer Engine has them: adapters see its output, callers what they asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from smartinit.megatron import CanonicalLoRA, DoRA, LoRA, LoRAMerge

IN, OUT, RANK = 6, 8, 4


class NormedLinear(nn.Module):
    """Returns what Transformer Engine's LayerNormLinear does, as Megatron-Core's wrapper passes it on."""

    def __init__(self, *, return_bias: bool, return_layernorm_output: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(OUT, IN, generator=generator))
        self.bias = nn.Parameter(torch.randn(OUT, generator=generator))
        self.in_features, self.out_features, self.parallel_mode, self.tp_size = IN, OUT, "column", 1
        self.te_return_bias, self.return_layernorm_output = return_bias, return_layernorm_output
        self.config = type("Config", (), {"gated_linear_unit": True})()

    def forward(self, x: torch.Tensor) -> Any:
        normed = functional.layer_norm(x, (IN,)) * 3
        out = functional.linear(normed, self.weight, None if self.te_return_bias else self.bias)
        if self.te_return_bias:
            return (out, self.bias, normed) if self.return_layernorm_output else (out, self.bias)
        return ((out, normed), None) if self.return_layernorm_output else (out, None)


KINDS = {
    "lora": lambda **o: LoRA(["linear_fc1"], dim=RANK, lora_B_init_method="normal", **o),
    "dora": lambda **o: DoRA(["linear_fc1"], dim=RANK, lora_B_init_method="normal", **o),
    "canonical": lambda **o: CanonicalLoRA(["linear_fc1_up"], dim=RANK, lora_B_init_method="normal", **o),
}


@pytest.mark.parametrize("return_bias", [False, True])
@pytest.mark.parametrize("return_norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_sees_the_norms_output_and_the_caller_gets_what_it_asked_for(
    kind: str, return_norm: bool, return_bias: bool
) -> None:
    base = NormedLinear(return_bias=return_bias, return_layernorm_output=return_norm)
    x = torch.randn(5, IN)
    shape = structure(base(x))
    layer = KINDS[kind]()(nn.ModuleDict({"linear_fc1": base}))["linear_fc1"]
    if kind == "dora":
        layer.adapter.set_whole_magnitude(torch.linspace(0.5, 2, OUT))
    normed = functional.layer_norm(x, (IN,)) * 3
    found = layer(x)
    assert structure(found) == shape
    if return_norm:
        torch.testing.assert_close(found[2] if return_bias else found[0][1], normed)
    output = found[0][0] if isinstance(found[0], tuple) else found[0]
    weight = base.weight.detach().clone()
    adapter = layer.adapter["adapter_up"] if kind == "canonical" else layer.adapter
    a, b = adapter.whole()
    weight[OUT - len(b) :] += adapter.scaling * b @ a
    if kind == "dora":
        weight *= (torch.linspace(0.5, 2, OUT) / weight.norm(dim=1))[:, None]
    bias = 0 if return_bias else base.bias
    torch.testing.assert_close(output, normed @ weight.T + bias, rtol=1e-4, atol=1e-4)
    LoRAMerge()(layer)
    assert structure(layer(x)) == shape
    assert structure(LoRAMerge().unload(layer)(x)) == shape


def structure(value: Any) -> Any:
    """Which tensors are where."""
    if isinstance(value, tuple):
        return tuple(structure(one) for one in value)
    return None if value is None else tuple(value.shape)


def test_the_norm_is_not_applied_to_its_own_output_in_dropout() -> None:
    base = NormedLinear(return_bias=False, return_layernorm_output=False)
    layer = DoRA(["linear_fc1"], dim=RANK, dropout=0.5)(nn.ModuleDict({"linear_fc1": base}))["linear_fc1"]
    m = torch.linspace(0.5, 2, OUT)
    layer.adapter.set_whole_magnitude(m)
    x = torch.randn(5, IN)
    normed = functional.layer_norm(x, (IN,)) * 3
    torch.manual_seed(1)
    found = layer(x)[0]
    torch.manual_seed(1)
    kept = functional.dropout(normed, 0.5)
    w = base.weight
    torch.testing.assert_close(found, normed @ w.T + kept @ (w * (m / w.norm(dim=1) - 1)[:, None]).T + base.bias)
