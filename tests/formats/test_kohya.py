"""kohya's names for image models: PEFT's own conversion script is the oracle of the names."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from smartinit.adapters import LoraModel
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError, MissingFileError, SmartinitError, VerificationError
from smartinit.factors import Factors
from smartinit.formats.kohya import kohya_tensors, read_kohya, write_kohya
from smartinit.formats.tensors import Form
from smartinit.planning.plan import Plan

if TYPE_CHECKING:
    from pathlib import Path


class Block(nn.Module):
    """A residual block with attention, as in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 4, 3, padding=1)
        self.proj_in = nn.Conv2d(4, 4, 1)
        self.to_q = nn.Linear(4, 6)
        self.to_out = nn.ModuleList([nn.Linear(6, 4), nn.Dropout(0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj_in(self.conv_in(x))
        y: torch.Tensor = self.to_out[0](self.to_q(x.movedim(1, -1)).tanh()).movedim(-1, 1)
        return x + y


class Unet(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.down_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.down_blocks:
            x = block(x)
        return x


IMAGE = torch.linspace(-1, 1, 2 * 4 * 5 * 5).reshape(2, 4, 5, 5)
ALL = ["conv_in", "proj_in", "to_q", "to_out.0"]
NAMES = [name for name, _ in Unet().named_modules() if name]


def adapted(seed: int, **options: Any) -> LoraModel:
    """A U-Net whose adapter has random values."""
    options = {"r": 3, "lora_alpha": 2, "target_modules": ALL} | options
    model = LoraModel(Unet(), LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.lora_layers().values():
            for matrix in layer.matrices("default"):
                matrix.copy_(torch.randn(matrix.shape, generator=generator) / 4)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"to_q": 5}, "alpha_pattern": {"conv_in": 0.7}},
        {"use_dora": True},
        {"target_modules": ["0.to_q"]},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_a_model_comes_back(options: dict[str, Any], seed: int, tmp_path: Path) -> None:
    model = adapted(seed, **options)
    wanted = model(IMAGE)
    model.save_kohya(tmp_path / "x.safetensors")
    again = LoraModel(Unet(), LoraConfig(r=1, target_modules=["to_q"]))
    again.load_kohya(tmp_path / "x.safetensors", "x", is_trainable=True)
    again.set_adapter("x")
    assert torch.allclose(again.eval()(IMAGE), wanted, 0, 1e-6)
    for name, layer in model.lora_layers().items():
        loaded = again.lora_layers()[name]
        assert loaded.r["x"] == layer.r["default"]
        assert loaded.scaling["x"] == pytest.approx(layer.scaling["default"], rel=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(loaded.matrices("x"), layer.matrices("default"), strict=True))
        assert all(matrix.requires_grad for matrix in loaded.matrices("x"))


def test_the_names_and_values_are_those_of_pefts_script(seed: int, tmp_path: Path) -> None:
    """That is `convert_peft_sd_lora_to_kohya_ss.py`, one alpha for all layers."""
    model = adapted(seed)
    model.save_pretrained(tmp_path)
    expected = {}
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        layer, part = key.removeprefix("base_model.model.").split(".lora_")
        flat = "lora_unet_" + "_".join(layer.split("."))
        expected[flat + {"A.weight": ".lora_down.weight", "B.weight": ".lora_up.weight"}[part]] = tensor
        expected[flat + ".alpha"] = torch.tensor(2.0)
    model.save_kohya(tmp_path / "x.safetensors")
    written = load_file(tmp_path / "x.safetensors")
    assert written.keys() == expected.keys()
    assert "lora_unet_down_blocks_1_to_out_0.lora_down.weight" in written
    assert written["lora_unet_down_blocks_0_conv_in.lora_down.weight"].shape == (3, 4, 3, 3)
    for key, tensor in written.items():
        assert tensor.shape == expected[key].shape, key
        assert torch.allclose(tensor, expected[key], 1e-6, 0), key
    content = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    assert header["__metadata__"]["ss_network_dim"] == "3"
    assert float(header["__metadata__"]["ss_network_alpha"]) == pytest.approx(2)


def pair(rank: int, inputs: int, outputs: int, **options: Any) -> Factors:
    """Random factors."""
    return Factors(torch.randn(rank, inputs), torch.randn(outputs, rank), **options)


def test_several_models_share_a_file_and_half_precision_rounds_once(tmp_path: Path) -> None:
    text, unet = pair(2, 4, 3), pair(2, 4, 6)
    others = kohya_tensors(Plan({"enc.q": 2}, {"enc.q": 1}), {"enc.q": text}, prefix="lora_te1", dtype=torch.float16)
    plan = Plan({"mid.q": 2, "mid.v": 0}, {"mid.q": 3, "mid.v": 3})
    write_kohya(tmp_path / "x.safetensors", plan, {"mid.q": unet, "mid.v": pair(0, 4, 4)}, others=others)
    for prefix, name, factors, alpha in (("lora_te1", "enc.q", text, 1), ("lora_unet", "mid.q", unet, 3)):
        read = read_kohya(tmp_path / "x.safetensors", [name, "other"], prefix)
        assert dict(read.plan.ranks) == {name: 2}
        assert read.plan.alphas[name] == pytest.approx(alpha)
        assert torch.equal(read.factors[name].a, factors.a.half() if prefix == "lora_te1" else factors.a)
    with pytest.raises(ArtefactError, match="nothing for prefix 'lora_te'; its keys begin with: lora_te1, lora_unet"):
        read_kohya(tmp_path / "x.safetensors", ["enc.q"], "lora_te")
    with pytest.raises(ConfigError, match="is given for two models"):
        write_kohya(
            tmp_path / "y.safetensors",
            plan,
            {"mid.q": unet},
            prefix="lora_te1",
            others={"lora_te1_mid_q.alpha": torch.ones(())},
        )


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1, 1)])
def test_a_missing_alpha_is_the_rank_and_magnitudes_have_any_form(shape: tuple[int, ...], tmp_path: Path) -> None:
    q = "lora_unet_down_blocks_0_to_q"
    scale = torch.arange(1.0, 5).reshape(shape)
    save_file(
        {f"{q}.lora_down.weight": torch.ones(2, 3), f"{q}.lora_up.weight": torch.ones(4, 2), f"{q}.dora_scale": scale},
        tmp_path / "x.safetensors",
    )
    read = read_kohya(tmp_path / "x.safetensors", NAMES)
    assert read.plan.scaling("down_blocks.0.to_q") == 1
    assert torch.equal(read.factors["down_blocks.0.to_q"].magnitude, scale.flatten())
    assert kohya_tensors(read.plan, read.factors)[f"{q}.dora_scale"].shape == (4, 1)


