"""The start that a folder keeps is that of its adapter: not a former one's, and nobody else's adapter."""

from __future__ import annotations

import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smartinit.adapters import LoraModel
from smartinit.adapters.attach import write_factors
from smartinit.adapters.checkpoints import restore_adapters
from smartinit.config import LoraConfig
from smartinit.convert import convert_adapter
from smartinit.errors import ArtefactError, ConfigError, OutputError
from smartinit.factors import Factors
from smartinit.formats.peft import CONFIG_FILE, TENSOR_FILE, read_adapter
from smartinit.planning.plan import Plan
from tests.adapters.beside_peft import llama, output, scatter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

Q, V = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj")


def split(*, layers: tuple[str, ...] = (Q,), adapter_name: str = "default") -> LoraModel:
    """A model whose base has given up the start of one adapter; trained since."""
    targets = [name.rpartition(".")[2] for name in layers]
    model = LoraModel(llama(), LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name)
    draw = torch.Generator().manual_seed(3)
    start = {
        name: Factors(torch.randn(2, 16, generator=draw) / 4, torch.randn(16, 2, generator=draw) / 4, effect="splits")
        for name in layers[:1]
    }
    plan = Plan(dict.fromkeys(start, 2), dict.fromkeys(start, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a layer that starts by default
        write_factors(model, start, plan, adapter_name)
    scatter(model)
    return model


def residual(model: LoraModel) -> nn.Module:
    """A new model with the base weights that an adapted model has now."""
    bare = llama()
    for name, layer in model.lora_layers().items():
        bare.get_submodule(name).load_state_dict(layer.get_base_layer().state_dict())
    return bare


def in_peft(model: nn.Module, folder: Path | None = None, **options: Any) -> Any:
    """PEFT's wrapping, of a folder or new."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if folder is not None:
            return peft.PeftModel.from_pretrained(model, str(folder), is_trainable=True)
        return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the model as it is, copied."""
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(one: nn.Module, other: nn.Module, tolerance: float = 0.0) -> bool:
    """Whether two models have the same weights."""
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.allclose(mine[key], theirs[key], 0, tolerance) for key in mine)


def test_an_ordinary_adapter_called_start_is_left_alone(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    theirs = in_peft(llama(), target_modules=["q_proj"])
    import peft

    theirs.add_adapter("start", peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]))
    theirs.save_pretrained(tmp_path)
    kept = (tmp_path / "start" / TENSOR_FILE).read_bytes()
    model = LoraModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(output(model), output(theirs), 0, 1e-6)
    model.hotswap_adapter(tmp_path)
    restore_adapters(model, tmp_path)
    model.save_pretrained(tmp_path)
    assert same(model.unload(), llama())
    with pytest.raises(OutputError, match="start' holds an adapter of its own, but the start of the one in"):
        split().save_pretrained(tmp_path)
    assert (tmp_path / "start" / TENSOR_FILE).read_bytes() == kept
    assert torch.allclose(output(LoraModel.from_pretrained(llama(), tmp_path)), output(theirs), 0, 1e-6)


@pytest.mark.parametrize("targets", [["q_proj"], ["v_proj", "o_proj"]])
def test_a_plain_adapter_that_is_saved_over_a_split_one_has_no_start(targets: list[str], tmp_path: Path) -> None:
    split().save_pretrained(tmp_path)
    assert (tmp_path / "start").is_dir()
    plain = LoraModel(llama(), LoraConfig(r=2, target_modules=targets))
    scatter(plain)
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "start").exists()
    loaded = LoraModel.from_pretrained(llama(), tmp_path)
    assert torch.equal(output(loaded), output(plain))
    assert same(loaded.unload(), llama())


def test_a_start_that_outlived_its_adapter_is_passed_over(tmp_path: Path) -> None:
    """As when saving was interrupted before the former start was removed, or the folder was copied into another."""
    split().save_pretrained(tmp_path / "split")
    plain = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    scatter(plain)
    plain.save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "split" / "start", tmp_path / "plain" / "start")
    assert same(LoraModel.from_pretrained(llama(), tmp_path / "plain").unload(), llama())


