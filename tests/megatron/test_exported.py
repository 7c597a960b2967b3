"""An adapter that PEFT has written, exported, loaded beside parallel layers and trained there, and brought back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from smartinit.errors import ConfigError
from smartinit.export import export_adapter
from smartinit.formats.megatron_folder import ShardedFolder
from smartinit.formats.rows import shard_rows
from smartinit.megatron import CanonicalLoRA, DoRA, LoRA, load_adapter, save_adapter
from smartinit.megatron.stand_ins import ColumnParallelLinear, RowParallelLinear
from smartinit.megatron.walk import adapted_layers

if TYPE_CHECKING:
    from pathlib import Path

    from ranks import Ranks

HEADS, GROUPS, SIZE, HIDDEN, FFN = 4, 2, 6, 16, 12
SHAPE = {"heads": HEADS, "groups": GROUPS, "head_size": SIZE}
CLASSES = {"lora": LoRA, "dora": DoRA, "canonical_lora": CanonicalLoRA}
ROWS = {
    "self_attn.q_proj": (HEADS * SIZE, HIDDEN),
    "self_attn.k_proj": (GROUPS * SIZE, HIDDEN),
    "self_attn.v_proj": (GROUPS * SIZE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * SIZE),
    "mlp.gate_proj": (FFN, HIDDEN),
    "mlp.up_proj": (FFN, HIDDEN),
    "mlp.down_proj": (HIDDEN, FFN),
}


class Config:
    gated_linear_unit = True
    num_attention_heads, num_query_groups, kv_channels = HEADS, GROUPS, SIZE


class Decoder(nn.Module):
    """Two layers of a Megatron decoder, as far as adapters see them."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        options: dict[str, Any] = {"tp_group": group, "bias": False, "config": Config()}

        def layer() -> nn.Module:
            out = nn.Module()
            qkv = ColumnParallelLinear(HIDDEN, (HEADS + 2 * GROUPS) * SIZE, **options)
            proj = RowParallelLinear(HEADS * SIZE, HIDDEN, **options)
            out.self_attention = nn.ModuleDict({"linear_qkv": qkv, "linear_proj": proj})
            fc1, fc2 = (
                ColumnParallelLinear(HIDDEN, 2 * FFN, stride=2, **options),
                RowParallelLinear(FFN, HIDDEN, **options),
            )
            out.mlp = nn.ModuleDict({"linear_fc1": fc1, "linear_fc2": fc2})
            return out

        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList(layer() for _ in range(2))


