"""Saving a model's adapters as PEFT folders, and loading them."""

from __future__ import annotations

import gc
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from smartinit.adapters.bare import bare_module_names
from smartinit.adapters.conversion import convert, scaling_for
from smartinit.adapters.experts import parameter_names
from smartinit.adapters.injection import drop
from smartinit.adapters.loading import put_in, require_finite
from smartinit.adapters.start import start_of
from smartinit.adapters.state import adapter_state, remember_starts, residual_starts, stored_layers, stored_others
from smartinit.errors import ArgumentError, ArtefactError
from smartinit.formats.kept_start import kept_start, remove_start, require_free_start
from smartinit.formats.peft import TENSOR_FILE, StoredAdapter, read_adapter, write_adapter
from smartinit.formats.record import START_FOLDER
from smartinit.formats.stamp import OWNER_STAMP, START_STAMP, file_digest, layers_digest
from smartinit.formats.start import read_start, require_own_base
from smartinit.targets.patterns import rank_finder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch
    from torch import nn

    from smartinit.adapters.adapted import AdaptedModel
    from smartinit.adapters.conversion import Conversion
    from smartinit.adapters.layer import LoraLayer
    from smartinit.adapters.state import AdapterState
    from smartinit.config import LoraConfig
    from smartinit.factors import Factors

T = TypeVar("T", bound="AdaptedModel")

_LARGEST_RANK = 2**31 - 1  # beyond it even matrices without values cannot be made


def save(
    model: AdaptedModel,
    folder: str | os.PathLike[str],
    initial: str | None = None,
    selected_adapters: Sequence[str] | None = None,
) -> None:
    """See `smartinit.LoraModel.save_pretrained`; ``initial`` is its ``path_initial_model_for_weight_conversion``."""
    if not isinstance(folder, (str, os.PathLike)):
        raise ArgumentError(f"the folder to save into is a {type(folder).__name__}; expected its path")
    if isinstance(selected_adapters, str):
        raise ArgumentError(
            f"selected_adapters={selected_adapters!r} is no list of names; write [{selected_adapters!r}]"
        )
    names = list(model.peft_config) if selected_adapters is None else list(selected_adapters)
    paths = {name: Path(folder) if name == "default" else Path(folder) / name for name in names}
    for adapter_name, path in paths.items():  # before anything is written
        model.config_of(adapter_name)
        if initial is None and residual_starts(stored_layers(model.model, adapter_name), adapter_name) is not None:
            require_free_start(path)
    for adapter_name, path in paths.items():
        _save_adapter(model, adapter_name, path, initial)


def _save_adapter(model: AdaptedModel, adapter_name: str, path: Path, initial: str | None) -> None:
    """Write one adapter; ``initial`` is the folder of its start if it is to be converted to plain LoRA."""
    root, config = model.model, model.config_of(adapter_name)
    layers = stored_layers(root, adapter_name)
    others: Mapping[str, torch.Tensor] = stored_others(root, adapter_name, config)
    base_model = config.base_model_name_or_path or getattr(root, "name_or_path", None)
    written: AdapterState | Conversion
    start = None
    if initial is None:
        written = state = adapter_state(layers, adapter_name)
        start = residual_starts(layers, adapter_name)
        if _changed_base(model, adapter_name):  # which has no name here
            config, base_model = config.copy(), None
            config.base_model_name_or_path = None
    else:
        state = adapter_state(layers, adapter_name, plain=False)
        origin = read_start(initial)
        written = convert(StoredAdapter(path, config, state.factors, state.forms, others), origin)
        others = written.others
        base_model = origin.base_model or base_model
    stamps = {}
    if start is not None:  # first: the adapter names it
        _write_start(path / START_FOLDER, config, start, written.factors)
        stamps = {START_STAMP: file_digest(path / START_FOLDER / TENSOR_FILE)}
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
        stamps=stamps,
    )
    if start is None:
        remove_start(path)


def _write_start(folder: Path, config: LoraConfig, start: AdapterState, trained: Mapping[str, Factors]) -> None:
    """Write the start of one adapter; of its configuration only what is about the matrices is kept."""
    alone = config.copy()
    alone.modules_to_save = alone.trainable_token_indices = alone.target_parameters = None
    alone.bias, alone.lora_bias = "none", False
    stamps = {OWNER_STAMP: layers_digest(trained)}
    write_adapter(folder, alone, start.plan, start.factors, dtype=None, forms=start.forms, stamps=stamps)


