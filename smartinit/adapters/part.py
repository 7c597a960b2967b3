"""A module in a model that holds one part of named adapters: what all kinds of them can do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import nn

from smartinit.adapters.merged_weight import unmerge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from smartinit.adapters.merged_weight import MergedWeight
    from smartinit.adapters.weight_change import WeightChange


class BaseBiases(Protocol):
    """Biases of the base model that one adapter trains: `smartinit.adapters.base_bias.TrainedBiases`."""

    installed: bool

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained ones by their keys in files."""

    def modules(self) -> list[nn.Module]:
        """The modules that have them."""

    def originals(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Pairs of a trained one and the base model's own."""

    def install(self, *, installed: bool = True) -> None:
        """Put them in their places, or the model's own back."""


class AdapterPart(nn.Module):
    """Stands in a model where ``base_layer`` stood, and holds what adapters have there.

    LoRA layers are parts, and so are trained copies of whole modules and trained rows of embeddings. A model does to
    all of its parts what is done to an adapter.

    Args:
        base_layer: the module as the model had it; it is called, never copied.

    Attributes:
        active_adapters: the adapters that `forward` uses; names that this part does not have are passed over.
        disable_adapters: while true, `forward` is the base layer's.
        merged_adapters: those that are in the base layer's weight at present, in the order in which they came in.
        merged_weights: the parameters of the base layer that they are in, with what these were before.
    """

    active_adapters: list[str]
    merged_adapters: list[str]
    merged_weights: list[MergedWeight]
    disable_adapters: bool
    base_biases: dict[str, BaseBiases]  # of adapters that train the model's own: see base_bias.py

    # What belongs to one adapter, by where it is kept: the same two names as on PEFT's layers.
    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Past torch, which would look at each whether it is a module or a tensor, for thousands of parts.
        vars(self).update(
            active_adapters=[], merged_adapters=[], merged_weights=[], disable_adapters=False, base_biases={}
        )

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged."""
        return bool(self.merged_adapters)

    def get_base_layer(self) -> nn.Module:
        """The wrapped module, inside any number of parts."""
        inner = self.base_layer
        return inner.get_base_layer() if isinstance(inner, AdapterPart) else inner

    def adapters(self) -> list[str]:
        """The adapters that have something here, in the order in which they came."""
        raise NotImplementedError

    def has(self, adapter_name: str) -> bool:
        """Whether an adapter has something here."""
        return adapter_name in self.adapters()

    def parameters_of(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter."""
        for part in self.adapter_layer_names:
            kept = getattr(self, part)
            if adapter_name in kept:
                item = kept[adapter_name]
                yield from [item] if isinstance(item, nn.Parameter) else item.parameters()

    def check_active(self, adapter_names: Sequence[str]) -> None:
        """Whether these adapters can be active together here.

        Raises:
            ConfigError: they cannot.
        """
        del adapter_names

    def set_adapter(self, adapter_names: Sequence[str], *, inference_mode: bool = False) -> None:
        """Make these adapters the active ones and, unless ``inference_mode``, the trainable ones."""
        self.active_adapters = list(adapter_names)
        for name in self.adapters():
            trained = name in self.active_adapters and not inference_mode
            for parameter in self.parameters_of(name):
                parameter.requires_grad_(trained)

    def remove(self, adapter_name: str) -> None:
        """Forget one adapter; the others, and which names are active, stay."""
        for part in (*self.adapter_layer_names, *self.other_param_names):
            kept = getattr(self, part)
            if adapter_name in kept:
                del kept[adapter_name]

    def changes(self, adapter_name: str) -> list[WeightChange]:
        """What merging one adapter does to parameters of the base layer (`get_base_layer`); nothing by default.

        A part that stands in for a whole module changes no parameter: see `merged_module`. See
        `smartinit.adapters.weight_change` for the kinds of changes there are.

        Raises:
            ConfigError: the adapter cannot be merged; nothing has been changed then.
            ModelError: likewise, for the base layer's sake.
        """
        del adapter_name
        return []

    def replacements(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """What of the base layer one adapter replaces by values of its own when it is merged, by name in that layer.

        Merging computes nothing of them; see `changes` for what it computes. Nothing by default.
        """
        del adapter_name
        return {}

    def merged_module(self, adapter_names: Sequence[str]) -> nn.Module:
        """What takes this part's place when adapters are merged for good: by default the base layer.

        Args:
            adapter_names: the adapters that are merged, in their order; some may have nothing here.

        Raises:
            ConfigError: they cannot be merged together.
        """
        del adapter_names
        return self.base_layer

    def unmerge(self) -> None:
        """Give the base layer its original parameters back, bit for bit; nothing if no adapter is merged.

        Where several parts are merged into one parameter, all of them are unmerged.
        """
        unmerge(self)

    def other_tensors(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """What one adapter has here besides LoRA's matrices and magnitudes, by the rest of its key in PEFT's files.

        The key in the file is ``base_model.model.<name of the part>.<key>``.
        """
        del adapter_name
        return {}

    def load_others(self, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `other_tensors`, in place.

        Raises:
            ArtefactError: a tensor is missing, too many, or of another shape.
        """
        del adapter_name, tensors
