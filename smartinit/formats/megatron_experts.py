"""Adapters of experts: one by one, as Megatron stacks them, and as PEFT stacks those of one parameter.

For E experts of rank r, Megatron's grouped layers have A ``(E, r, in)`` and B ``(E, out, r)``. For a parameter
``(E, out, in)`` PEFT 0.21.2 (``target_parameters``) has two matrices: A ``(E·r, in)`` with row ``e·r + k``, and
B ``(out, r·E)`` with column ``k·E + e``, for direction k of expert e.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smartinit.errors import ArtefactError, ConfigError
from smartinit.formats.megatron_fusion import Update, padded, rescaled

if TYPE_CHECKING:
    from collections.abc import Mapping

_LAYER_MATRIX = 2  # dimensions


def stack(updates: Mapping[int, Update], experts: int) -> Update:
    """Adapters of single experts as one of all: A ``(E, r, in)``, B ``(E, out, r)``.

    Ranks are filled up with zeros to the largest, experts without an adapter have zeros, and all have the scaling of
    the first: a ratio goes into B.

    Args:
        updates: by the expert's number; at least one.
        experts: E.

    Raises:
        ArtefactError: a number that is not below E.
        ConfigError: DoRA's magnitudes, which stacked experts cannot have; or shapes that differ.
    """
    if max(updates) >= experts:
        raise ArtefactError(f"expert {max(updates)} has an adapter, but the model has {experts} experts (from 0)")
    if any(update.magnitude is not None for update in updates.values()):
        raise ConfigError(
            "experts with DoRA cannot be stacked; export them one by one with experts='sequential' "
            "(--experts sequential)"
        )
    first = next(iter(updates.values()))
    sizes = {(update.a.shape[1], update.b.shape[0]) for update in updates.values()}
    if len(sizes) > 1:
        raise ConfigError(f"experts of one layer have (in, out) {sorted(sizes)}; one size is expected")
    rank = max(update.rank for update in updates.values())
    like = padded(first, rank)
    nothing = Update(torch.zeros_like(like.a), torch.zeros_like(like.b), first.scaling)
    rows = [padded(rescaled(updates[e], first.scaling), rank) if e in updates else nothing for e in range(experts)]
    return Update(torch.stack([row.a for row in rows]), torch.stack([row.b for row in rows]), first.scaling)


def unstack(update: Update, experts: int | None) -> dict[int, Update]:
    """The inverse of `stack`; an adapter that all experts share becomes one for each, with the same values.

    Args:
        update: A ``(E, r, in)`` and B ``(E, out, r)``, or of two dimensions, which is shared.
        experts: E, if known.

    Raises:
        ConfigError: a shared one of experts whose number is not known.
        ArtefactError: it is for another number of experts.
    """
    if update.a.ndim == _LAYER_MATRIX:
        if experts is None:
            raise ConfigError(
                "one adapter is shared by all experts of a layer, and how many there are is not known; name the "
                "model's folder as model (--model), or give experts_count (--expert-count)"
            )
        return dict.fromkeys(range(experts), update)
    count = int(update.a.shape[0])
    if experts is not None and count != experts:
        raise ArtefactError(f"a layer has adapters of {count} experts, but the model has {experts}")
    return {e: Update(update.a[e], update.b[e], update.scaling) for e in range(count)}


def parameter_matrices(update: Update) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's two matrices of a stacked update: A ``(E·r, in)``, B ``(out, r·E)``."""
    return update.a.flatten(0, 1), update.b.permute(1, 2, 0).flatten(1)


def of_parameter(a: torch.Tensor, b: torch.Tensor, rank: int, scaling: float) -> Update:
    """The inverse of `parameter_matrices`.

    Args:
        a: ``(E·r, in)``.
        b: ``(out, r·E)``.
        rank: r.
        scaling: of the update.

    Raises:
        ArtefactError: ``rank`` does not divide the rows of A.
    """
    if rank < 1 or len(a) % rank:
        raise ArtefactError(f"A of a stacked parameter has {len(a)} rows, which rank {rank} does not divide")
    return Update(a.unflatten(0, (-1, rank)), b.unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous(), scaling)
