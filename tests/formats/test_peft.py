"""Adapter folders: what PEFT loads, and what is refused."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError, MissingFileError, OutputError, VerificationError
from smartinit.factors import Factors
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE, read_adapter, write_adapter
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from transformers import LlamaForCausalLM

# PEFT asks every transformers model for a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

RANKS = {
    "model.layers.0.self_attn.q_proj": 4,
    "model.layers.0.self_attn.v_proj": 0,
    "model.layers.1.self_attn.q_proj": 2,
    "model.layers.1.self_attn.v_proj": 4,
}
OUT = {"q_proj": 32, "v_proj": 16}


def example(ranks: dict[str, int], seed: int) -> tuple[Plan, dict[str, Factors]]:
    """Random factors, B included, for a tiny Llama's attention."""
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(
            torch.randn(rank, 32, generator=generator),
            torch.randn(OUT[name.rpartition(".")[2]], rank, generator=generator),
        )
        for name, rank in ranks.items()
    }
    return Plan(ranks, {name: 2.0 * rank if rank else 8.0 for name, rank in ranks.items()}), factors


@pytest.fixture
def folder(tmp_path: Path, seed: int) -> Path:
    """A good adapter folder."""
    write_adapter(tmp_path / "adapter", LoraConfig(r=4, lora_alpha=8), *example(RANKS, seed))
    return tmp_path / "adapter"


def test_what_is_written_is_read_bit_for_bit(folder: Path, seed: int) -> None:
    plan, factors = example(RANKS, seed)
    stored = read_adapter(folder)
    assert stored.factors.keys() == {name for name, rank in RANKS.items() if rank}
    for name, pair in stored.factors.items():
        assert torch.equal(pair.a, factors[name].a)
        assert torch.equal(pair.b, factors[name].b)
    assert (stored.config.r, stored.config.lora_alpha) == (4, 8)
    assert stored.config.rank_pattern == {r"^(?:model\.layers\.1\.self_attn\.q_proj)$": 2}
    assert stored.config.target_modules == set(stored.factors)
    assert plan.ranks == RANKS


