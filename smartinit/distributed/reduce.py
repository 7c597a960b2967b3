"""Merge statistics over data-parallel ranks: each rank sends its summary once, nobody gathers activations."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from smartinit.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smartinit.statistics.base import Statistic


def world_size() -> int:
    """Ranks in the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first_rank() -> bool:
    """Whether this process shows progress and writes files."""
    return world_size() == 1 or dist.get_rank() == 0


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Elementwise *or* over all ranks; one tiny all-reduce."""
    if world_size() == 1:
        return list(flags)
    tensor = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [bool(value) for value in tensor.tolist()]


def failing_rank(failed: bool, device: torch.device, *, over: bool = False) -> tuple[int | None, bool]:
    """Which rank has failed (the last of them), if any, and whether one of them is over; one tiny all-reduce."""
    own = dist.get_rank() + 1 if world_size() > 1 else 1
    tensor = torch.tensor([float(own if failed else 0), float(over)], device=device)
    if world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    rank, end = tensor.tolist()
    return (int(rank) - 1 if rank else None), bool(end)


def exchange_bytes(mine: bytes, device: torch.device) -> list[bytes]:
    """What every rank has, on every rank; two all-gathers of numbers."""
    if world_size() == 1:
        return [mine]
    length = torch.tensor([len(mine)], device=device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    most = max(int(number) for number in lengths)
    if not most:
        return [b""] * len(lengths)
    padded = torch.frombuffer(bytearray(mine.ljust(most, b"\0")), dtype=torch.uint8).to(device)
    every = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(every, padded)
    return [bytes(part.cpu().numpy())[: int(number)] for part, number in zip(every, lengths, strict=True)]


def merge_over_ranks(
    statistics: Sequence[Statistic],
    names: Sequence[str],
    device: torch.device,
    counts: Sequence[bool] | None = None,
) -> list[Statistic]:
    """Give every rank the merged statistics of all ranks, bitwise equal everywhere.

    Every rank merges the same states in the same order, so that no rank has to send a result.

    Args:
        statistics: in the same order on every rank.
        names: what each belongs to, to check that the ranks agree.
        device: where the process group can send from.
        counts: whether this rank's part of each is to be added; False where another rank has seen the same data, as
            tensor-parallel ranks do. None: all are.

    Returns:
        The merged statistics, in the same order.

    Raises:
        ConfigError: the ranks saw different sites.

    Cost: one all-gather of ``O(d q)`` numbers per statistic.
    """
    if world_size() == 1:
        return list(statistics)
    _check_agreement(names, device)
    flags = torch.tensor([float(flag) for flag in counts or [True] * len(names)], device=device)
    added = [torch.empty_like(flags) for _ in range(world_size())]
    dist.all_gather(added, flags)
    out = []
    for index, statistic in enumerate(statistics):
        statistic.settle()
        mine = statistic.state()
        packed = torch.cat([mine[key].reshape(-1).double() for key in sorted(mine)]).to(device)
        gathered = [torch.empty_like(packed) for _ in range(world_size())]
        dist.all_gather(gathered, packed)
        states = [_unpack(flat, mine) for flat, flags in zip(gathered, added, strict=True) if flags[index]]
        merged = type(statistic).from_state(states[0])
        for state in states[1:]:
            merged.merge(type(statistic).from_state(state))
        out.append(merged)
    return out


def _unpack(flat: torch.Tensor, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One rank's state from its flat float64 vector, which holds float32 and counts exactly."""
    out, start = {}, 0
    for key in sorted(like):
        size = like[key].numel()
        out[key] = flat[start : start + size].reshape(like[key].shape).to(like[key])
        start += size
    return out


def _check_agreement(names: Sequence[str], device: torch.device) -> None:
    digest = torch.tensor(list(_fingerprint(names)), dtype=torch.float64, device=device)
    every = [torch.empty_like(digest) for _ in range(world_size())]
    dist.all_gather(every, digest)
    if any(not torch.equal(other, digest) for other in every):
        msg = (
            "the ranks saw different layers run or share inputs, so their statistics cannot be merged; "
            "give every rank batches that run every target, or pass gather_distributed_inputs=False"
        )
        raise ConfigError(msg)


def _fingerprint(names: Sequence[str]) -> bytes:
    return hashlib.sha256("\n".join(names).encode()).digest()
