"""The published signatures and defaults of Megatron Bridge's adapters (0.3.1, and two options of its later main)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, get_args

import pytest
import torch
from torch import nn

import smartinit.megatron as bridge
from smartinit.adapters.parallel.initial import INITIAL
from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

FUSED = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]
SEPARATE = ["linear_q", "linear_k", "linear_v", "linear_proj", "linear_fc1_up", "linear_fc1_gate", "linear_fc2"]
METHODS = {"lora_A_init_method": "xavier", "lora_B_init_method": "zero"}
COMMON: dict[str, Any] = {
    "target_modules": FUSED,
    "exclude_modules": [],
    "dim": 32,
    "dropout": 0.0,
    "dropout_position": "pre",
}
LORA = COMMON | METHODS | {"alpha": 32, "a2a_experimental": False, "lora_dtype": None}
LORA |= {"normalize_moe_lora": False, "share_expert_adapters": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "VLMLoRA": LORA | {"freeze_vision_model": True, "freeze_vision_projection": True, "freeze_language_model": True},
    "DoRA": COMMON | METHODS | {"alpha": 64},
    "CanonicalLoRA": COMMON | METHODS | {"alpha": 32, "target_modules": SEPARATE},
}
REQUIRED = inspect.Parameter.empty
METHODS_OF_ALL: dict[str, dict[str, Any]] = {
    "__call__": {"model": REQUIRED, "training": True},
    "transform": {"module": REQUIRED, "name": None, "prefix": None},
    "freeze_model": {"model": REQUIRED, "training": True},
    "enable_adapter_layers": {"model": REQUIRED},
    "disable_adapter_layers": {"model": REQUIRED},
    "disable_adapter": {"model": REQUIRED},
    "set_params_to_save": {"model": REQUIRED},
    "adapter_key_filter": {"key": REQUIRED},
    "match": {"m": REQUIRED, "name": None, "prefix": None},
}


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "self"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_options_and_their_defaults(name: str) -> None:
    made = getattr(bridge, name)()
    published = PUBLISHED[name]
    assert {option: getattr(made, option) for option in published} == published
    accepted = set(inspect.signature(getattr(bridge, name)).parameters)
    assert set(published) <= accepted
    assert accepted - set(published) <= {"canonical_mapping"}, "what is more has a place in this table"
    assert getattr(bridge, name)(**published) == made


def test_the_order_of_arguments() -> None:
    order = ["target_modules", "exclude_modules", "canonical_mapping", "dim", "alpha", "dropout", "dropout_position"]
    order += ["lora_A_init_method", "lora_B_init_method"]
    for name in PUBLISHED:
        assert list(inspect.signature(getattr(bridge, name)).parameters)[: len(order)] == order


@pytest.mark.parametrize("name", PUBLISHED)
def test_lists_are_not_shared_between_objects(name: str) -> None:
    kind = getattr(bridge, name)
    first = kind()
    first.target_modules.append("other")
    first.exclude_modules.append("other")
    assert kind().target_modules == PUBLISHED[name]["target_modules"]
    assert kind().exclude_modules == []


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("method", METHODS_OF_ALL)
def test_methods(name: str, method: str) -> None:
    assert defaults(getattr(getattr(bridge, name), method)) == METHODS_OF_ALL[method]


def test_merge() -> None:
    parameters = inspect.signature(bridge.LoRAMerge.merge).parameters
    assert list(parameters)[1:] == ["base_weight", "linear_out", "linear_in", "alpha", "dim", "tp_size", "tp_group"]
    assert [p.default for p in list(parameters.values())[1:]] == [REQUIRED] * 5 + [1, None]
    assert {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY} == {"tp_size", "tp_group"}
    assert defaults(bridge.LoRAMerge.transform) == METHODS_OF_ALL["transform"]
    assert defaults(bridge.LoRAMerge.__call__) == METHODS_OF_ALL["__call__"]
    a, b, w = torch.randn(2, 3), torch.randn(4, 2), torch.randn(4, 3)
    torch.testing.assert_close(bridge.LoRAMerge().merge(w, b, a, 8, 2), w + 4 * b @ a)


@pytest.mark.parametrize("name", ["LoRA", "VLMLoRA", "DoRA", "CanonicalLoRA"])
def test_choices(name: str) -> None:
    assert set(INITIAL) == {"xavier", "normal", "kaiming", "uniform", "zero"}
    model = nn.ModuleDict({"language_model": nn.ModuleDict({"linear_proj": nn.Linear(4, 4)})})
    for option, value in (("dropout_position", "middle"), ("lora_A_init_method", "x"), ("lora_B_init_method", "x")):
        with pytest.raises(ConfigError, match=option):
            getattr(bridge, name)(target_modules=["linear_proj"], **{option: value})(model)
    kind = bridge.LoRA.__annotations__["dropout_position"]
    assert "pre" in kind
    assert "post" in kind


@pytest.mark.parametrize("name", sorted(bridge.__all__))
def test_all_that_is_public_has_a_docstring(name: str) -> None:
    thing = getattr(bridge, name)
    assert thing.__doc__
    if not inspect.isclass(thing):
        return
    assert not thing.__doc__.startswith(f"{name}("), "not the one that dataclass makes"
    for own, member in inspect.getmembers(thing):
        if own.startswith("_") and own != "__call__":
            continue
        if callable(member) or isinstance(member, property):
            assert inspect.getdoc(member), f"{name}.{own}"
    for option in PUBLISHED.get(name, {}):
        documented = any(f"{option}:" in (kind.__doc__ or "") for kind in thing.__mro__)
        assert documented, f"{name}.{option} is not documented"


def test_the_options_of_dropout() -> None:
    from smartinit.adapters.parallel.adapter import DropoutPosition

    assert get_args(DropoutPosition) == ("pre", "post")