def test_the_files_are_those_that_peft_writes(folder: Path, tmp_path: Path, tiny_llama: Callable) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (json.loads((path / CONFIG_FILE).read_text()) for path in (folder, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert differing <= {"alpha_pattern", "rank_pattern", "target_modules", "auto_mapping"}
    assert ours["init_lora_weights"] is True
    with safe_open(folder / TENSOR_FILE, "pt") as file, safe_open(tmp_path / "theirs" / TENSOR_FILE, "pt") as other:
        assert file.metadata()["format"] == other.metadata()["format"] == "pt"
        assert set(other.keys()) & set(file.keys())
        assert all(key.startswith("base_model.model.") for key in file.keys())  # noqa: SIM118  (not a mapping)


def test_options_that_had_their_say_are_not_written(tmp_path: Path, seed: int) -> None:
    config = LoraConfig(
        init_lora_weights="eva", eva_config={"rho": 1.5}, exclude_modules=["lm_head"], use_rslora=True, lora_dropout=0.1
    )
    plan, factors = example(RANKS, seed)
    write_adapter(tmp_path, config, Plan(plan.ranks, plan.alphas, use_rslora=True), factors)
    written = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert [written[key] for key in ("eva_config", "exclude_modules", "init_lora_weights")] == [None, None, True]
    assert (written["use_rslora"], written["lora_dropout"]) == (True, 0.1)


def load_in_peft(model: LlamaForCausalLM, folder: Path, **options: object) -> torch.nn.Module:
    """With plain PEFT."""
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(model, str(folder), **options)


def test_peft_gives_every_layer_its_rank_scaling_and_values(folder: Path, seed: int, tiny_llama: Callable) -> None:
    plan, factors = example(RANKS, seed)
    model = load_in_peft(tiny_llama(), folder, is_trainable=True)
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert layers.keys() == {name for name, rank in RANKS.items() if rank}
    for name, layer in layers.items():
        assert layer.r["default"] == RANKS[name]
        assert layer.scaling["default"] == plan.scaling(name)
        assert torch.equal(layer.lora_A["default"].weight, factors[name].a)
        assert torch.equal(layer.lora_B["default"].weight, factors[name].b)
        assert layer.lora_A["default"].weight.requires_grad


def test_shared_storage_is_written_apart(tmp_path: Path) -> None:
    shared = torch.randn(8, 32)
    names = ["m.q_proj", "m.k_proj", "m.v_proj"]
    factors = {name: Factors(shared[: 2 + i], torch.zeros(16, 2 + i)) for i, name in enumerate(names)}
    write_adapter(
        tmp_path, LoraConfig(), Plan({n: p.rank for n, p in factors.items()}, dict.fromkeys(names, 8)), factors
    )
    stored = load_file(tmp_path / TENSOR_FILE)
    for i, name in enumerate(names):
        assert torch.equal(stored[f"base_model.model.{name}.lora_A.weight"], shared[: 2 + i])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_are_rounded_once(tmp_path: Path, seed: int, dtype: torch.dtype) -> None:
    plan, factors = example(RANKS, seed)
    write_adapter(tmp_path, LoraConfig(), plan, factors, dtype=dtype)
    for name, pair in read_adapter(tmp_path).factors.items():
        assert torch.equal(pair.a, factors[name].a.to(dtype))


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_values_that_are_not_finite_are_not_written(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    pair = Factors(torch.full((2, 4), value), torch.zeros(4, 2))
    with pytest.raises(VerificationError, match=r"x\.q\.lora_A\.weight.*NaN or Inf as float"):
        write_adapter(tmp_path / "out", LoraConfig(), Plan({"x.q": 2}, {"x.q": 2}), {"x.q": pair}, dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_plan_and_factors_must_agree(tmp_path: Path, seed: int) -> None:
    plan, factors = example(RANKS, seed)
    del factors["model.layers.1.self_attn.v_proj"]
    with pytest.raises(ConfigError, match=r"different layers.*layers.1.self_attn.v_proj"):
        write_adapter(tmp_path, LoraConfig(), plan, factors)


def test_whole_modules_are_left_to_the_trainer(tmp_path: Path, seed: int, tiny_llama: Callable) -> None:
    """With ``modules_to_save`` in the file and no such weights PEFT stops with a KeyError."""
    with pytest.warns(UserWarning, match="modules_to_save=.*give modules_to_save to the trainer"):
        write_adapter(tmp_path, LoraConfig(modules_to_save=["lm_head"]), *example(RANKS, seed))
    load_in_peft(tiny_llama(), tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, seed: int) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make folder"):
        write_adapter(tmp_path / "file" / "x", LoraConfig(), *example(RANKS, seed))


# --- hostile and broken folders ------------------------------------------------------------------------------------


def test_no_folder_and_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"there is no folder .*nowhere"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(ArtefactError, match=r"adapter_config.json' is missing"):
        read_adapter(tmp_path)


def test_a_pickle_is_refused_with_the_way_out(folder: Path) -> None:
    (folder / TENSOR_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(ArtefactError, match=r"adapter_model\.bin' is a pickle.*save_pretrained"):
        read_adapter(folder)


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / TENSOR_FILE).unlink()
    with pytest.raises(ArtefactError, match=r"adapter_model\.safetensors' is missing"):
        read_adapter(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused_at_any_length(folder: Path, keep: float) -> None:
    content = (folder / TENSOR_FILE).read_bytes()
    (folder / TENSOR_FILE).write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(ArtefactError, match=r"adapter_model\.safetensors'.*broken or truncated"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 60) + b'{"x":{"dtype":"F32","shape":[9,9],"data_offsets":[0,99999]}}',
    ],
)
def test_a_hostile_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / TENSOR_FILE).write_bytes(content)
    with pytest.raises(ArtefactError, match="broken or truncated"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"peft_type": "LORA"', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "must hold a JSON object"),
        (b"{}", "peft_type=None"),
        (b'{"peft_type": "ADALORA"}', "expected 'LORA'"),
        (b'{"peft_type": "LORA", "r": "eight"}', "no usable LoRA configuration"),
        (b'{"peft_type": "LORA", "rank_pattern": {"(": 3}}', "no usable LoRA configuration"),
        (b'{"peft_type": "LORA", "rank_pattern": 3}', "no usable LoRA configuration"),
    ],
)
def test_a_broken_configuration_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ArtefactError, match=rf"adapter_config\.json'.*{message}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no adapter weights"),
        ({"base_model.model.q.lora_A.weight": torch.zeros(2, 4)}, "only one of the two matrices of layer 'q'"),
        ({"q.lora_A.weight": torch.zeros(2, 4), "q.lora_B.weight": torch.zeros(4, 3)}, "their rank must be the same"),
        ({"q.lora_A.weight": torch.zeros(0, 4), "q.lora_B.weight": torch.zeros(4, 0)}, "at least 1"),
        ({"q.lora_A.weight": torch.zeros(2, 4, dtype=torch.int8)}, "expected only matrices"),
        ({"q.lora_A.weight": torch.zeros(2)}, "expected only matrices"),
        ({"q.lora_magnitude_vector": torch.zeros(2)}, "only one of the two matrices of layer 'q'"),
    ],
)
def test_other_tensors_are_refused(folder: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, folder / TENSOR_FILE)
    with pytest.raises(ArtefactError, match=message):
        read_adapter(folder)
