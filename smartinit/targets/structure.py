"""What computes with a model's tensors: its modules below any adapters, their settings, and its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from smartinit.errors import ModelError
from smartinit.targets.contents import Contents
from smartinit.targets.names import WRAPPERS
from smartinit.targets.replaced import hooks, hooks_everywhere, implementations, methods, patched, shadows
from smartinit.targets.source_code import is_library, own_classes
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
_OF_TORCH = frozenset(vars(nn.Module()))
# Private attributes that libraries write on modules of any class, and what is filled while a model runs.
_OF_LIBRARIES = re.compile(
    r"_(is_hf|hf_|tp_|ep_|pp_|cp_|fsdp|is_fsdp|ddp|gradient_checkpointing|require_grads|old_forward|original_forward)|"
    r"_(no_split|skip_keys|keep_in|keys_to|device_mesh|compiled|auto_class|dynamo|name_or_path|version$|orig_mod)|"
    r"_(loss_function$|forward_method|is_full_backward|is_quantized|is_stateful|supports_)|\w*cache"
)
_DEEPEST = 8


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base model under each of its names there; adapters and wrappers are passed through.

    Raises:
        ModelError: FSDP of the first kind, which keeps flat pieces in place of the parameters.
    """
    root, _ = base_model(model)
    return _walk(root, "", ())


def structure_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Any]:
    """Configuration, class, settings and hooks of each module, and code, as JSON values without tensors.

    Of classes and functions that are not from an installed library the code counts too: it is the model.
    """
    ids = {id(part): "around" for part in model.modules()}
    ids |= {id(module): name for name, module in reversed(list(modules.items()))}
    contents = Contents(ids, lambda config: _cleaned(config.to_dict(), 0))  # type: ignore[attr-defined]
    bare = not hasattr(base_model(model)[0], "config")  # then parts may have one each
    patches: dict[type, Any] = {}
    made = {}
    for name, module in modules.items():
        kind = _kind(module)
        if kind not in patches:
            patches[kind] = [
                kind.__name__,
                contents.callable(kind) if own_classes(kind) else "",
                patched(kind, contents),
            ]
        more = [
            hooks(module, contents),
            methods(module, contents),
            implementations(module, contents),
            _generated(module),
        ]
        made[name] = [
            patches[kind],
            _extra_repr(module),
            _settings(module, contents, bare),
            [one for one in more if one],
        ]
    inside = {id(module) for module in modules.values()}
    around = [found for part in model.modules() if id(part) not in inside and (found := hooks(part, contents))]
    return {
        "config": _configuration(base_model(model)[0]),
        "modules": made,
        "around": [*around, hooks_everywhere(contents)],
        "code": contents.code(),
    }


def loose_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that a module keeps as plain attributes, or in lists and mappings there, by name."""
    for name, value in vars(module).items():
        if _is_setting(module, name) and not (name.startswith("_") and _computed(value)):
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


def _extra_repr(module: nn.Module) -> str:
    try:
        return re.sub(r"0x[0-9a-fA-F]+", "0x", str(module.extra_repr()))
    except Exception:  # noqa: BLE001 - the user's own code, which nobody may ever have called
        return ""


def _settings(module: nn.Module, contents: Contents, bare: bool) -> dict[str, Any]:
    kind = type(module)
    own = bool(own_classes(kind))
    items = {
        name: value
        for name, value in vars(module).items()
        if _is_setting(module, name) and not (name == "config" and not own) and not shadows(kind, name, value)
    }
    found = contents.value(items, own=own) or {}
    if bare and not own and hasattr(vars(module).get("config"), "to_dict"):
        found["config"] = contents.value(vars(module)["config"])
    return found


def _is_setting(module: nn.Module, name: str) -> bool:
    """Whether an attribute may change what the module computes."""
    if name in _NOT_SETTINGS:
        return False
    if not name.startswith("_"):
        return True
    if name in _OF_TORCH or _OF_LIBRARIES.match(name):
        return name == "_loss_function"
    kinds = type(module).__mro__
    return any(not is_library(one.__module__) for one in kinds) and not any(
        name in vars(one) for one in kinds if is_library(one.__module__)
    )


def _computed(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.grad_fn is not None


def _generated(module: nn.Module) -> str:
    """Code that a class was not written with: torch.fx's, torch.jit's."""
    if isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule)):
        try:
            return str(module.code)
        except (AttributeError, RuntimeError):  # a part without a forward
            return ""
    return ""


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
