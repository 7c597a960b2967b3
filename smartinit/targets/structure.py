"""What computes with a model's tensors: its modules below any adapters, their settings, and its configuration."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
from collections.abc import Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smartinit.errors import ModelError
from smartinit.targets.names import WRAPPERS
from smartinit.targets.tensor_digest import described
from smartinit.targets.tree import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

_FSDP = "_fsdp_wrapped_module"
# What libraries write on modules, or keep in configurations, that changes no number: where a model came from and what
# it is being used for.
_NOT_SETTINGS = frozenset(
    {
        *("training", "gradient_checkpointing", "is_parallelizable", "model_parallel", "warnings_issued", "model_tags"),
        *("name_or_path", "hf_device_map", "device_map"),
        *("active_adapter", "active_adapters", "peft_type", "peft_config"),
    }
)
_NOT_CONFIG = frozenset(
    {
        *("name_or_path", "transformers_version", "architectures", "auto_map", "id2label", "label2id"),
        *("torch_dtype", "dtype"),  # the tensors say it
        *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript"),
        "gradient_checkpointing",
    }
)
_BACKENDS = re.compile(r"(attn|experts)_implementation")
_INSTALLED = re.compile(r"[/\\](site|dist)-packages[/\\]")
_LIBRARIES = frozenset(("builtins", "torch", "transformers", "peft", "smartinit"))
_DEEPEST = 8


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base model under each of its names there; adapters and wrappers are passed through.

    Raises:
        ModelError: FSDP of the first kind, which keeps flat pieces in place of the parameters.
    """
    root, _ = base_model(model)
    return _walk(root, "", ())


def structure_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Configuration, and class and settings of each module, as JSON values without tensors.

    Of classes that are not from an installed library the source counts too: the code is the model.
    """
    code: dict[type, str] = {}
    made = {}
    for name, module in modules.items():
        kind = _kind(module)
        made[name] = [kind.__name__, _code(kind, code), _extra_repr(module), _settings(module)]
    return {"config": _configuration(base_model(model)[0]), "modules": made}


def loose_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a module keeps as plain attributes, or in lists and mappings there, by name."""
    for name, value in vars(module).items():
        if not name.startswith("_") and name not in _NOT_SETTINGS:
            yield from _tensors(name, value, 0)
    # bitsandbytes' eight bits: the scales move from the weight to the layer's state at its first call.
    holders = (getattr(vars(module).get("state"), "SCB", None), getattr(module._parameters.get("weight"), "SCB", None))  # noqa: SLF001 - without __getattr__
    yield from (("weight.SCB", scales) for scales in holders if isinstance(scales, torch.Tensor))


def _walk(module: nn.Module, name: str, above: tuple[nn.Module, ...]) -> Iterator[tuple[str, nn.Module]]:
    while (inner := _wrapped(module)) is not None and inner not in above:
        above = (*above, module)
        module = inner
    if module in above:  # a module can hold one that holds it
        return
    yield name, module
    for child_name, child in module._modules.items():  # noqa: SLF001 - named_children leaves out repeated modules
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name, (*above, module))


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What an adapter or wrapper is around; None of the model's own modules."""
    children = module._modules  # noqa: SLF001 - getattr would ask modules that answer for the one they wrap
    if children.get(_FSDP) is not None:
        raise ModelError(
            "a model in FullyShardedDataParallel has no fingerprint, as it keeps flat pieces in place of its "
            "parameters; take the fingerprint before wrapping, or use torch's fully_shard"
        )
    names = list(WRAPPERS)
    if hasattr(type(module), "adapter_layer_names"):  # PEFT's and our parts: a user's layer may have a `base_layer`
        names += ["base_layer", "original_module"]
        if isinstance(children.get("token_adapter"), nn.Module) and children.get("base_layer") is None:
            return _wrapped(children["token_adapter"])  # type: ignore[arg-type]  # PEFT's trained rows
    if "adapter" in children:
        names.append("to_wrap")  # Megatron Bridge's layers
    return next((children[key] for key in names if isinstance(children.get(key), nn.Module)), None)


def _kind(module: nn.Module) -> type:
    kind = type(module)
    if len(kind.__bases__) > 1 and kind.__bases__[0].__name__ == "FSDPModule":  # fully_shard changes the class
        kind = kind.__bases__[1]
    return kind


def _code(kind: type, known: dict[type, str]) -> str:
    """Digest of the source of a class and those it inherits from; empty if all are from installed libraries."""
    if kind not in known:
        own = [one for one in kind.__mro__ if not _from_library(one)]
        known[kind] = hashlib.sha256("".join(map(_source, own)).encode()).hexdigest() if own else ""
    return known[kind]


def _from_library(kind: type) -> bool:
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    top = kind.__module__.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names - {"__main__"} or bool(_INSTALLED.search(file))


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed in by hand: what Python made of it
        return repr({name: _made(value.__code__) for name, value in vars(kind).items() if inspect.isfunction(value)})


def _made(code: CodeType) -> list[object]:
    inner = [_made(one) if isinstance(one, CodeType) else described(one) for one in code.co_consts]
    return [code.co_code, code.co_names, code.co_varnames, inner]


def _extra_repr(module: nn.Module) -> str:
    try:
        return re.sub(r"0x[0-9a-fA-F]+", "0x", str(module.extra_repr()))
    except Exception:  # noqa: BLE001 - the user's own code, which nobody may ever have called
        return ""


def _settings(module: nn.Module) -> dict[str, Any]:
    items = {n: v for n, v in vars(module).items() if not n.startswith("_") and n not in _NOT_SETTINGS}
    return _value(items, 0) or {}


def _value(value: object, depth: int) -> Any:  # noqa: ANN401 - JSON
    """Numbers, text, and containers of them; None for anything else."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.Size)):
        return str(value)
    if depth < _DEEPEST and isinstance(value, Mapping):
        found = {str(key): _value(item, depth + 1) for key, item in value.items()}
        return {key: item for key, item in found.items() if item is not None} or None
    if depth < _DEEPEST and isinstance(value, (list, tuple)):
        listed = [_value(item, depth + 1) for item in value]
        return listed if any(item is not None for item in listed) else None
    return None


def _tensors(name: str, value: object, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif depth < _DEEPEST and isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item, depth + 1)
    elif depth < _DEEPEST and isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}", item, depth + 1)


def _configuration(root: nn.Module) -> Any:  # noqa: ANN401 - JSON
    config = getattr(root, "config", None)
    to_dict = getattr(config, "to_dict", None)
    return _cleaned(to_dict() if callable(to_dict) else config, 0)


def _cleaned(value: object, depth: int) -> Any:  # noqa: ANN401 - JSON
    if depth > _DEEPEST or value is None or isinstance(value, (bool, int, float, str)):
        return value if isinstance(value, (bool, int, float, str)) else None
    if isinstance(value, Mapping):
        kept = {str(k): v for k, v in value.items() if not str(k).startswith("_") and k not in _NOT_CONFIG}
        return {k: _cleaned(v, depth + 1) for k, v in kept.items() if not _BACKENDS.search(k)}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item, depth + 1) for item in value]
    return described(value)
