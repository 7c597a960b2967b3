"""Who else uses a weight: tied embeddings and heads, replicated layers, modules that stand in several places."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smartinit.targets.weight import storage_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from smartinit.targets.weight import Storage, Target


def shared_weights(targets: Iterable[Target]) -> dict[Storage, tuple[Target, ...]]:
    """Weight -> the targets that use it, in their order; targets whose weight cannot be read are left out.

    What changes a weight changes it for all of them: it must be done once, and for all alike.
    """
    found: dict[Storage, list[Target]] = {}
    for target in targets:
        if target.storage is not None:
            found.setdefault(target.storage, []).append(target)
    return {storage: tuple(users) for storage, users in found.items()}


def users_of_weights(root: nn.Module) -> dict[int, list[tuple[str, Storage]]]:
    """Address -> names (and layouts) under which a parameter with this address stands in the model.

    A module that stands in several places counts in each. Parameters on the meta device have no address.
    """
    found: dict[int, list[tuple[str, Storage]]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():  # noqa: SLF001 - named_parameters leaves out the repeated
            if parameter is not None and not parameter.is_meta and parameter.numel():
                storage = storage_of(parameter)
                found.setdefault(storage[0], []).append((f"{path}.{name}" if path else name, storage))
    return found
