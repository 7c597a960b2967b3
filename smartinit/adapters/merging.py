"""Adapters added into base weights, and taken out of them again.

While adapters are merged, the original weights are kept in the host's memory, so that unmerging gives back the very
bits: adding and subtracting a product would not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn

    from smartinit.config import LoraConfig


def merge_adapters(root: nn.Module, adapter_names: Sequence[str], *, safe_merge: bool = False) -> None:
    """Add adapters into the base weights of all layers of a model; after an error every weight is as it was.

    Args:
        root: the model with adapter parts in it.
        adapter_names: which, in this order.
        safe_merge: check every new weight for NaN and Inf before any is written.
    """
    raise NotImplementedError


def unmerge_adapters(root: nn.Module) -> None:
    """Give all layers of a model their original weights back."""
    raise NotImplementedError


def merge_into(
    root: nn.Module, adapter_names: Sequence[str], *, safe_merge: bool = False, progressbar: bool = False
) -> None:
    """`merge_adapters`, and then the base layers take their parts' places."""
    raise NotImplementedError


def restore_base(root: nn.Module, configs: Mapping[str, LoraConfig]) -> None:
    """Give a model its original weights back: adapters that are merged, and starts that the base has given up."""
    del root, configs
