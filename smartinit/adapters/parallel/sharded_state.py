"""What Megatron-Core's distributed checkpoints ask of a layer with an adapter.

Megatron-Core is imported here only when it calls: where it is not installed, no one does.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from smartinit.adapters.parallel.stored import stored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from smartinit.adapters.parallel.base import ParallelBase
    from smartinit.adapters.parallel.stored import Stored

    Offsets = tuple[tuple[int, int, int], ...]
    """``(axis, this rank's piece, number of pieces)`` of each axis that is in pieces."""


def sharded_state(
    to_wrap: nn.Module,
    adapter: nn.Module,
    base: ParallelBase,
    prefix: str,
    offsets: Offsets,
    metadata: dict[str, Any] | None,
) -> dict[str, Any]:
    """The layer's part of Megatron's sharded state dict: the base layer's own, and the adapter's weights.

    The rows of a gated layer's weights are stored in the order of one process, ``[gate; up]``, as Megatron stores those
    of the base. Adapters that expert-parallel ranks share are stored once, those of each expert along the first axis
    (grouped layers), or as the layer's owner asks with ``offsets`` (``SequentialMLP``: of each expert its own).

    Args:
        to_wrap: the base layer.
        adapter: beside it.
        base: what the layer does among the ranks.
        prefix: of its keys.
        offsets: of axes before the weights' own.
        metadata: what Megatron's caller says of the checkpoint.
    """
    from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, sharded_state_dict_default

    known = ensure_metadata_has_dp_cp_group(metadata)
    state: dict[str, Any] = sharded_state_dict_default(to_wrap, prefix, offsets, known)
    for part in stored(adapter, base):
        key = f"{prefix}{part.path}"
        state[key] = _sharded(key, part, tuple(offsets), known)
    return state


def _sharded(key: str, part: Stored, offsets: Offsets, metadata: dict[str, Any]) -> Any:  # noqa: ANN401 - Megatron's
    """A ShardedTensor, or what makes two of a gated layer's."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    before, dim = len(offsets), part.partition_dim
    replica = _replica(part, metadata)
    if part.by_expert:
        from megatron.core import parallel_state

        group = parallel_state.get_expert_model_parallel_group()
        offsets = (*offsets, (before, group.rank(), group.size()))
    make = partial(ShardedTensor.from_rank_offsets, prepend_axis_num=before)
    if dim is None:
        return make(key, part.parameter, *offsets, replica_id=replica)
    axis, rank, size = before + dim, part.base.rank, part.base.size
    if not part.gated:
        return make(key, part.parameter, *offsets, (axis, rank, size), replica_id=replica)
    apart = bool(metadata.get("singleton_local_shards"))  # then every expert has keys of its own

    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened: slice | None) -> list[Any]:  # noqa: ANN401
        del flattened
        # As Megatron names and places the halves of the base weight.
        names = (f"{key}_w", f"{key}_v") if apart else (key, key)
        places = [(axis, rank, size)] * 2 if apart else [(axis, rank, 2 * size), (axis, size + rank, 2 * size)]
        halves = tensor.detach().chunk(2, dim)
        return [
            make(name, half, *offsets, place, replica_id=replica_id)
            for name, half, place in zip(names, halves, places, strict=True)
        ]

    return ShardedTensorFactory(key, part.parameter, build, partial(_joined, dim=dim), replica)


def _joined(halves: Sequence[torch.Tensor], *, dim: int) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(list(halves), dim)


def _replica(part: Stored, metadata: dict[str, Any]) -> tuple[int, int, int]:
    """Which of the ranks with the same numbers this is: all zero on exactly one of them."""
    from megatron.core import parallel_state

    tensor = 0
    if part.partition_dim is None:
        expert = parallel_state.get_expert_tensor_parallel_rank
        tensor = int(expert() if part.expert else parallel_state.get_tensor_model_parallel_rank())
    if not part.base.experts:  # the owner of a single expert sets the last number itself
        return 0, tensor, int(metadata["dp_cp_group"].rank())
    other = 0 if part.by_expert else int(parallel_state.get_expert_model_parallel_rank())
    return other, tensor, int(parallel_state.get_expert_data_parallel_rank())
