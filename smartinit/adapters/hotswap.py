"""Replacing an adapter's weights in place, so that compiled code and captured graphs stay valid."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import os

    from smartinit.adapters.adapted import AdaptedModel


def hotswap_adapter(model: AdaptedModel, folder: str | os.PathLike[str], adapter_name: str) -> None:
    """See `smartinit.LoraModel.hotswap_adapter`."""
    raise NotImplementedError


def prepare_for_hotswap(model: AdaptedModel, target_rank: int) -> None:
    """See `smartinit.LoraModel.prepare_for_hotswap`."""
    raise NotImplementedError
