"""Changes to LoRA layers that are undone when one of them fails."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.host import adapter_parameters, parts_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from smartinit.adapters.host import Host


@contextmanager
def undone_on_error(host: Host, layers: Mapping[str, nn.Module], adapter_name: str) -> Iterator[None]:
    """Put one adapter of ``layers`` back as it was, Ctrl-C included, unless the with-block ends well.

    Its matrices are copied first (an adapter is small), since they may be written in place; the layers themselves,
    what they keep per adapter, and the adapter's configuration are put back as the very same objects.
    """
    config = host.configs[adapter_name]
    before = {name: _Snapshot(layer, adapter_name) for name, layer in layers.items()}
    try:
        yield
    except BaseException:
        host.configs[adapter_name] = config
        for name, snapshot in before.items():
            host.root.set_submodule(name, snapshot.layer)
            snapshot.restore()
        raise


class _Snapshot:
    """What one layer keeps per adapter, and the values of one of them."""

    def __init__(self, layer: Any, adapter_name: str) -> None:  # noqa: ANN401  (a layer of this package or of PEFT)
        self.layer = layer
        self.trained = {parameter: parameter.requires_grad for parameter in layer.parameters()}
        self.kept = {part: dict(getattr(layer, part).items()) for part in parts_of(layer)}
        self.values = {parameter: parameter.detach().clone() for parameter in adapter_parameters(layer, adapter_name)}

    @torch.no_grad()
    def restore(self) -> None:
        """Put all of it back."""
        for part, items in self.kept.items():
            kept = getattr(self.layer, part)
            kept.clear()  # an item put back by itself would come last, and optimisers count on the order
            kept.update(items)
        for parameter, value in self.values.items():
            parameter.copy_(value)
        for parameter, requires_grad in self.trained.items():
            parameter.requires_grad_(requires_grad)
