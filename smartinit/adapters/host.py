"""The model that carries adapters, whoever wrapped it: this package or PEFT, which is never imported.

Where the layer of a target is:

- `smartinit.LoraModel`, PEFT's own LoraModel: ``model.<target>``
- ``peft.PeftModel``: ``base_model.model.<target>``
- a model in which PEFT injected layers, as ``model.add_adapter(config)`` does: ``<target>``
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from smartinit.adapters.bare import is_lora_layer
from smartinit.errors import ModelError, UnknownNameError
from smartinit.targets.tree import base_model

if TYPE_CHECKING:
    from collections.abc import MutableMapping

_PEFT_PATH = "base_model.model."


@dataclass(frozen=True)
class Host:
    """Where the adapters of a wrapped model are.

    Attributes:
        root: the user's model, whose module names are the target names.
        configs: adapter -> its configuration, as the wrapper keeps it.
        prefix: what PEFT's EVA puts before a target name: ``"base_model.model."`` on a ``PeftModel``, else nothing.
    """

    root: nn.Module
    configs: MutableMapping[str, Any]
    prefix: str

    def config(self, adapter_name: str) -> Any:  # noqa: ANN401  (a LoraConfig of this package or of PEFT)
        """One adapter's configuration.

        Raises:
            UnknownNameError: there is no such adapter.
        """
        if adapter_name not in self.configs:
            raise UnknownNameError(f"the model has no adapter '{adapter_name}'; it has: {', '.join(self.configs)}")
        return self.configs[adapter_name]

    def layers(self, adapter_name: str) -> dict[str, nn.Module]:
        """Target name -> LoRA layer that has this adapter, in model order, whatever it wraps."""
        return {
            name: layer
            for name, layer in self.root.named_modules()
            if is_lora_layer(layer) and adapter_name in adapters_of(layer)
        }


def adapters_of(layer: nn.Module) -> list[str]:
    """Names of the adapters on one LoRA layer."""
    parts: tuple[str, ...] = layer.adapter_layer_names  # type: ignore[assignment]
    return list(dict.fromkeys(name for part in parts for name in getattr(layer, part)))


def parts_of(layer: nn.Module) -> list[str]:
    """Attributes of a LoRA layer that keep something per adapter."""
    layer_names: tuple[str, ...] = layer.adapter_layer_names  # type: ignore[assignment]
    other_names: tuple[str, ...] = layer.other_param_names  # type: ignore[assignment]
    more = [part for part in ("lora_variant", "start") if hasattr(layer, part)]
    return list(dict.fromkeys([*layer_names, *other_names, *more]))


def adapter_parameters(layer: nn.Module, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of one adapter on one LoRA layer."""
    parts: tuple[str, ...] = layer.adapter_layer_names  # type: ignore[assignment]
    kept = [getattr(layer, part)[adapter_name] for part in parts if adapter_name in getattr(layer, part)]
    return [p for item in kept for p in ([item] if isinstance(item, nn.Parameter) else item.parameters())]


def factor_parameters(layer: Any, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:  # noqa: ANN401
    """A and B of one adapter on one LoRA layer, in the shapes in which it keeps them.

    Linear ``(r, in)``, ``(out, r)``; convolution ``(r, in, kh, kw)``, ``(out, r, 1, 1)``; embedding
    ``(r, num_embeddings)``, ``(embedding_dim, r)``.
    """
    if adapter_name in layer.lora_A:
        return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]


def find_host(model: nn.Module) -> Host:
    """The host of adapters that ``model`` is; data-parallel and compiled wrappers around it do not matter.

    Raises:
        ModelError: a model without adapters.
    """
    root, path = base_model(model)
    # From the outermost wrapper inwards, as only some of them pass attributes on.
    parts = path.rstrip(".").split(".") if path else []
    for depth in range(len(parts) + 1):
        wrapper = model.get_submodule(".".join(parts[:depth]))
        configs = getattr(wrapper, "peft_config", None)
        if configs:
            return Host(root, configs, _PEFT_PATH if path.endswith(_PEFT_PATH) else "")
    raise ModelError(
        f"a {type(model).__name__} has no adapter to write into; wrap it first, with smartinit.LoraModel(model, "
        "config) or peft.get_peft_model(model, config)"
    )
