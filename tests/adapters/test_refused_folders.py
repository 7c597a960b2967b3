"""What a folder may not say, and names that cannot be saved: refused before anything is made or written."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from smartinit.adapters import LoraModel
from smartinit.config import LoraConfig
from smartinit.convert import convert_adapter
from smartinit.errors import ArgumentError, ArtefactError, ConfigError, UnknownNameError
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE
from tests.adapters.beside_peft import llama, output, picture, scatter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an adapter on two layers."""
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    scatter(model)
    model.save_pretrained(tmp_path / "folder")
    return tmp_path / "folder"


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of the configuration."""
    config = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def load_new(folder: Path) -> None:
    """Into a model without adapters."""
    base = llama()
    before = picture(base)
    try:
        LoraModel.from_pretrained(base, folder)
    finally:
        assert picture(base) == before


def load_beside(folder: Path) -> None:
    """Into a model with another adapter."""
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    before = picture(model)
    try:
        model.load_adapter(folder, "two")
    finally:
        assert picture(model) == before
        assert list(model.peft_config) == ["default"]


def swap(folder: Path) -> None:
    """In the place of another adapter."""
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = picture(model)
    try:
        model.hotswap_adapter(folder)
    finally:
        assert picture(model) == before


LOADS = [load_new, load_beside, swap]


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "milora"])
def test_an_adapter_for_a_base_that_peft_splits_again_is_refused(
    init: str, load: Callable[[Path], None], folder: Path
) -> None:
    edit(folder, init_lora_weights=init)
    with pytest.raises(
        ArtefactError, match=rf"init_lora_weights='{init}': .*path_initial_model_for.*`smartinit convert`"
    ):
        load(folder)


@pytest.mark.parametrize("load", LOADS)
def test_an_adapter_for_a_quantised_base_is_refused(load: Callable[[Path], None], folder: Path) -> None:
    edit(folder, init_lora_weights="loftq")
    with pytest.raises(ArtefactError, match=r"init_lora_weights='loftq': .*merge_and_unload"):
        load(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_starts_that_keep_the_base_are_loaded(init: bool | str, folder: Path) -> None:
    wanted = output(LoraModel.from_pretrained(llama(), folder))
    edit(folder, init_lora_weights=init)
    assert torch.equal(output(LoraModel.from_pretrained(llama(), folder)), wanted)


def test_the_ways_out_of_a_split_of_pefts_give_the_same_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
        model.save_pretrained(tmp_path / "start")
        scatter(model)
        model.save_pretrained(tmp_path / "trained")
        model.peft_config["default"].init_lora_weights = True  # PEFT's own documentation asks for it
        model.save_pretrained(tmp_path / "start2")
    with pytest.raises(ArtefactError, match="init_lora_weights='pissa'"):
        LoraModel.from_pretrained(llama(), tmp_path / "trained")
    convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "out")
    loaded = LoraModel.from_pretrained(llama(), tmp_path / "out")
    assert torch.allclose(output(loaded), output(model), 0, 1e-5)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_converting_from_a_start_that_keeps_the_base_subtracts_nothing(init: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))
    model.save_pretrained(tmp_path / "start")
    scatter(model)
    model.save_pretrained(tmp_path / "trained")
    conversion = convert_adapter(tmp_path / "trained", tmp_path / "start", tmp_path / "out")
    assert set(conversion.plan.ranks.values()) == {2}
    assert torch.allclose(output(LoraModel.from_pretrained(llama(), tmp_path / "out")), output(model), 0, 1e-5)


@pytest.mark.parametrize("load", LOADS[:2])
@pytest.mark.parametrize(
    "changes", [{"r": 10**12}, {"rank_pattern": {"v_proj": 10**12}}, {"r": 3}, {"rank_pattern": {"q_proj": 1}}]
)
def test_ranks_are_compared_with_the_file_before_anything_is_made(
    changes: dict[str, Any], load: Callable[[Path], None], folder: Path
) -> None:
    edit(folder, **changes)
    said = next(iter(changes.values()))
    said = said if isinstance(said, int) else next(iter(said.values()))
    with pytest.raises(
        ArtefactError, match=rf"gives layer '.*[qv]_proj' rank {said}, where .* in the file have rank 2"
    ):
        load(folder)


@pytest.mark.parametrize("rank", [10**12, 10**40])
def test_a_rank_for_a_layer_that_the_file_lacks_costs_nothing(rank: int, folder: Path) -> None:
    edit(folder, target_modules=["q_proj", "v_proj", "o_proj"], rank_pattern={"o_proj": rank})
    with pytest.raises(ArtefactError, match=r"lacks '.*o_proj|asks for rank"):
        load_new(folder)


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_values_that_are_not_finite_are_refused(
    part: str, value: float, load: Callable[[Path], None], folder: Path
) -> None:
    held = load_file(folder / TENSOR_FILE)
    held[f"base_model.model.model.layers.0.self_attn.v_proj.{part}.weight"][1, 1] = value
    save_file(held, folder / TENSOR_FILE)
    with pytest.raises(ArtefactError, match=rf"{part} of layer 'model.layers.0.self_attn.v_proj' in .* NaN or Inf"):
        load(folder)


def test_whole_modules_must_be_finite_too(tmp_path: Path) -> None:
    LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])).save_pretrained(
        tmp_path
    )
    held = load_file(tmp_path / TENSOR_FILE)
    held["base_model.model.lm_head.weight"][3, 3] = float("nan")
    save_file(held, tmp_path / TENSOR_FILE)
    with pytest.raises(ArtefactError, match=r"'base_model\.model\.lm_head\.weight' in .* NaN or Inf"):
        load_new(tmp_path)


@pytest.mark.parametrize(
    "name", ["use_dora", "use_rslora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying", "inference_mode"]
)
@pytest.mark.parametrize("value", ["yes", "false", 1, None])
def test_switches_are_true_or_false(name: str, value: object, folder: Path) -> None:
    edit(folder, **{name: value})
    with pytest.raises(ArtefactError, match=rf"{name}={value!r} cannot be: expected True or False"):
        load_new(folder)
    with pytest.raises(ConfigError, match=name):
        LoraConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0, -3.5])
def test_alphas_need_not_be_positive_in_files(alpha: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_alpha": alpha, "alpha_pattern": {"v_proj": -1}}
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    scatter(theirs)
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(output(ours), output(theirs), 0, 1e-6)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(output(LoraModel.from_pretrained(llama(), tmp_path / "again")), output(ours))
    assert LoraModel(llama(), peft.LoraConfig(**options)).peft_config["default"].copy().lora_alpha == alpha
    with pytest.raises(ConfigError, match="expected a finite number above 0"):
        LoraConfig(**options)  # type: ignore[arg-type]
    edit(tmp_path, lora_alpha="4")
    with pytest.raises(ArtefactError, match="lora_alpha='4' cannot be: expected a finite number"):
        load_new(tmp_path)


def test_all_names_are_looked_at_before_anything_is_written(tmp_path: Path) -> None:
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnknownNameError, match="no adapter 'nope'"):
        model.save_pretrained(tmp_path / "out", selected_adapters=["default", "nope"])
    with pytest.raises(ArgumentError, match=r"selected_adapters='default' is no list of names; write \['default'\]"):
        model.save_pretrained(tmp_path / "out", selected_adapters="default")
    with pytest.raises(ArgumentError, match="the folder to save into is a NoneType"):
        model.save_pretrained(None)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_arguments_of_the_wrong_kind(folder: Path) -> None:
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    before = picture(model)
    with pytest.raises(ArgumentError, match="target_rank='4' is a str; expected an integer"):
        model.prepare_for_hotswap("4")  # type: ignore[arg-type]
    for load in (model.load_adapter, model.hotswap_adapter):
        with pytest.raises(ArgumentError, match="the adapter folder is a NoneType; expected its path"):
            load(None, "default")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="an adapter's name is a int"):
        model.load_adapter(folder, 3)  # type: ignore[arg-type]
    assert picture(model) == before
