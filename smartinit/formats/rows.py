"""In which order the ranks of a tensor-parallel layer hold the rows of its weight.

The order of the whole is that of a single process: what is computed of it, or stored, does not depend on how many
ranks there are. Rank k of t holds its k-th part of it; of a gated layer (Megatron's ``linear_fc1`` of SwiGLU and its
relatives, whose rows are those of the gate and then those of the up projection) it holds the k-th part of each half,
``[gate_k; up_k]``. The rows of ``linear_qkv`` are grouped by query group, which one cut does not tear apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


def row_ranges(rows: int, rank: int, size: int, *, gated: bool = False) -> list[range]:
    """Which rows of the whole one rank holds, as ranges in the order in which it holds them.

    Raises:
        ConfigError: they cannot be shared evenly.
    """
    blocks = 2 if gated else 1
    if rows % (blocks * size):
        halves = "each half of " if gated else ""
        raise ConfigError(f"{halves}{rows} rows cannot be shared evenly by {size} tensor-parallel ranks")
    block, part = rows // blocks, rows // blocks // size
    return [range(i * block + rank * part, i * block + (rank + 1) * part) for i in range(blocks)]


def shard_rows(whole: torch.Tensor, rank: int, size: int, *, gated: bool = False, dim: int = 0) -> torch.Tensor:
    """One rank's rows of a whole tensor (along ``dim``); with one rank the tensor itself.

    Raises:
        ConfigError: they cannot be shared evenly.
    """
    if size == 1:
        return whole
    ranges = row_ranges(whole.shape[dim], rank, size, gated=gated)
    return torch.cat([whole.narrow(dim, part.start, len(part)) for part in ranges], dim)


def join_rows(shards: Sequence[torch.Tensor], *, gated: bool = False, dim: int = 0) -> torch.Tensor:
    """The inverse of `shard_rows`: the whole from the shards of all ranks in their order."""
    if len(shards) == 1:
        return shards[0]
    if not gated:
        return torch.cat(list(shards), dim)
    halves = [shard.chunk(2, dim) for shard in shards]
    return torch.cat([half[i] for i in range(2) for half in halves], dim)
