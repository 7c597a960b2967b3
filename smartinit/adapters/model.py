"""A model with LoRA adapters in it."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from smartinit.adapters.conversion import convert, scaling_for, subtract_mutated_init
from smartinit.adapters.kinds import wrap
from smartinit.adapters.layer import LoraLayer, bare_module_names
from smartinit.adapters.state import adapter_state, fill, remember_starts, residual_starts
from smartinit.config import LoraConfig
from smartinit.errors import ArtefactError, ConfigError, ModelError, UnknownNameError
from smartinit.formats.peft import CONFIG_FILE, StoredAdapter, read_adapter, write_adapter
from smartinit.formats.record import START_FOLDER
from smartinit.formats.start import read_start
from smartinit.formats.tensors import stored_tensors
from smartinit.targets.patterns import alpha_for, rank_for
from smartinit.targets.select import select_targets
from smartinit.targets.weight import ALL_HOSTS

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    import torch

    from smartinit.adapters.conversion import Conversion
    from smartinit.adapters.state import AdapterState

# Fields of LoraConfig that ask for more than plain LoRA layers; silence would train something else.
_UNSUPPORTED = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
}


class LoraModel(nn.Module):
    """Puts LoRA layers around the target modules of ``model``, in place, and freezes the rest.

    What this class does not have itself (``config``, ``generate``, …) is the wrapped model's.

    Args:
        model: any module with linear layers, transformers' ``Conv1D``, convolutions or embeddings.
        config: a `smartinit.LoraConfig` or a ``peft.LoraConfig``; it is copied.
        adapter_name: name of the first adapter, which becomes the active one.
        low_cpu_mem_usage: leave the adapter's weights on the meta device until they are loaded or written.

    Attributes:
        model: the wrapped model.
        peft_config: adapter -> its `LoraConfig`.

    Raises:
        ModelError: the model already carries adapters.
        ConfigError: the configuration asks for something else than plain LoRA.
        TargetError: ``target_modules`` matches nothing.

        After an error the model is as it was.
    """

    def __init__(
        self, model: nn.Module, config: LoraConfig, adapter_name: str = "default", low_cpu_mem_usage: bool = False
    ) -> None:
        super().__init__()
        if isinstance(model, LoraModel) or getattr(model, "peft_config", None):
            raise ModelError(
                f"a {type(model).__name__} already carries adapters; add another one with model.add_adapter(name, "
                "config), or wrap the model that model.unload() returns"
            )
        self.model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self._active: list[str] = [adapter_name]
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._inject(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        for parameter in self._trainable:
            parameter.requires_grad = False
        self.set_adapter(adapter_name)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (whatever the wrapped model has)
        """What is missing here is looked up in the wrapped model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet: looking it up would not end
                raise
            return getattr(self.model, name)

    def forward(self, *args: object, **kwargs: object) -> Any:  # noqa: ANN401
        """The wrapped model's forward pass."""
        return self.model(*args, **kwargs)

    def get_base_model(self) -> nn.Module:
        """The wrapped model; its target modules are still LoRA layers (see `unload`)."""
        return self.model

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that the forward pass adds."""
        return list(self._active)

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Module name in the wrapped model -> LoRA layer, in model order."""
        return {name: layer for name, layer in self.model.named_modules() if isinstance(layer, LoraLayer)}

    def add_adapter(self, adapter_name: str, config: LoraConfig, low_cpu_mem_usage: bool = False) -> None:
        """Add another adapter; it is neither active nor trainable until `set_adapter` names it.

        Raises:
            ConfigError: the name is taken, or the configuration cannot be used (see the class).
        """
        if adapter_name in self.peft_config:
            raise ConfigError(f"the model already has an adapter '{adapter_name}'; choose another name")
        self._inject(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        self.set_adapter(self._active)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make one or several adapters the active ones, trainable unless made for inference.

        Raises:
            UnknownNameError: there is no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            self._config(name)
        self._active = names
        inference = bool(names) and all(self.peft_config[name].inference_mode for name in names)
        for layer in self.lora_layers().values():
            layer.set_adapter(names, inference_mode=inference)

    def enable_adapter_layers(self) -> None:
        """Let the active adapters take part in the forward pass."""
        self._disable(disabled=False)

    def disable_adapter_layers(self) -> None:
        """Let the forward pass be the base model's."""
        self._disable(disabled=True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Without adapters inside the with-block; afterwards every layer is as it was before."""
        before = {layer: layer.disable_adapters for layer in self.lora_layers().values()}
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for layer, disabled in before.items():
                layer.disable_adapters = disabled

    def unload(self) -> nn.Module:
        """The wrapped model with its own modules back in place and trainable as it was; adapters are dropped."""
        for name, layer in self.lora_layers().items():
            self.model.set_submodule(name, layer.get_base_layer())
        for parameter in self._trainable:
            parameter.requires_grad = True
        return self.model

    def save_pretrained(
        self, folder: str | os.PathLike[str], path_initial_model_for_weight_conversion: str | None = None
    ) -> None:
        """Write every adapter as a PEFT folder: ``default`` into ``folder``, others into sub-folders of their name.

        An adapter that was applied with ``base="offset"`` is written as plain LoRA for the base as it is. One whose
        base gave its start up keeps that start in the sub-folder ``start``.

        Args:
            folder: where to.
            path_initial_model_for_weight_conversion: the folder that training started from: what is written is then
                plain LoRA of twice the rank for the unmodified base, see `smartinit.convert.convert_adapter`.

        Raises:
            OutputError: the folder cannot be written.
            ArtefactError: the start is for another model or other layers.
        """
        modules = bare_module_names(self.model)
        for adapter_name, config in self.peft_config.items():
            path = Path(folder) if adapter_name == "default" else Path(folder) / adapter_name
            layers = {name: layer for name, layer in self.lora_layers().items() if layer.has(adapter_name)}
            base_model = config.base_model_name_or_path or getattr(self.model, "name_or_path", None)
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
            if start is not None and START_FOLDER in self.peft_config and adapter_name == "default":
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

    def subtract_mutated_init(
        self,
        output_state_dict: dict[str, torch.Tensor],
        adapter_name: str,
        kwargs: object = None,
    ) -> dict[str, torch.Tensor]:
        """A trained split as plain LoRA of twice the rank, in memory: see `smartinit.adapters.conversion`.

        Args:
            output_state_dict: the trained adapter, by the keys of its file.
            adapter_name: an adapter of this model that still is as it was before the training.
            kwargs: as in PEFT's signature; not used.

        Raises:
            UnknownNameError: there is no such adapter.
            ArtefactError: the two are for different layers.
        """
        del kwargs
        config = self._config(adapter_name)
        layers = {name: layer for name, layer in self.lora_layers().items() if layer.has(adapter_name)}
        state = adapter_state(layers, adapter_name, plain=False)
        return subtract_mutated_init(
            output_state_dict, stored_tensors(state.factors, dtype=None, forms=state.forms), config
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
    ) -> LoraModel:
        """Wrap ``model`` with the adapter in a PEFT folder.

        Raises:
            ArtefactError: the folder is no adapter, or one for another model; ``model`` is then as it was.
        """
        stored = read_adapter(folder)
        wrapped = cls(model, _config_for(model, stored, is_trainable=is_trainable), adapter_name)
        try:
            wrapped._fill(adapter_name, stored)
        except BaseException:
            wrapped.unload()
            raise
        return wrapped

    def load_adapter(
        self, folder: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False
    ) -> None:
        """Add the adapter in a PEFT folder under a new name.

        Raises:
            ConfigError: the name is taken.
            ArtefactError: the folder is no adapter, or one for another model; this model is then as it was.
        """
        stored = read_adapter(folder)
        self.add_adapter(adapter_name, _config_for(self.model, stored, is_trainable=is_trainable))
        try:
            self._fill(adapter_name, stored)
        except BaseException:
            self._drop(adapter_name)
            raise

    def _inject(self, adapter_name: str, config: LoraConfig, *, low_cpu_mem_usage: bool) -> None:
        config = LoraConfig.from_any(config)
        for field, plain in _UNSUPPORTED.items():
            if (getattr(config, field) or plain) != plain:
                raise ConfigError(
                    f"{field}={getattr(config, field)!r} is not supported by smartinit.LoraModel, which has plain LoRA "
                    "layers only; leave it out, or wrap the model with PEFT"
                )
        with self._bare():
            names = [target.name for target in select_targets(self.model, config, hosts=ALL_HOSTS)]
        try:
            for name in names:
                module = self.model.get_submodule(name)
                layer = module if isinstance(module, LoraLayer) else wrap(name, module)
                layer.train(module.training)
                rank, alpha = rank_for(config, name), alpha_for(config, name)
                layer.update_layer(adapter_name, rank, alpha, config, device="meta" if low_cpu_mem_usage else None)
                self.model.set_submodule(name, layer)
        except BaseException:
            self._drop(adapter_name)
            raise
        self.peft_config[adapter_name] = config

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The wrapped model with its own modules in place, so that targets are chosen as for the first adapter."""
        layers = self.lora_layers()
        try:
            for name, layer in layers.items():
                self.model.set_submodule(name, layer.base_layer)
            yield
        finally:
            for name, layer in layers.items():
                self.model.set_submodule(name, layer)

    def _drop(self, adapter_name: str) -> None:
        """Take an adapter off every layer; a layer without adapters gives its base layer back."""
        self.peft_config.pop(adapter_name, None)
        for name, layer in self.lora_layers().items():
            layer.remove(adapter_name)
            if not layer.r:
                self.model.set_submodule(name, layer.base_layer)

    def _fill(self, adapter_name: str, stored: StoredAdapter) -> None:
        """Copy a file's tensors into an adapter that was made from the same file's configuration.

        Raises:
            ArtefactError: names or shapes do not fit this model.
        """
        layers = {name: layer for name, layer in self.lora_layers().items() if layer.has(adapter_name)}
        fill(layers, adapter_name, stored)
        if (stored.folder / START_FOLDER / CONFIG_FILE).is_file():
            start = read_adapter(stored.folder / START_FOLDER)
            scalings = {name: scaling_for(start.config, name, pair.rank) for name, pair in start.factors.items()}
            remember_starts(layers, adapter_name, start, scalings)

    def _config(self, adapter_name: str) -> LoraConfig:
        if adapter_name not in self.peft_config:
            raise UnknownNameError(f"the model has no adapter '{adapter_name}'; it has: {', '.join(self.peft_config)}")
        return self.peft_config[adapter_name]

    def _disable(self, *, disabled: bool) -> None:
        for layer in self.lora_layers().values():
            layer.disable_adapters = disabled


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
