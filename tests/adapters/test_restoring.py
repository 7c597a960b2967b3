"""A base that gave something up for an adapter has it back once the adapter is deleted."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

import smartinit as si
from smartinit.adapters.attach import write_factors
from smartinit.adapters.restoring import restore_layers
from smartinit.config import LoraConfig
from smartinit.errors import ConfigError, ModelError
from tests.adapters.test_merging import (
    EVERY_KIND,
    TIED,
    EveryKind,
    adapted,
    assert_close,
    assert_same,
    fill,
    ids,  # noqa: F401 - a fixture
    splitting,
    state,
    tied,  # noqa: F401 - a fixture
    tied_factors,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

SPLIT = ["linear", "conv1d", "embed"]


@pytest.fixture
def original() -> dict[str, torch.Tensor]:
    return state(EveryKind())


def split_model(effect: str = "splits", **options: Any) -> si.LoraModel:
    """Some layers have given something up for the adapter ``default``, which was trained since."""
    model = adapted(EveryKind(), SPLIT, {"default": options})
    write_factors(model, *splitting(model, effect=effect))
    fill(model)
    return model


@pytest.mark.parametrize("effect", ["splits", "quantises"])
@pytest.mark.parametrize("other", [["plane"], ["plane", "head"]])
def test_a_deleted_adapters_layers_have_their_weights_back(
    other: list[str], effect: str, original: dict[str, torch.Tensor]
) -> None:
    model = split_model(effect)
    model.add_adapter("b", LoraConfig(r=2, target_modules=other))
    with pytest.warns(UserWarning, match="'b' is now"):
        model.delete_adapter("default")
    assert model.lora_layers().keys() == set(other)
    assert all(torch.equal(model.model.get_submodule(name).weight, original[f"{name}.weight"]) for name in SPLIT)
    model.merge_adapter()
    assert_same(model.unload(), original)


@pytest.mark.parametrize("effect", ["splits", "quantises"])
def test_an_adapter_beside_it_would_compute_something_else(
    effect: str,
    ids: torch.Tensor,  # noqa: F811
    original: dict[str, torch.Tensor],
) -> None:
    model = split_model(effect)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["conv1d", "plane"]))
    before, outputs = state(model), model(ids)
    message = "'default' cannot be deleted: .*'conv1d' .* adapter 'b' .* delete 'b' first"
    with pytest.raises(ConfigError, match=message):
        model.delete_adapter("default")
    assert list(model.peft_config) == ["default", "b"]
    assert model.active_adapters == ["default"]
    assert_same(model, before)
    assert torch.equal(model(ids), outputs)
    model.add_adapter("c", LoraConfig(r=2, target_modules=["head"]))
    model.delete_adapter("b")  # which the base gave nothing up for
    assert torch.equal(model(ids), outputs)
    with pytest.warns(UserWarning, match="'c' is now"):
        model.delete_adapter("default")
    assert_same(model.unload(), original)


def test_an_offset_takes_nothing_from_the_base(original: dict[str, torch.Tensor]) -> None:
    model = adapted(EveryKind(), SPLIT, {"default": {}})
    write_factors(model, *splitting(model), base="offset")
    model.add_adapter("b", LoraConfig(r=2, target_modules=SPLIT))
    with pytest.warns(UserWarning, match="'b' is now"):
        model.delete_adapter("default")
    assert_same(model.unload(), original)


def test_without_a_copy_the_start_is_added(tmp_path: Path, original: dict[str, torch.Tensor]) -> None:
    model = split_model()
    model.save_pretrained(tmp_path)
    for layer in model.lora_layers().values():
        layer.original_weight = None
        layer.start.clear()
    loaded = si.LoraModel.from_pretrained(model.unload(), tmp_path)
    loaded.add_adapter("b", LoraConfig(r=2, target_modules=["plane"]))
    refusing = copy.deepcopy(loaded)
    refusing.lora_layers()["linear"].get_base_layer().to("meta")
    kept = refusing.lora_layers()["embed"].weight.clone()
    with pytest.raises(ModelError, match="'default' cannot be deleted: the base weight of 'linear'"):
        refusing.delete_adapter("default")
    assert torch.equal(refusing.lora_layers()["embed"].weight, kept)
    assert list(refusing.peft_config) == ["default", "b"]

    restore_layers(loaded.model, "default")
    once = state(loaded)
    restore_layers(loaded.model, "default")
    assert_same(loaded, once)
    with pytest.warns(UserWarning, match="'b' is now"):
        loaded.delete_adapter("default")
    restored = state(loaded.unload())
    for name, tensor in original.items():
        assert_close(restored[name], tensor, 2.5e-7)


def test_an_error_in_the_middle_leaves_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    model = split_model()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["plane"]))
    before, copied, copy_ = state(model), [], torch.Tensor.copy_

    def failing(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        copied.append(self)
        if len(copied) == 2:
            raise KeyboardInterrupt
        return copy_(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", failing)
        with pytest.raises(KeyboardInterrupt):
            model.delete_adapter("default")
    assert_same(model, before)
    assert list(model.peft_config) == ["default", "b"]
    with pytest.warns(UserWarning, match="'b' is now"):
        model.delete_adapter("default")
    assert_same(model.unload(), state(EveryKind()))


@pytest.mark.filterwarnings(TIED)
def test_one_of_two_tied_layers_with_another_adapter(tied: nn.Module) -> None:  # noqa: F811
    original = state(tied)
    model = adapted(tied, ["embed_tokens", "lm_head"], {"default": {}})
    write_factors(model, *tied_factors(model))
    assert model.lora_layers()["lm_head"].original_weight is not None
    model.add_adapter("b", LoraConfig(r=2, target_modules=["lm_head"]))
    model.add_adapter("c", LoraConfig(r=2, target_modules=["q_proj"]))
    before = state(model)
    with pytest.raises(ConfigError, match=r"'lm_head' .* adapter 'b'"):
        model.delete_adapter("default")
    assert_same(model, before)
    model.delete_adapter("b")
    head = model.lora_layers()["lm_head"]
    with pytest.warns(UserWarning, match="'c' is now"):
        model.delete_adapter("default")
    assert head.original_weight is None, "the copies are of no use any more"
    assert_same(model.unload(), original)


def test_merging_another_adapter_for_good_says_that_the_base_stays_a_residual() -> None:
    model = split_model()
    model.add_adapter("b", LoraConfig(r=2, target_modules=["plane"]))
    with pytest.warns(UserWarning, match=r"of 3 layers .* adapter 'default', .* delete_adapter\('default'\)"):
        model.merge_and_unload(adapter_names=["b"])
    model = split_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_and_unload()


def test_every_kind_of_layer(original: dict[str, torch.Tensor]) -> None:
    model = adapted(EveryKind(), EVERY_KIND, {"default": {}})
    write_factors(model, *splitting(model))
    twin = copy.deepcopy(model)
    for layer in twin.lora_layers().values():
        layer.original_weight = None
    for one, tolerance in ((model, 0), (twin, 2.5e-7)):
        with pytest.raises(ConfigError, match="the only adapter"):
            one.delete_adapter("default")
        restored = state(one.unload())
        for name, tensor in original.items():
            assert_close(restored[name], tensor, tolerance)
