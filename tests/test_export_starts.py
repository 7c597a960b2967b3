"""Starts that split the base, on their way through Megatron: export, training in fused layers, conversion."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import smartinit as si
from smartinit.convert import convert_adapter, residual_weights
from smartinit.errors import ArtefactError, ConfigError, VerificationError
from smartinit.export import export_adapter
from smartinit.formats.megatron_folder import ShardedFolder, write_folder

sys.path.insert(0, str(Path(__file__).parent))
from split_models import Case, llama, split_start

if TYPE_CHECKING:
    from collections.abc import Callable

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in some/base"),
]
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
SHAPE = {"heads": 4, "groups": 2, "head_size": 8}
FUSED = {"self_attention.linear_qkv": PARTS[:3], "self_attention.linear_proj": PARTS[3:4], "mlp.linear_fc1": PARTS[4:]}


def attention_case(parts: tuple[str, ...] = PARTS) -> Case:
    """The small Llama with these layers split."""
    one = llama()
    return Case(one.make, one.inputs, [f"model.layers.{i}.{part}" for i in range(2) for part in parts])


def train_in_megatron(start: Path, folder: Path, *, own_config: bool = False) -> None:
    """What a training leaves: every value has moved; the folder is another, which need not know of the start."""
    stored = ShardedFolder.open(start)
    generator = torch.Generator().manual_seed(5)
    moved = {}
    for key in stored.layouts:
        tensor = stored.read(key)
        moved[key] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
    config = {key: value for key, value in stored.config.items() if own_config or key not in OURS}
    write_folder(folder, moved, config, tensor_parallel=2)


OURS = ("start", "model_shape", "peft_names", "base_model")


def in_rows(weights: dict[str, torch.Tensor], layer: int, tail: str) -> torch.Tensor:
    """Weights of projections as those of Megatron's layer."""
    parts = [weights[f"model.layers.{layer}.{part}.weight"].double() for part in FUSED[tail]]
    if tail != "self_attention.linear_qkv":
        return torch.cat(parts)
    q, k, v = parts
    return torch.cat([torch.cat([q[16 * g : 16 * g + 16], k[8 * g : 8 * g + 8], v[8 * g : 8 * g + 8]]) for g in (0, 1)])


def trained_weight(folder: Path, layer: int, tail: str) -> torch.Tensor:
    """``s·B A`` of a fused layer, of canonical adapters put together."""
    stored = ShardedFolder.open(folder)
    name = f"decoder.layers.{layer}.{tail}"

    def product(sub: str) -> torch.Tensor:
        a, b = (stored.read(f"{name}.adapter{sub}.linear_{side}.weight").double() for side in ("in", "out"))
        own = stored.config["layers"].get(f"{name}{sub}", {})
        return own.get("alpha", stored.config["alpha"]) / len(a) * b @ a

    if f"{name}.adapter.linear_in.weight" in stored:
        return product("")
    names = {"self_attention.linear_qkv": "qkv", "mlp.linear_fc1": ("gate", "up")}[tail]
    weights = {
        f"model.layers.{layer}.{part}.weight": product(f".adapter_{one}")
        for one, part in zip(names, FUSED[tail], strict=True)
    }
    return in_rows(weights, layer, tail)


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., tuple[Case, dict[str, torch.Tensor]]]:
    """A start in ``start``, exported to ``megatron``; its model, and the weights of the residual base."""

    def make(fuse: str = "exact", parts: tuple[str, ...] = PARTS) -> tuple[Case, dict[str, torch.Tensor]]:
        one = attention_case(parts)
        artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
        artefact.save(tmp_path / "start")
        done = export_adapter(tmp_path / "start", tmp_path / "megatron", fuse=fuse, one_rank=fuse == "exact", **SHAPE)
        assert done.base == "residual"
        assert any("goes with the residual base model" in note for note in done.notes)
        model = one.make()
        return one, {**model.state_dict(), **residual_weights(model, artefact)}

    return make


