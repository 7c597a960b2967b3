"""Saving a model's adapters as PEFT folders, and loading them."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from smartinit.adapters.bare import bare_module_names
from smartinit.adapters.conversion import convert, scaling_for
from smartinit.adapters.experts import parameter_names
from smartinit.adapters.injection import drop
from smartinit.adapters.loading import put_in
from smartinit.adapters.state import adapter_state, remember_starts, residual_starts, stored_layers, stored_others
from smartinit.errors import ArtefactError, ConfigError
from smartinit.formats.peft import CONFIG_FILE, StoredAdapter, read_adapter, write_adapter
from smartinit.formats.record import START_FOLDER
from smartinit.formats.start import read_start

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
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
    names = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
    for adapter_name in names:
        path = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
        _save_adapter(model, adapter_name, path, path_initial_model_for_weight_conversion)


def _save_adapter(model: AdaptedModel, adapter_name: str, path: Path, initial: str | None) -> None:
    """Write one adapter; ``initial`` is the folder of its start if it is to be converted to plain LoRA."""
    root, config = model.model, model.config_of(adapter_name)
    layers = stored_layers(root, adapter_name)
    others: Mapping[str, torch.Tensor] = stored_others(root, adapter_name, config)
    base_model = config.base_model_name_or_path or getattr(root, "name_or_path", None)
    written: AdapterState | Conversion
    if initial is None:
        written = state = adapter_state(layers, adapter_name)
        start = residual_starts(layers, adapter_name)
    else:
        start, state = None, adapter_state(layers, adapter_name, plain=False)
        origin = read_start(initial)
        written = convert(StoredAdapter(path, config, state.factors, state.forms, others), origin)
        others = written.others
        base_model = origin.base_model or base_model
    if start is not None:  # for the residual base, which has no name here
        config, base_model = config.copy(), None
        config.base_model_name_or_path = None
        if START_FOLDER in model.peft_config and adapter_name == "default":
            raise ConfigError(f"rename the adapter '{START_FOLDER}': its folder would be that of the start")
    parameters = parameter_names(root)
    write_adapter(
        path,
        config,
        written.plan,
        written.factors,
        base_model_name_or_path=base_model,
        dtype=None,
        other_modules=bare_module_names(root),
        forms=state.forms,
        parameters={name: parameters[name] for name in layers if name in parameters},
        others=others,
    )
    if start is not None:
        alone = config.copy()  # of the start only the matrices are kept
        alone.modules_to_save = alone.trainable_token_indices = alone.target_parameters = None
        alone.bias, alone.lora_bias = "none", False
        write_adapter(path / START_FOLDER, alone, start.plan, start.factors, dtype=None, forms=start.forms)


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
    with _uncollected():
        stored = read_adapter(folder, allow_others=True)
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
    with _uncollected():
        stored = read_adapter(folder, allow_others=True)
        model.add_adapter(adapter_name, _config_for(model.model, stored, is_trainable=is_trainable), low_cpu_mem_usage)
        try:
            fill_adapter(model, adapter_name, stored)
        except BaseException:
            drop(model.model, adapter_name)
            del model.peft_config[adapter_name]
            raise


@contextmanager
def _uncollected() -> Iterator[None]:
    """Inside, Python does not look for garbage: of the many objects that are made, all are to stay.

    With the objects of torch and transformers around, every look takes as long as a hundred layers; it is half of the
    time that loading takes.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def fill_adapter(model: AdaptedModel, adapter_name: str, stored: StoredAdapter) -> None:
    """Copy a file's tensors into an adapter that was made from the same file's configuration.

    Raises:
        ArtefactError: names or shapes do not fit this model.
    """
    put_in(model.model, adapter_name, stored, model.config_of(adapter_name))
    if (stored.folder / START_FOLDER / CONFIG_FILE).is_file():
        start = read_adapter(stored.folder / START_FOLDER)
        scalings = {name: scaling_for(start.config, name, pair.rank) for name, pair in start.factors.items()}
        remember_starts(stored_layers(model.model, adapter_name), adapter_name, start, scalings)


def _config_for(model: nn.Module, stored: StoredAdapter, *, is_trainable: bool) -> LoraConfig:
    """The file's configuration; refuses at once what was made for another model."""
    known = set(bare_module_names(model))
    unknown = [name for name in stored.factors if name.replace(".base_layer", "") not in known]
    if unknown and not stored.config.layer_replication:
        raise ArtefactError(
            f"the adapter in '{stored.folder}' has weights for {len(unknown)} layers that this model does not have, "
            f"for instance '{unknown[0]}'; was it made for another model?"
        )
    config = stored.config.copy()
    config.inference_mode = not is_trainable
    return config