def test_a_linear_layer_may_be_kept_as_a_convolution_of_single_points(seed: int, tmp_path: Path) -> None:
    """Versions of one model differ in that, and files go from one to the other."""
    model = adapted(seed, target_modules=["to_q", "proj_in"])
    model.save_kohya(tmp_path / "x.safetensors")
    held = load_file(tmp_path / "x.safetensors")
    for key, tensor in held.items():
        if "to_q.lora_" in key:
            held[key] = tensor[:, :, None, None]
        elif "proj_in.lora_" in key:
            held[key] = tensor.flatten(1)
    save_file(held, tmp_path / "x.safetensors")
    again = LoraModel(Unet(), LoraConfig(r=1, target_modules=["to_q"]))
    again.load_kohya(tmp_path / "x.safetensors", "x")
    again.set_adapter("x")
    assert torch.allclose(again(IMAGE), model(IMAGE), 0, 1e-6)


Q = "lora_unet_down_blocks_0_to_q"
GOOD = {f"{Q}.lora_down.weight": torch.ones(2, 4), f"{Q}.lora_up.weight": torch.ones(6, 2)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_unet_mid_q.lora_up.weight": torch.ones(2, 2)}, "1 layers that .*'lora_unet_mid_q'"),
        ({f"{Q}.lora_mid.weight": torch.ones(2, 2)}, r"holds '.*to_q\.lora_mid\.weight', which is no part of a LoRA"),
        ({f"{Q}.hada_w1_a": torch.ones(2, 2)}, r"holds '.*to_q\.hada_w1_a', which is no part"),
        ({f"{Q}.lora_up.weight": None}, r"lacks '.*to_q\.lora_up\.weight'"),
        ({f"{Q}.lora_up.weight": torch.ones(6, 3)}, r"shape \(2, 4\) and a lora_up of shape \(6, 3\); their rank"),
        ({f"{Q}.lora_up.weight": torch.ones(6, 2, dtype=torch.int8)}, "their rank must be the same"),
        ({f"{Q}.alpha": torch.ones(2)}, r"an alpha of shape \(2,\)"),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, "gives layer '.*to_q' the alpha nan; expected a finite number"),
        (
            {f"{Q}.lora_up.weight": torch.full((6, 2), float("inf"))},
            "lora_B of layer 'down_blocks.0.to_q' in .* holds NaN or Inf",
        ),
        ({f"{Q}.dora_scale": torch.ones(1, 6)}, r"a dora_scale of shape \(1, 6\).*norms over inputs cannot be read"),
        ({f"{Q}.lora_down.weight": torch.ones(2, 5)}, r"shape \(2, 5\) for layer 'down_blocks.0.to_q'.*takes \(2, 4\)"),
        (
            {
                "lora_unet_down_blocks_1_to_q.lora_up.weight": torch.ones(6, 2),
                "lora_unet_down_blocks_1_to_q.lora_down.weight": torch.ones(2, 4),
                f"{Q}.dora_scale": torch.ones(6),
            },
            "decomposes some layers.*but not 'down_blocks.1.to_q'",
        ),
    ],
)
def test_what_cannot_be_read_is_named(changes: dict[str, Any], message: str, seed: int, tmp_path: Path) -> None:
    tensors = GOOD | changes
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, tmp_path / "x.safetensors")
    model = adapted(seed)
    before, modules = model(IMAGE), [id(module) for module in model.modules()]
    with pytest.raises(ArtefactError, match=message):
        model.load_kohya(tmp_path / "x.safetensors", "x")
    assert torch.equal(model(IMAGE), before)
    assert [id(module) for module in model.modules()] == modules
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("alpha", [0.0, -3.0])
def test_an_alpha_need_not_be_positive(alpha: float, seed: int, tmp_path: Path) -> None:
    save_file(GOOD | {f"{Q}.alpha": torch.tensor(alpha)}, tmp_path / "x.safetensors")
    model = adapted(seed)
    model.load_kohya(tmp_path / "x.safetensors", "x")
    assert model.lora_layers()["down_blocks.0.to_q"].scaling["x"] == alpha / 2


