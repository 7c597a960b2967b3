"""What a user puts in a model's way besides its modules: hooks, methods in place of others, registered functions."""

from __future__ import annotations

import functools
import re
import sys
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules import module as torch_module

from smartinit.targets.source_code import is_library, own_classes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from smartinit.targets.contents import Contents

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_EVERYWHERE = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
# All give the same numbers but for rounding.
_USUAL = re.compile(
    r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d+)|batched_mm|grouped_mm|deepgemm|sonicmoe"
)
# What an implementation is called in a configuration, and where the functions of that name are registered.
_REGISTERS = {
    "_attn_implementation": (
        ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ),
    "_experts_implementation": (("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),),
}


def hooks(module: nn.Module, contents: Contents) -> dict[str, Any]:
    """Kind of hook -> what the user's are; libraries' own move tensors and count."""
    held = vars(module)
    return {kind: own for kind in _HOOKS if (own := _own_hooks(held.get(kind), contents))}


def hooks_everywhere(contents: Contents) -> dict[str, Any]:
    """The user's hooks on every module of the process."""
    return {kind: own for kind in _EVERYWHERE if (own := _own_hooks(getattr(torch_module, kind, None), contents))}


def _own_hooks(held: Any, contents: Contents) -> list[Any]:  # noqa: ANN401 - an OrderedDict, None or False
    return [contents.inner(hook) for hook in (held or {}).values() if _is_own(hook) or _reparametrises(hook)]


def _is_own(value: object) -> bool:
    if isinstance(value, functools.partial):
        return _is_own(value.func) or any(_is_own(one) for one in value.args if callable(one))
    if isinstance(value, MethodType):
        return _is_own(value.__func__) or bool(own_classes(type(value.__self__)))
    if isinstance(value, FunctionType):
        wrapped = getattr(value, "__wrapped__", None)
        return not is_library(value.__globals__.get("__name__")) or (wrapped is not None and _is_own(wrapped))
    return bool(own_classes(type(value)))


def _reparametrises(hook: object) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


def methods(module: nn.Module, contents: Contents) -> dict[str, Any]:
    """Functions of the user's in place of the class's methods; libraries' wrappers around methods are looked into."""
    kind = type(module)
    found = {}
    for name, value in vars(module).items():
        if shadows(kind, name, value):
            inside = _inside(value)
            if _is_own(inside) and getattr(inside, "__func__", inside) is not _inside(getattr(kind, name)):
                found[name] = contents.callable(inside) or contents.inner(inside)
    return found


def shadows(kind: type, name: str, value: object) -> bool:
    """Whether an attribute of an instance stands in place of a method of its class."""
    return callable(value) and callable(getattr(kind, name, None)) and not isinstance(value, torch.nn.Module)


def _inside(value: object) -> object:
    """What a library's wrapper is around: accelerate's, autocast's."""
    for _ in range(16):
        wrapped = getattr(value, "__wrapped__", None)
        if wrapped is None or (isinstance(value, FunctionType) and not is_library(value.__globals__.get("__name__"))):
            break
        value = wrapped
    return value


def patched(kind: type, contents: Contents) -> dict[str, Any]:
    """Methods of a library's class that come from elsewhere: put there by the user or by another library."""
    found = {}
    for one in kind.__mro__:
        if not is_library(one.__module__) or one is object:
            continue
        home = one.__module__.partition(".")[0]
        for name, value in vars(one).items():
            if isinstance(value, FunctionType):
                module = getattr(_inside(value), "__module__", None) or ""
                if _is_own(value) or module.partition(".")[0] not in (home, "torch", "accelerate", "smartinit"):
                    found[f"{one.__name__}.{name}"] = contents.callable(value)
    return found


def implementations(module: nn.Module, contents: Contents) -> dict[str, Any]:
    """Names and functions of attention, its masks and experts that the user registered with transformers."""
    config = vars(module).get("config")
    return dict(_registered(config, contents)) if hasattr(config, "_attn_implementation") else {}


def _registered(config: object, contents: Contents) -> Iterator[tuple[str, Any]]:
    for kind, registers in _REGISTERS.items():
        name = getattr(config, kind, None)
        if not isinstance(name, str):
            continue
        if not _USUAL.fullmatch(name):
            yield kind, name
        for place, register in registers:
            held = getattr(sys.modules.get(place), register, None)
            function = held.get(name) if held is not None else None
            if function is not None and _is_own(function):
                yield register, contents.inner(function)