def fused(weights: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """Megatron's weights of one layer, row by row."""
    own = {name: weights[f"layers.{layer}.{name}"] for name in ROWS}
    rows = []
    for g in range(GROUPS):
        for h in range(HEADS // GROUPS):
            head = (g * HEADS // GROUPS + h) * SIZE
            rows += list(own["self_attn.q_proj"][head : head + SIZE])
        for part in "kv":
            rows += list(own[f"self_attn.{part}_proj"][g * SIZE : (g + 1) * SIZE])
    return {
        "self_attention.linear_qkv": torch.stack(rows),
        "self_attention.linear_proj": own["self_attn.o_proj"],
        "mlp.linear_fc1": torch.cat([own["mlp.gate_proj"], own["mlp.up_proj"]]),
        "mlp.linear_fc2": own["mlp.down_proj"],
    }


def put_base(model: nn.Module, weights: dict[str, torch.Tensor], rank: int, size: int) -> None:
    """Write the base weights of a Hugging Face model into this rank's shards."""
    with torch.no_grad():
        for number, layer in enumerate(model.decoder.layers):
            for name, whole in fused(weights, number).items():
                row = name.endswith(("linear_proj", "linear_fc2"))
                part = shard_rows(whole, rank, size, gated=name.endswith("fc1"), dim=int(row))
                layer.get_submodule(name).weight.copy_(part)


def largest_gap(model: nn.Module, weights: dict[str, torch.Tensor], rank: int, size: int) -> float:
    """Outputs of every adapted layer against those of whole weights in float64."""
    gap = 0.0
    generator = torch.Generator().manual_seed(3)
    for place, layer in adapted_layers(model):
        number, _, name = place.name.removeprefix("decoder.layers.").partition(".")
        whole = fused(weights, int(number))[name].double()
        x = torch.randn(5, whole.shape[1], generator=generator)
        expected = x.double() @ whole.T
        if name.endswith(("linear_proj", "linear_fc2")):
            x = x.chunk(size, -1)[rank]
        else:
            expected = shard_rows(expected, rank, size, gated=name.endswith("fc1"), dim=1)
        gap = max(gap, float((layer(x)[0].detach().double() - expected).abs().max()))
    return gap


def peft_folder(folder: Path, seed: int, *, shared: bool, dora: bool) -> tuple[dict[str, torch.Tensor], ...]:
    """Write an adapter as PEFT does; base weights, and those with the adapter in float64."""
    generator = torch.Generator().manual_seed(seed)
    base, tensors, merged = {}, {}, {}
    for layer in range(2):
        common: dict[str, torch.Tensor] = {}
        for name, (rows, columns) in ROWS.items():
            weight = torch.randn(rows, columns, generator=generator)
            a, b = torch.randn(4, columns, generator=generator), torch.randn(rows, 4, generator=generator)
            if shared and name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                a = common.setdefault(name.partition(".")[0], a)
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors |= {f"{key}.lora_A.weight": a.clone(), f"{key}.lora_B.weight": b}
            whole = weight.double() + 2.0 * b.double() @ a.double()
            if dora:
                magnitude = torch.rand(rows, generator=generator) + 0.5
                tensors[f"{key}.lora_magnitude_vector"] = magnitude
                whole *= (magnitude.double() / whole.norm(dim=1))[:, None]
            base[f"layers.{layer}.{name}"], merged[f"layers.{layer}.{name}"] = weight, whole
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": list(ROWS), "use_dora": dora}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return base, merged


def loaded(folder: str, base: str) -> nn.Module:
    """The decoder with the base weights and the adapter of a folder, as the folder says that it was made."""
    whole = dist.group.WORLD if dist.is_initialized() else None
    rank, size = (dist.get_rank(), dist.get_world_size()) if whole is not None else (0, 1)
    model = Decoder(whole)
    put_base(model, load_file(base), rank, size)
    config = ShardedFolder.open(folder).config
    kind = CLASSES[config["peft_type"]]
    options = {name: config[name] for name in ("dim", "alpha", "target_modules")}
    adapted = kind(**options)(model)
    load_adapter(adapted, folder)
    return adapted


def gap_here(folder: str, base: str, merged: str) -> float:
    """See `largest_gap`, on every rank."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return largest_gap(loaded(folder, base), load_file(merged), rank, size)


def saved_again(folder: str, base: str, out: str) -> None:
    """Load, move every factor a little, save."""
    model = loaded(folder, base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.25)
    save_adapter(model, out)


KINDS = {
    "one A": ({"shared": True, "dora": False}, {}),
    "exact": ({"shared": False, "dora": False}, {"fuse": "exact", "one_rank": True}),
    "canonical": ({"shared": False, "dora": False}, {}),
    "DoRA": ({"shared": True, "dora": True}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_layers_compute_what_peft_does(kind: str, tmp_path: Path, seed: int, two_ranks: Ranks) -> None:
    adapter, options = KINDS[kind]
    base, merged = peft_folder(tmp_path / "adapter", seed, **adapter)
    save_file(base, tmp_path / "base.safetensors")
    save_file(merged, tmp_path / "merged.safetensors")
    export_adapter(tmp_path / "adapter", tmp_path / "megatron", tensor_parallel=2, **options, **SHAPE)
    paths = [str(tmp_path / name) for name in ("megatron", "base.safetensors", "merged.safetensors")]
    scale = max(float(weight.abs().max()) for weight in merged.values())
    assert gap_here(*paths) < 1e-5 * 16 * scale
    assert max(two_ranks.run(gap_here, *paths)) < 1e-5 * 16 * scale


@pytest.mark.parametrize("kind", ["one A", "canonical"])
def test_what_ranks_have_trained_comes_back_to_peft(kind: str, tmp_path: Path, seed: int, two_ranks: Ranks) -> None:
    adapter, options = KINDS[kind]
    base, _ = peft_folder(tmp_path / "adapter", seed, **adapter)
    save_file(base, tmp_path / "base.safetensors")
    export_adapter(tmp_path / "adapter", tmp_path / "megatron", **options, **SHAPE)
    two_ranks.run(saved_again, *(str(tmp_path / name) for name in ("megatron", "base.safetensors", "trained")))
    with pytest.raises(ConfigError, match="heads of the model, which are not known"):
        export_adapter(tmp_path / "trained", tmp_path / "back", to="peft")
    export_adapter(tmp_path / "trained", tmp_path / "back", to="peft", **SHAPE)
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "back"))
    assert set(before) == set(after)
    assert all(torch.equal(before[key] * 1.25, after[key]) for key in before)