def test_names_that_may_mean_several_modules_are_refused(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "x.safetensors")
    with pytest.raises(ArtefactError, match=r"may mean any of 'down_blocks\.0\.to_q', 'down\.blocks_0_to\.q'"):
        read_kohya(tmp_path / "x.safetensors", [*NAMES, "down.blocks_0_to.q"])
    with pytest.raises(ConfigError, match=r"'a\.b_c' and 'a_b\.c' are both called 'lora_unet_a_b_c'"):
        kohya_tensors(
            Plan({"a.b_c": 1, "a_b.c": 1}, {"a.b_c": 1, "a_b.c": 1}), {"a.b_c": pair(1, 2, 2), "a_b.c": pair(1, 2, 2)}
        )


def test_no_file_a_pickle_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no file"):
        read_kohya(tmp_path / "x.safetensors", NAMES)
    torch.save(GOOD, tmp_path / "x.pt")
    with pytest.raises(ArtefactError, match=r"x\.pt' is a pickle"):
        read_kohya(tmp_path / "x.pt", NAMES)
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ArtefactError, match="broken or truncated"):
        read_kohya(tmp_path / "x.safetensors", NAMES)


def test_what_the_format_has_no_place_for_is_refused(seed: int, tmp_path: Path) -> None:
    plan = Plan({"emb": 2}, {"emb": 2})
    with pytest.raises(ConfigError, match="'emb' is an embedding"):
        kohya_tensors(plan, {"emb": pair(2, 4, 4)}, forms={"emb": Form(embedding=True)})
    with pytest.raises(VerificationError, match=r"lora_unet_emb\.lora_down\.weight' holds NaN or Inf as float16"):
        kohya_tensors(plan, {"emb": Factors(torch.full((2, 4), 1e6), torch.zeros(4, 2))}, dtype=torch.float16)
    for options in ({"modules_to_save": ["proj_in"], "target_modules": ["to_q"]}, {"bias": "lora_only"}):
        with pytest.raises(SmartinitError, match="more than LoRA's matrices"):
            adapted(seed, **options).save_kohya(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