@pytest.mark.parametrize("from_export", [True, False], ids=["exported start", "first start"])
@pytest.mark.parametrize("fuse", ["exact", "canonical"])
def test_trained_in_megatron_it_is_plain_lora_for_the_base(
    exported: Callable[..., tuple[Case, dict[str, torch.Tensor]]], fuse: str, from_export: bool, tmp_path: Path
) -> None:
    one, residual = exported(fuse)
    stored = ShardedFolder.open(tmp_path / "megatron")
    if fuse == "exact":
        train_in_megatron(tmp_path / "megatron", tmp_path / "trained")
    else:
        train_in_megatron(tmp_path / "megatron", tmp_path / "trained", own_config=False)
    start = tmp_path / ("megatron" if from_export else "start")
    (tmp_path / "model").mkdir()
    one.make().config.save_pretrained(tmp_path / "model")
    convert_adapter(tmp_path / "trained", start, tmp_path / "plain", model=tmp_path / "model")
    adapted = peft.PeftModel.from_pretrained(one.make().double(), tmp_path / "plain", autocast_adapter_dtype=False)
    merged = adapted.merge_and_unload().state_dict()
    for layer in range(2):
        for tail in FUSED:
            expected = in_rows(residual, layer, tail) + trained_weight(tmp_path / "trained", layer, tail)
            assert torch.allclose(in_rows(merged, layer, tail), expected, atol=2e-6), (layer, tail)
    assert stored.config["start"]


def test_projections_that_only_the_fused_layer_trains(
    exported: Callable[..., tuple[Case, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    """Of q and v alone the start has factors; the fused layer has trained k as well."""
    one, residual = exported(parts=("self_attn.q_proj", "self_attn.v_proj"))
    train_in_megatron(tmp_path / "megatron", tmp_path / "trained", own_config=True)
    convert_adapter(tmp_path / "trained", tmp_path / "megatron", tmp_path / "plain")
    adapted = peft.PeftModel.from_pretrained(one.make().double(), tmp_path / "plain", autocast_adapter_dtype=False)
    merged = adapted.merge_and_unload().state_dict()
    for layer in range(2):
        tail = "self_attention.linear_qkv"
        expected = in_rows(residual, layer, tail) + trained_weight(tmp_path / "trained", layer, tail)
        assert torch.allclose(in_rows(merged, layer, tail), expected, atol=2e-6)


def test_the_start_as_it_was_converts_to_nothing(
    exported: Callable[..., tuple[Case, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    one, _ = exported()
    convert_adapter(tmp_path / "megatron", None, tmp_path / "plain")
    loaded = peft.PeftModel.from_pretrained(one.make(), tmp_path / "plain")
    assert torch.allclose(one.outputs(loaded), one.outputs(one.make()), atol=1e-5)


def test_back_in_peft_the_start_comes_along(
    exported: Callable[..., tuple[Case, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    one, _ = exported()
    done = export_adapter(tmp_path / "megatron", tmp_path / "back", to="peft")
    assert done.base == "residual"
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None, "a loader by name would take the wrong base"
    convert_adapter(tmp_path / "back", None, tmp_path / "plain")
    loaded = peft.PeftModel.from_pretrained(one.make(), tmp_path / "plain")
    assert torch.allclose(one.outputs(loaded), one.outputs(one.make()), atol=1e-5)


def test_a_start_that_keeps_the_base_says_so(tmp_path: Path) -> None:
    one = attention_case()
    artefact = split_start(one, si.LoraConfig(r=4, lora_alpha=6), [4])
    artefact.save(tmp_path / "start", base="doubled")
    done = export_adapter(tmp_path / "start", tmp_path / "megatron", fuse="canonical", **SHAPE)
    assert done.base == "unmodified"
    with pytest.raises(ConfigError, match="keeps no start of its own"):
        convert_adapter(tmp_path / "megatron", None, tmp_path / "plain")


def test_a_base_that_megatron_does_not_have_is_refused(
    exported: Callable[..., tuple[Case, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    exported()
    path = tmp_path / "start" / "smartinit.json"
    record = json.loads(path.read_text())
    shutil.copytree(tmp_path / "start", tmp_path / "quantised")
    record["effects"] = dict.fromkeys(record["effects"], "quantises")
    (tmp_path / "quantised" / "smartinit.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="quantises the base, so the adapter belongs to that base"):
        export_adapter(tmp_path / "quantised", tmp_path / "out", **SHAPE)
    shutil.copytree(tmp_path / "start" / "start", tmp_path / "pissa")
    config = json.loads((tmp_path / "pissa" / "adapter_config.json").read_text())
    config["init_lora_weights"] = "pissa"
    (tmp_path / "pissa" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtefactError, match="its weights are for a base that this start has changed"):
        export_adapter(tmp_path / "pissa", tmp_path / "out", **SHAPE)


def test_a_start_that_is_lost_or_another_is_refused(
    exported: Callable[..., tuple[Case, dict[str, torch.Tensor]]], tmp_path: Path
) -> None:
    exported()
    file = tmp_path / "megatron" / "start" / "adapter_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(VerificationError, match="is not the file that"):
        convert_adapter(tmp_path / "megatron", None, tmp_path / "plain")
    file.unlink()
    with pytest.raises(ArtefactError, match="has lost its start"):
        convert_adapter(tmp_path / "megatron", None, tmp_path / "plain")