def test_a_trainer_that_knows_nothing_of_starts_keeps_them(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = split(layers=(Q, V))
    model.save_pretrained(tmp_path)
    theirs = in_peft(residual(model), tmp_path)
    assert torch.allclose(output(theirs), output(model), 0, 1e-6)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    theirs.save_pretrained(tmp_path)
    loaded = LoraModel.from_pretrained(residual(model), tmp_path)
    assert torch.allclose(output(loaded), output(theirs), 0, 1e-6)
    assert same(loaded.unload(), llama(), 1e-6)
    convert_adapter(tmp_path, None, tmp_path / "out")
    converted = LoraModel.from_pretrained(llama(), tmp_path / "out")
    assert torch.allclose(output(converted), output(theirs), 0, 1e-5)


def test_another_adapter_that_a_trainer_wrote_over_it_does_not_get_its_start(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    split().save_pretrained(tmp_path)
    theirs = in_peft(llama(), target_modules=["q_proj", "v_proj"])
    theirs.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="start' keeps the start of another adapter than the one in"):
        loaded = LoraModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(output(loaded), output(theirs), 0, 1e-6)
    assert same(loaded.unload(), llama())


@pytest.mark.parametrize("instead", ["nothing", "another"])
def test_a_start_that_was_lost_is_missed(instead: str, tmp_path: Path) -> None:
    model = split()
    model.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / "start")
    if instead == "another":
        LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "start")
    with pytest.raises(ArtefactError, match="is for a base that gave its start up, and has lost that start"):
        LoraModel.from_pretrained(residual(model), tmp_path)


def test_saving_again_writes_the_same_bytes(tmp_path: Path) -> None:
    model = split()
    model.save_pretrained(tmp_path)
    names = [CONFIG_FILE, TENSOR_FILE, f"start/{CONFIG_FILE}", f"start/{TENSOR_FILE}"]
    before = [(tmp_path / name).read_bytes() for name in names]
    LoraModel.from_pretrained(residual(model), tmp_path).save_pretrained(tmp_path)
    assert [(tmp_path / name).read_bytes() for name in names] == before


def test_converting_over_a_split_adapter_leaves_no_start(tmp_path: Path) -> None:
    model = split(layers=(Q, V))
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, path_initial_model_for_weight_conversion=str(tmp_path))
    assert not (tmp_path / "start").exists()
    loaded = LoraModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(output(loaded), output(model), 0, 1e-5)
    with pytest.raises(ConfigError, match="keeps no start of its own"):
        convert_adapter(tmp_path, None, tmp_path / "out")


def test_a_plain_adapter_beside_a_split_one_says_whose_base_it_is_for(tmp_path: Path) -> None:
    model = split()
    model.model.name_or_path = "base"
    model.add_adapter("b", LoraConfig(r=2, target_modules=["v_proj"]))
    with pytest.warns(UserWarning, match="adapter 'b' is for the base that adapter 'default' has changed"):
        model.save_pretrained(tmp_path)
    assert read_adapter(tmp_path / "b").config.base_model_name_or_path is None
    assert read_adapter(tmp_path).config.base_model_name_or_path is None
    assert not (tmp_path / "b" / "start").exists()
    again = LoraModel.from_pretrained(residual(model), tmp_path)
    again.load_adapter(tmp_path / "b", "b")
    with pytest.warns(UserWarning, match="adapter 'b' is for the base"):
        again.save_pretrained(tmp_path / "again", selected_adapters=["b"])


def test_an_adapter_for_the_original_base_beside_a_split_one_is_told_apart(tmp_path: Path) -> None:
    LoraModel(llama(), LoraConfig(r=2, target_modules=["k_proj"], base_model_name_or_path="original")).save_pretrained(
        tmp_path / "own"
    )
    model = split()
    with pytest.warns(UserWarning, match="is for 'original', but adapter 'default' has changed the base here"):
        model.load_adapter(tmp_path / "own", "b")
    with pytest.warns(UserWarning, match="adapter 'b' is for the base"):
        model.save_pretrained(tmp_path / "both")
    model.load_adapter(tmp_path / "both" / "b", "c")  # names no base: without a word


def test_an_adapter_on_its_own_base_is_saved_without_a_word(tmp_path: Path) -> None:
    model = LoraModel(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.model.name_or_path = "base"
    model.save_pretrained(tmp_path)
    assert read_adapter(tmp_path).config.base_model_name_or_path == "base"
