"""Changes to LoRA layers and to base weights that are undone when one of them fails."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.host import adapter_parameters, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from smartinit.adapters.host import Host


class BaseCopies:
    """Base weights as they were before they were changed, in the host's memory."""

    def __init__(self) -> None:
        self._kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(self, weight: torch.Tensor) -> torch.Tensor:
        """Copy a weight that is about to be written to, and give the copy.

        Adding back what was subtracted would not give the same bits.
        """
        values = weight.detach().to("cpu", copy=True)
        self._kept.append((weight, values))
        return values

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of them back."""
        for weight, values in self._kept:
            weight.copy_(values)


@contextmanager
def undone_on_error(host: Host, layers: Mapping[str, nn.Module], adapter_name: str) -> Iterator[BaseCopies]:
    """Put one adapter of ``layers`` back as it was, Ctrl-C included, unless the with-block ends well.

    Its matrices are copied first (an adapter is small), since they may be written in place; the layers themselves,
    what they keep per adapter, and the adapter's configuration are put back as the very same objects. Base weights
    are copied by the with-block, one by one before each is changed, into what this yields.
    """
    config = host.configs[adapter_name]
    before = {name: _Snapshot(layer, adapter_name) for name, layer in layers.items()}
    copies = BaseCopies()
    try:
        yield copies
    except BaseException:
        host.configs[adapter_name] = config
        copies.restore()
        for name, snapshot in before.items():
            host.root.set_submodule(name, snapshot.layer)
            snapshot.restore()
        raise


class _Snapshot:
    """What one layer keeps per adapter, and the values of one of them."""

    # Kept by an instance only once it differs from its class.
    _NAMES = ("adapter_layer_names", "other_param_names", "frozen_peft_weight_names", "original_weight")

    def __init__(self, layer: Any, adapter_name: str) -> None:  # noqa: ANN401  (a layer of this package or of PEFT)
        self.layer = layer
        self.kind = type(layer)
        self.names = {name: layer.__dict__[name] for name in self._NAMES if name in layer.__dict__}
        self.children = dict(layer.named_children())
        self.trained = {parameter: parameter.requires_grad for parameter in layer.parameters()}
        self.kept = {part: dict(getattr(layer, part).items()) for part in parts_of(layer)}
        self.values = {parameter: parameter.detach().clone() for parameter in adapter_parameters(layer, adapter_name)}

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back."""
        self.layer.__class__ = self.kind
        for name in [name for name, _ in self.layer.named_children() if name not in self.children]:
            delattr(self.layer, name)
        for name in self._NAMES:
            self.layer.__dict__.pop(name, None)
        self.layer.__dict__.update(self.names)
        for part, items in self.kept.items():
            kept = getattr(self.layer, part)
            kept.clear()  # an item put back by itself would come last, and optimisers count on the order
            kept.update(items)
        for parameter, value in self.values.items():
            parameter.copy_(value)
        for parameter, requires_grad in self.trained.items():
            parameter.requires_grad_(requires_grad)
