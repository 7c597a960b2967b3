"""Tensors of a file put into the parameters and buffers of a part."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from smartinit.errors import ArtefactError

if TYPE_CHECKING:
    from collections.abc import Mapping


@torch.no_grad()
def fill_tensors(
    held: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    what: str,
    device: torch.device | None = None,
) -> None:
    """Copy a file's tensors into what a model holds; after an error nothing was copied.

    Args:
        held: key -> parameter or buffer, the objects themselves. One on the meta device becomes a real one in place, so
            that every module which shares it has it.
        tensors: the same keys -> values of the same shapes, in any dtype.
        what: what holds them, for messages.
        device: where the ones of the meta device go; None: where the file's are.

    Raises:
        ArtefactError: a tensor is missing, too many, or of another shape.
    """
    if held.keys() != tensors.keys():
        missing, unknown = sorted(held.keys() - tensors.keys()), sorted(tensors.keys() - held.keys())
        said = f"lacks {', '.join(missing)}" if missing else f"has no place for {', '.join(unknown)}"
        subject = "the file" if missing else what
        raise ArtefactError(f"{subject} {said}{f' of {what}' if missing else ''}; was it made for another model?")
    for key, kept in held.items():
        if kept.shape != tensors[key].shape:
            raise ArtefactError(
                f"'{key}' of {what} has shape {tuple(tensors[key].shape)} in the file, where this model takes "
                f"{tuple(kept.shape)}; was it made for another model?"
            )
    for key, kept in held.items():
        if not kept.is_meta:
            kept.copy_(tensors[key])
            continue
        value = tensors[key].to(device=device, dtype=kept.dtype, copy=True)  # it may be a window into a file
        made = nn.Parameter(value, requires_grad=kept.requires_grad) if isinstance(kept, nn.Parameter) else value
        torch.utils.swap_tensors(kept, made)
