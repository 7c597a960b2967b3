"""Saving a model's adapters as PEFT folders, and loading them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from smartinit.adapters.bare import bare_module_names
from smartinit.adapters.conversion import convert, scaling_for
from smartinit.adapters.injection import drop
from smartinit.adapters.state import adapter_state, fill, remember_starts, residual_starts
from smartinit.errors import ArtefactError, ConfigError
from smartinit.formats.peft import CONFIG_FILE, StoredAdapter, read_adapter, write_adapter
from smartinit.formats.record import START_FOLDER
from smartinit.formats.start import read_start

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from torch import nn

    from smartinit.adapters.adapted import AdaptedModel
    from smartinit.adapters.conversion import Conversion
    from smartinit.adapters.state import AdapterState
    from smartinit.config import LoraConfig

T = TypeVar("T", bound="AdaptedModel")


def save(
    model: AdaptedModel,
    folder: str | os.PathLike[str],
    path_initial_model_for_weight_conversion: str | None = None,
    selected_adapters: Sequence[str] | None = None,
) -> None:
    """See `smartinit.LoraModel.save_pretrained`."""
    modules = bare_module_names(model.model)
    for adapter_name in selected_adapters if selected_adapters is not None else list(model.peft_config):
        config = model.config_of(adapter_name)
        path = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
        layers = {name: layer for name, layer in model.lora_layers().items() if layer.has(adapter_name)}
        base_model = config.base_model_name_or_path or getattr(model.model, "name_or_path", None)
        written: AdapterState | Conversion
        if path_initial_model_for_weight_conversion is None:
            written = state = adapter_state(layers, adapter_name)
            start = residual_starts(layers, adapter_name)
        else:
            start, state = None, adapter_state(layers, adapter_name, plain=False)
            origin = read_start(path_initial_model_for_weight_conversion)
            written = convert(StoredAdapter(path, config, state.factors, state.forms), origin)
            base_model = origin.base_model or base_model
        nameless = config
        if start is not None:  # for the residual base, which has no name here
            nameless, base_model = config.copy(), None
            nameless.base_model_name_or_path = None
        if start is not None and START_FOLDER in model.peft_config and adapter_name == "default":
            raise ConfigError(f"rename the adapter '{START_FOLDER}': its folder would be that of the start")
        write_adapter(
            path,
            nameless,
            written.plan,
            written.factors,
            base_model_name_or_path=base_model,
            other_modules=modules,
            forms=state.forms,
        )
        if start is not None:
            write_adapter(path / START_FOLDER, nameless, start.plan, start.factors, forms=start.forms)


def from_pretrained(
    kind: Callable[..., T],
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str,
    *,
    is_trainable: bool,
    low_cpu_mem_usage: bool,
) -> T:
    """See `smartinit.LoraModel.from_pretrained`."""
    stored = read_adapter(folder)
    config = _config_for(model, stored, is_trainable=is_trainable)
    wrapped = kind(model, config, adapter_name, low_cpu_mem_usage)
    try:
        fill_adapter(wrapped, adapter_name, stored)
    except BaseException:
        wrapped.unload()
        raise
    return wrapped


def load_adapter(
    model: AdaptedModel,
    folder: str | os.PathLike[str],
    adapter_name: str,
    *,
    is_trainable: bool,
    low_cpu_mem_usage: bool,
) -> None:
    """See `smartinit.LoraModel.load_adapter`."""
    stored = read_adapter(folder)
    model.add_adapter(adapter_name, _config_for(model.model, stored, is_trainable=is_trainable), low_cpu_mem_usage)
    try:
        fill_adapter(model, adapter_name, stored)
    except BaseException:
        drop(model.model, adapter_name)
        del model.peft_config[adapter_name]
        raise


def fill_adapter(model: AdaptedModel, adapter_name: str, stored: StoredAdapter) -> None:
    """Copy a file's tensors into an adapter that was made from the same file's configuration.

    Raises:
        ArtefactError: names or shapes do not fit this model.
    """
    layers = {name: layer for name, layer in model.lora_layers().items() if layer.has(adapter_name)}
    fill(layers, adapter_name, stored)
    if (stored.folder / START_FOLDER / CONFIG_FILE).is_file():
        start = read_adapter(stored.folder / START_FOLDER)
        scalings = {name: scaling_for(start.config, name, pair.rank) for name, pair in start.factors.items()}
        remember_starts(layers, adapter_name, start, scalings)


def _config_for(model: nn.Module, stored: StoredAdapter, *, is_trainable: bool) -> LoraConfig:
    """The file's configuration; refuses at once what was made for another model."""
    known = set(bare_module_names(model))
    unknown = [name for name in stored.factors if name not in known]
    if unknown:
        raise ArtefactError(
            f"the adapter in '{stored.folder}' has weights for {len(unknown)} layers that this model does not have, "
            f"for instance '{unknown[0]}'; was it made for another model?"
        )
    config = stored.config.copy()
    config.inference_mode = not is_trainable
    return config
