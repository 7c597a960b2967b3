"""A model with adapters in it: running it, adding and choosing adapters, looking at what is there."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from smartinit.adapters import merging
from smartinit.adapters.adapter_names import check_adapter_name
from smartinit.adapters.base_bias import (
    biases_of,
    check_biases,
    check_biases_can_change,
    drop_biases,
    in_effect,
    show_biases,
    trained_biases,
)
from smartinit.adapters.injection import drop, inject, parts_of_model, unwrap
from smartinit.adapters.layer import LoraLayer
from smartinit.adapters.mixed import repeated_for_generation, rows_with_adapters
from smartinit.adapters.replication import require_same_replication
from smartinit.adapters.restoring import restore_base, restore_layers
from smartinit.adapters.saved_modules import with_task_heads
from smartinit.adapters.training import (
    CHECKPOINTING_SWITCHES,
    set_trained,
    unshare_tied,
    with_input_gradients,
    with_signature_of,
)
from smartinit.adapters.tying import with_ties
from smartinit.config import LoraConfig
from smartinit.errors import ArgumentError, ConfigError, ModelError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from smartinit.adapters.part import AdapterPart


class AdaptedModel(nn.Module):
    """Runs a model in which adapters are; what this class does not have itself is the wrapped model's.

    Args:
        model: the model, which is changed in place by whoever puts adapters in.

    Attributes:
        model: the wrapped model.
        peft_config: adapter -> its `LoraConfig`.
    """

    # Here transformers looks whether adapters are what is trained of a quantised model, which cannot be trained itself.
    _hf_peft_config_loaded = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, LoraConfig] = {}
        self._active: list[str] = []
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._undo_replication: Callable[[], None] | None = None
        # On the object: the class's own signature stays, and torch finds both.
        vars(self)["forward"] = with_signature_of(model, self.forward)
        self.register_state_dict_post_hook(unshare_tied)  # type: ignore[no-untyped-call]

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  (whatever the wrapped model has)
        """What is missing here is looked up in the wrapped model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet: looking it up would not end
                raise
            if name == "push_to_hub":  # the wrapped model's would upload the base, not the adapter
                raise AttributeError(
                    "a LoraModel has no push_to_hub: save_pretrained(folder), then huggingface_hub.upload_folder"
                ) from None
            found = getattr(self.model, name)
            return with_input_gradients(self.model, found) if name in CHECKPOINTING_SWITCHES else found

    def forward(
        self, *args: object, labels: object = None, adapter_names: Sequence[str] | None = None, **kwargs: object
    ) -> Any:  # noqa: ANN401
        """The wrapped model's forward pass.

        Args:
            *args: for the wrapped model.
            labels: for the wrapped model, if given. transformers' ``Trainer`` looks for this name in the class, to know
                which column of a batch holds the labels.
            adapter_names: an adapter for every row of the batch (``"__base__"``: none), in place of the active ones.
            **kwargs: for the wrapped model.

        Raises:
            UnknownNameError: there is no such adapter.
            ArgumentError: another number of names than of rows.
            ConfigError: ``adapter_names`` in training mode, where gradient checkpointing would lose them.
        """
        if labels is not None:
            kwargs["labels"] = labels
        with self._rows(adapter_names):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:  # noqa: ANN401
        """The wrapped model's ``generate``; ``adapter_names`` as of `forward`, one per prompt."""
        if adapter_names is not None:
            adapter_names = repeated_for_generation(self.model, adapter_names, kwargs)
        with self._rows(adapter_names):
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def _get_name(self) -> str:
        """The wrapped model's class: `Trainer` knows by this name that labels are shifted (with label smoothing)."""
        return str(self.model._get_name())  # noqa: SLF001 - torch's name for it

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def get_base_model(self) -> nn.Module:
        """The wrapped model; its target modules are still LoRA layers (see `unload`)."""
        return self.model

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that the forward pass adds."""
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name; a list of them where there is another number than one."""
        return self._active[0] if len(self._active) == 1 else self.active_adapters

    def parts(self) -> dict[str, AdapterPart]:
        """Module name in the wrapped model -> what adapters have there, in model order."""
        return parts_of_model(self.model)

    def lora_layers(self) -> dict[str, LoraLayer]:
        """Module name in the wrapped model -> LoRA layer, in model order."""
        return {name: part for name, part in self.parts().items() if isinstance(part, LoraLayer)}

    def config_of(self, adapter_name: str) -> LoraConfig:
        """One adapter's configuration, the object itself.

        Raises:
            UnknownNameError: there is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise UnknownNameError(f"the model has no adapter '{adapter_name}'; it has: {', '.join(self.peft_config)}")
        return self.peft_config[adapter_name]

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters are trained, and how many there are."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print both numbers and their ratio, in PEFT's words."""
        trained, total = self.get_nb_trainable_parameters()
        print(  # noqa: T201 - what it is for
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}"
        )

    def add_adapter(self, adapter_name: str, config: LoraConfig, low_cpu_mem_usage: bool = False) -> None:
        """Add another adapter; it is neither active nor trainable until `set_adapter` names it.

        What is active, disabled or frozen stays so.

        Raises:
            ConfigError: the name is taken or cannot be, or the configuration cannot be used (see the class).
            ModelError: this model's adapters have been merged for good or unloaded.
        """
        if adapter_name in self.peft_config:
            raise ConfigError(f"the model already has an adapter '{adapter_name}'; choose another name")
        self._require_adapters()
        config = LoraConfig.from_any(config)
        require_same_replication(config, self.peft_config.values())
        disabled = any(part.disable_adapters for part in self.parts().values())
        self._inject(adapter_name, config, low_cpu_mem_usage=low_cpu_mem_usage)
        for part in self.parts().values():
            part.active_adapters, part.disable_adapters = list(self._active), disabled
            for parameter in part.parameters_of(adapter_name):
                parameter.requires_grad_(False)
        for bias in trained_biases(self.model, self.peft_config[adapter_name], adapter_name).values():
            bias.requires_grad_(False)
        self._show_biases()

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones, trainable unless made for inference.

        Args:
            adapter_name: one, or several, each of which acts once; an empty list: none.
            inference_mode: freeze them.

        Raises:
            UnknownNameError: there is no such adapter.
            ArgumentError: something else than names.
            ConfigError: they cannot be active together, or biases would change that others are merged into.
        """
        if not isinstance(adapter_name, str | Iterable):
            raise ArgumentError(f"set_adapter takes a name or a list of names, not a {type(adapter_name).__name__}")
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        for name in names:
            self.config_of(name)
        for part in self.parts().values():
            part.check_active(names)
        if self._trains_biases():
            check_biases_can_change(self.model, self._with_biases(names))
        self._active = names
        frozen = inference_mode or (bool(names) and all(self.peft_config[name].inference_mode for name in names))
        for part in self.parts().values():
            part.set_adapter(names, inference_mode=frozen)
        for name, config in self.peft_config.items():
            for bias in trained_biases(self.model, config, name).values():
                bias.requires_grad_(name in names and not frozen)
        self._show_biases()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; if it was the only active one, the first of those that are left is active then.

        Layers whose base weight was changed for this adapter's start (`Artefact.apply`) have their original weights
        again, as after `unload`.

        Raises:
            UnknownNameError: there is no such adapter.
            ConfigError: it is merged into the base weights, or the model's last one (see `unload`), or another one
                computes with a base weight that was changed for it.
            ModelError: such a weight cannot be written to.
        """
        self.config_of(adapter_name)
        if any(adapter_name in part.merged_adapters for part in self.parts().values()):
            raise ConfigError(f"adapter '{adapter_name}' is merged into the base weights: call unmerge_adapter() first")
        if len(self.peft_config) == 1:
            raise ConfigError(f"'{adapter_name}' is the only adapter: call unload(), which gives the base model back")
        check_biases_can_change(self.model, self._with_biases([n for n in self._active if n != adapter_name]))
        restore_layers(self.model, adapter_name)
        drop(self.model, adapter_name)
        del self.peft_config[adapter_name]
        if self._active == [adapter_name]:
            first = next(iter(self.peft_config))
            warnings.warn(f"adapter '{adapter_name}', which was active, is deleted; '{first}' is now", stacklevel=2)
            self.set_adapter(first)
            return
        self._active = [name for name in self._active if name != adapter_name]
        for part in self.parts().values():
            part.active_adapters = list(self._active)
        self._show_biases()

    def enable_adapter_layers(self) -> None:
        """Let the active adapters take part in the forward pass."""
        self._disable(disabled=False)

    def disable_adapter_layers(self) -> None:
        """Let the forward pass be the base model's."""
        self._disable(disabled=True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Without adapters inside the with-block; afterwards every layer is as it was before."""
        before = {part: part.disable_adapters for part in self.parts().values()}
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for part, disabled in before.items():
                part.disable_adapters = disabled
            self._show_biases()

    def _inject(self, adapter_name: str, config: LoraConfig, *, low_cpu_mem_usage: bool) -> None:
        check_adapter_name(adapter_name)
        merging.check_unmerged(self.model, adapter_name, config)
        check_biases(config, self.peft_config)
        config = with_ties(self.model, with_task_heads(config))
        inject(self.model, adapter_name, config, device="meta" if low_cpu_mem_usage else None)
        self.peft_config[adapter_name] = config

    def unload(self) -> nn.Module:
        """The wrapped model with its own modules back in place and trainable as it was; adapters are dropped.

        Its weights are the original ones: adapters that are merged are taken out first, and a base that was split
        (`Artefact.apply`) gets back what it was, bit for bit, from a copy in the host's memory. A base that was loaded
        as a residual, by `from_pretrained`, has no such copy: the start is added to it in float64, and the result is
        the original to two roundings.
        """
        merging.unmerge_adapters(self.model)
        restore_base(self.model)
        drop_biases(self.model)
        unwrap(self.model)
        self._restore_layers()
        trainable = set(self._trainable)
        for parameter in self.model.parameters():
            set_trained(parameter, trained=parameter in trainable)
        self._forget_adapters()
        return self.model

    def _forget_adapters(self) -> None:
        self.peft_config.clear()
        self._active = []

    def _require_adapters(self) -> None:
        """Refuse what makes no sense any more.

        Raises:
            ModelError: no adapter is left in this model.
        """
        if not self.peft_config:
            raise ModelError(
                "this model's adapters have been merged for good or unloaded; wrap the model that came back with "
                "smartinit.LoraModel again"
            )

    def _restore_layers(self) -> None:
        if self._undo_replication is not None:
            self._undo_replication()
            self._undo_replication = None

    @contextmanager
    def _rows(self, adapter_names: Sequence[str] | None) -> Iterator[None]:
        if adapter_names is None:
            yield
            return
        if self.model.training:  # not this wrapper, which torch makes in training mode around any model
            raise ConfigError(
                "adapter_names is for inference: gradient checkpointing would compute the rows again without them; "
                "call model.eval() first, or train each adapter with set_adapter"
            )
        with rows_with_adapters(self.parts().values(), adapter_names, known=self.peft_config):
            self._show_biases_of_rows(adapter_names)
            try:
                yield
            finally:
                self._show_biases()

    def _show_biases(self) -> None:
        """The biases of the adapter that is merged or active, or the model's own."""
        if self._trains_biases():
            show_biases(self.model, self._with_biases(self._active))

    def _trains_biases(self) -> bool:
        """Whether any adapter does; else nobody need search a large model for them."""
        return any(config.bias != "none" for config in self.peft_config.values())

    def _with_biases(
        self, active: Sequence[str], also_merged: Sequence[str] = (), *, disabled: bool | None = None
    ) -> list[str]:
        """The adapters whose biases the model is to have."""
        parts = self.parts().values()
        merged = [name for part in parts for name in part.merged_adapters]
        disabled = any(part.disable_adapters for part in parts) if disabled is None else disabled
        return [] if disabled else in_effect(parts, active, [*merged, *also_merged])

    def _show_biases_of_rows(self, adapter_names: Sequence[str]) -> None:
        used = set(adapter_names)
        several = [name for name in biases_of(self.model) if name in used and len(used) > 1]
        if several:
            raise ConfigError(
                f"adapter '{several[0]}' trains the model's biases (bias={self.peft_config[several[0]].bias!r}), which "
                "all rows of a batch share: give it batches of its own"
            )
        if not any(part.disable_adapters for part in self.parts().values()):
            show_biases(self.model, used)

    def _disable(self, *, disabled: bool) -> None:
        if disabled:
            merging.unmerge_adapters(self.model)
        else:
            check_biases_can_change(self.model, self._with_biases(self._active, disabled=False))
        for part in self.parts().values():
            part.disable_adapters = disabled
        self._show_biases()