def _changed_base(model: AdaptedModel, adapter_name: str) -> bool:
    """Whether the base is another one than the model was loaded with.

    Warns:
        UserWarning: it is so for the sake of another adapter, which nobody who loads this one alone would know.
    """
    owners = _changes_of_base(model)
    if owners and adapter_name not in owners:
        other, layer = next(iter(owners.items()))
        warnings.warn(
            f"adapter '{adapter_name}' is for the base that adapter '{other}' has changed (layer '{layer}' for "
            "instance), not for the original: load it beside that one, or train it on the original base; the folder "
            "names no base model",
            stacklevel=5,
        )
    return bool(owners)


def _changes_of_base(model: AdaptedModel) -> dict[str, str]:
    """Adapter whose start has changed the base -> one of the layers."""
    layers = model.lora_layers().items()
    return {name: path for path, layer in layers for name in model.peft_config if _changed_for(layer, name)}


def _changed_for(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether a layer's base was split, or quantised, for one adapter."""
    start, original = start_of(layer, adapter_name), layer.original_weight
    if start is not None and start.base == "residual":
        return True
    return original is not None and original.adapter_name == adapter_name


def from_pretrained(
    kind: Callable[..., T],
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str,
    *,
    is_trainable: bool,
) -> T:
    """See `smartinit.LoraModel.from_pretrained`."""
    with _uncollected():
        stored = read_plain_adapter(folder)
        config = _config_for(model, stored, is_trainable=is_trainable)
        wrapped = kind(model, config, adapter_name, True)  # on the meta device: what a file replaces is never made
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
) -> None:
    """See `smartinit.LoraModel.load_adapter`."""
    with _uncollected():
        stored = read_plain_adapter(folder)
        config = _config_for(model.model, stored, is_trainable=is_trainable)
        model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
        try:
            fill_adapter(model, adapter_name, stored)
        except BaseException:
            drop(model.model, adapter_name)
            del model.peft_config[adapter_name]
            raise
    owners = _changes_of_base(model)
    named = stored.config.base_model_name_or_path  # what is saved beside a split names none
    if owners and named and adapter_name not in owners:
        other, layer = next(iter(owners.items()))
        warnings.warn(
            f"the adapter in '{stored.folder}' is for '{named}', but adapter '{other}' has changed the base here "
            f"(layer '{layer}' for instance): it computes something else than it was trained for",
            stacklevel=4,
        )


def read_plain_adapter(folder: str | os.PathLike[str]) -> StoredAdapter:
    """An adapter folder with everything in it, for the model's base as it is.

    Raises:
        MissingFileError: there is no such folder.
        ArgumentError: ``folder`` is no path.
        ArtefactError: it is no adapter, or one for another base; a matrix is not finite.
    """
    stored = read_adapter(folder, allow_others=True)
    require_own_base(stored)
    require_finite(stored)
    return stored


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
            if not gc.get_freeze_count():  # what somebody has frozen stays so
                gc.freeze()  # and back: all objects now count as old, and are not looked at as new ones at once
                gc.unfreeze()
            gc.enable()


def fill_adapter(model: AdaptedModel, adapter_name: str, stored: StoredAdapter) -> None:
    """Copy a file's tensors into an adapter that was made from the same file's configuration.

    Raises:
        ArtefactError: names or shapes do not fit this model.
    """
    put_in(model.model, adapter_name, stored, model.config_of(adapter_name))
    start = kept_start(stored)
    if start is not None:
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
    _require_ranks(stored)
    config = stored.config.copy()
    config.inference_mode = not is_trainable
    return config


def _require_ranks(stored: StoredAdapter) -> None:
    """Refuse a configuration that asks for larger matrices than the file holds, before anything is made."""
    config = stored.config
    rank_of = rank_finder(config)
    for name, pair in stored.factors.items():
        said = rank_of(name)
        # Of bare parameters the file names the module only, and holds the ranks of all experts together; tied layers
        # have the embedding's.
        if said != pair.rank and not (config.target_parameters or config.ensure_weight_tying):
            raise ArtefactError(
                f"the configuration of the adapter in '{stored.folder}' gives layer '{name}' rank {said}, where its "
                f"matrices in the file have rank {pair.rank}; the two files do not belong together"
            )
    largest = max(config.r, *config.rank_pattern.values(), 0)
    if largest > _LARGEST_RANK:
        raise ArtefactError(f"the configuration of the adapter in '{stored.folder}' asks for rank {largest}")
