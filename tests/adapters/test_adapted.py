"""Adding, choosing, removing and switching off adapters: nothing that was not asked for changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from smartinit import LoraConfig, LoraModel
from smartinit.errors import ArgumentError, ConfigError, ModelError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn


def config(*targets: str, **options: object) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **options)


@pytest.fixture
def model(tiny_llama: Callable) -> LoraModel:
    return LoraModel(tiny_llama(), config("q_proj", "v_proj")).eval()


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def logits(model: nn.Module, tokens: torch.Tensor, **options: object) -> torch.Tensor:
    return model(input_ids=tokens, **options).logits


@pytest.mark.parametrize(
    "name",
    ["", " a", "a.b", "a/b", "../a", "/a", "a\0b", "keys", "items", "forward", "training", "__base__", "start"],
)
def test_a_name_that_cannot_be_is_refused(name: str, model: LoraModel, tiny_llama: Callable, tmp_path: Path) -> None:
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match="adapter cannot be called"):
        model.add_adapter(name, config("k_proj"))
    with pytest.raises(ConfigError, match="adapter cannot be called"):
        LoraModel(tiny_llama(), config("q_proj"), name)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="adapter cannot be called"):
        model.load_adapter(tmp_path, name)
    with pytest.raises(ConfigError, match="adapter cannot be called"):
        model.add_weighted_adapter(["default"], [1.0], name, "linear")
    assert list(model.state_dict()) == before


@pytest.mark.parametrize("name", [None, 3])
def test_a_name_of_another_kind_is_refused(name: object, model: LoraModel) -> None:
    with pytest.raises(ArgumentError, match="name is a"):
        model.add_adapter(name, config("k_proj"))
    with pytest.raises(ArgumentError, match="set_adapter takes"):
        model.set_adapter(name)


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ArgumentError, match="NoneType"):
        LoraModel(None, config("q_proj"))


def test_an_adapter_that_comes_in_while_others_are_disabled_is_disabled_too(
    model: LoraModel, tokens: torch.Tensor
) -> None:
    with model.disable_adapter():
        before = logits(model, tokens)
        model.add_adapter("second", config("k_proj", "up_proj"))
        model.set_adapter("second")
        assert torch.equal(logits(model, tokens), before)
    model.disable_adapter_layers()
    model.add_adapter("third", config("down_proj"))
    model.set_adapter(["second", "third"])
    assert torch.equal(logits(model, tokens), before)
    model.enable_adapter_layers()
    assert not torch.equal(logits(model, tokens), before)


def test_what_is_frozen_stays_frozen(model: LoraModel) -> None:
    model.set_adapter("default", inference_mode=True)
    model.add_adapter("second", config("k_proj"))
    assert trained(model) == set()
    model.delete_adapter("second")
    assert trained(model) == set()
    model.set_adapter("default")
    some = next(name for name in trained(model) if "lora_A" in name)
    model.get_parameter(some).requires_grad = False
    before = trained(model)
    model.add_adapter("second", config("k_proj", "q_proj"))
    model.delete_adapter("second")
    assert trained(model) == before


def test_naming_an_adapter_twice_makes_it_act_once(model: LoraModel, tokens: torch.Tensor) -> None:
    once = logits(model, tokens)
    model.set_adapter(["default", "default"])
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model, tokens), once)


def test_without_the_only_active_one_the_first_of_the_others_is_active(model: LoraModel, tokens: torch.Tensor) -> None:
    model.add_adapter("second", config("k_proj"))
    model.add_adapter("third", config("o_proj"))
    model.set_adapter("second")
    expected = logits(model, tokens)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="'second' is now"):
        model.delete_adapter("default")
    assert model.active_adapter == "second"
    assert torch.equal(logits(model, tokens), expected)
    assert {name.split(".")[-2] for name in trained(model)} == {"second"}
    model.set_adapter(["second", "third"])
    model.delete_adapter("third")
    assert model.active_adapters == ["second"]
    assert torch.equal(logits(model, tokens), expected)


def test_rows_are_for_inference(model: LoraModel, tokens: torch.Tensor) -> None:
    model.train()
    with pytest.raises(ConfigError, match="inference"):
        model(input_ids=tokens, adapter_names=["default", "__base__"])


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"num_return_sequences": 3, "do_sample": True}, {}])
def test_every_prompt_generates_with_its_own_adapter(
    options: dict[str, object], model: LoraModel, tokens: torch.Tensor
) -> None:
    model.add_adapter("second", config("k_proj", "down_proj"))
    names = ["second", "__base__"]
    settings = {"max_new_tokens": 4, "use_cache": True, "pad_token_id": 0} | options
    torch.manual_seed(0)
    mixed = model.generate(tokens, adapter_names=names, **settings)
    count = int(options.get("num_return_sequences", 1))
    assert len(mixed) == 2 * count
    if "do_sample" in options:
        return
    for row, name in enumerate(names):
        model.set_adapter([] if name == "__base__" else name)
        alone = model.generate(tokens[row : row + 1], **settings)
        assert torch.equal(mixed[row : row + 1, : alone.shape[1]], alone)


def test_an_unloaded_model_says_so(model: LoraModel, tmp_path: Path) -> None:
    model.unload()
    assert model.active_adapters == []
    with pytest.raises(ModelError, match="wrap the model"):
        model.add_adapter("second", config("k_proj"))
    with pytest.raises(ModelError, match="wrap the model"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_the_base_is_not_uploaded_in_place_of_the_adapter(model: LoraModel) -> None:
    with pytest.raises(AttributeError, match="upload_folder"):
        model.push_to_hub("owner/name")
