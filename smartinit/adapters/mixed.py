"""Batches whose rows have different adapters."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from smartinit.errors import ArgumentError, UnknownNameError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

    from torch import nn

    from smartinit.adapters.part import AdapterPart

BASE = "__base__"
"""The name, as in PEFT, of no adapter at all."""


class Updates(Protocol):
    """What `mixed_update` asks of a layer."""

    def has(self, adapter_name: str) -> bool:
        """Whether an adapter is here."""

    def update(self, adapter_name: str, x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """``result`` with one adapter's contribution added."""


def mixed_update(layer: Updates, x: torch.Tensor, result: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
    """``result`` with every row's own adapter added.

    Args:
        layer: the layer.
        x: its input, one row per name along the first dimension.
        result: what the base layer made of it.
        names: an adapter for every row; `BASE` and adapters that this layer does not have add nothing.

    Raises:
        ArgumentError: another number of names than of rows.
    """
    if len(names) != len(x):
        raise ArgumentError(f"adapter_names has {len(names)} entries for a batch of {len(x)} rows; give one per row")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    for name, some in rows.items():
        if name != BASE and layer.has(name):
            index = torch.tensor(some, device=result.device)
            updated = layer.update(name, x[index.to(x.device)], result[index])
            result = result.index_copy(0, index, updated.to(result.dtype))
    return result


def repeated_for_generation(model: Any, names: Sequence[str], options: Mapping[str, Any]) -> list[str]:  # noqa: ANN401
    """One name per row that the model sees while it generates: beams and several answers repeat every prompt.

    Args:
        model: a transformers model.
        names: an adapter for every prompt.
        options: the keyword arguments of ``generate``.
    """
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    sizes = [
        options.get(option) or getattr(config, option, None) or 1 for option in ("num_beams", "num_return_sequences")
    ]
    return [name for name in names for _ in range(max(sizes))]


@contextmanager
def rows_with_adapters(parts: Iterable[AdapterPart], names: Sequence[str], known: Collection[str]) -> Iterator[None]:
    """Inside, every part is called with ``adapter_names=names``.

    Args:
        parts: those of a model.
        names: an adapter for every row.
        known: the model's adapters.

    Raises:
        UnknownNameError: there is no such adapter.
    """
    for name in names:
        if name != BASE and name not in known:
            raise UnknownNameError(f"the model has no adapter '{name}'; it has: {', '.join(known)}")

    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        del module
        return args, kwargs | {"adapter_names": list(names)}

    with ExitStack() as stack:
        for part in parts:
            stack.callback(part.register_forward_pre_hook(give, with_kwargs=True).remove)
        yield
