"""Which data a computation reads, by content: looked up before it, and watched while it runs."""

from __future__ import annotations

import warnings
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from smartinit.activations.data_digest import RowDigests, global_orders
from smartinit.activations.state import preserved_rng
from smartinit.distributed.passes import most_passes
from smartinit.distributed.reduce import world_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from smartinit.activations.data_digest import WatchedBatches

_DIGEST = 32  # bytes of one row's


class OfferedData:
    """The rows that a call may read, in order; only as many are looked at as the questions need.

    Data-parallel ranks offer what they have together, in each of the orders in which one sequence is dealt out to
    ranks: so the same rows are found again at another world size.

    Args:
        dataloader: what can be iterated only once is read into memory first.
        max_batches: bound on batches.
        together: whether the ranks of the process group read parts of the same data; all of them call this then.
        device: where the process group can send from.
    """

    def __init__(
        self, dataloader: Iterable[Any], max_batches: int | None, *, together: bool, device: torch.device
    ) -> None:
        most = most_passes(dataloader, max_batches)
        once = iter(dataloader) is dataloader
        self.batches: Iterable[Any] = list(islice(dataloader, most)) if once else dataloader
        self._own = RowDigests(self.batches, most)
        self._ranks: list[tuple[list[bytes], list[int]]] | None = None
        if together and world_size() > 1:
            self._read_all()
            rows = _exchanged([b"".join(self._own.digests)], device)
            sizes = _exchanged([size.to_bytes(8, "little") for size in self._own.batch_rows], device)
            self._ranks = [(_cut(own, _DIGEST), _numbers(cut)) for own, cut in zip(rows, sizes, strict=True)]

    @property
    def first(self) -> str:
        """Digest of the first row; empty without data."""
        if self._ranks is not None:
            return next((rows[0].hex() for rows, _ in self._ranks if rows), "")
        self._at(1)
        return self._own.digests[0].hex() if self._own.rows else ""

    def digests(self, rows: int) -> list[str]:
        """What the first rows may be called, the usual name first; empty if there are not so many."""
        if self._ranks is None:
            found = self._at(rows)
            return [] if found is None else [found]
        each, rest = divmod(rows, len(self._ranks))
        if rest or any(len(own) < each for own, _ in self._ranks):
            return []
        return global_orders([own[:each] for own, _ in self._ranks], [_first(sizes, each) for _, sizes in self._ranks])

    def ends_after(self, rows: int) -> bool:
        """Whether there are exactly so many."""
        if self._ranks is not None:
            return sum(len(own) for own, _ in self._ranks) == rows
        return self._at(rows) is not None and self._at(rows + 1) is None

    @property
    def rows(self) -> int:
        """All of them, on all ranks. Cost: reads everything that is offered."""
        if self._ranks is not None:
            return sum(len(own) for own, _ in self._ranks)
        self._read_all()
        return self._own.rows

    def rows_of(self, used: WatchedBatches, passes: int) -> int | None:
        """How many rows, on all ranks, the first ``passes`` batches of a pass had; None if they were others.

        Warns:
            UserWarning: the data loader gave other batches than when it was asked before.
        """
        rows = sum(used.log.batch_rows[:passes])
        if self._at(rows) != used.log.at_rows(rows):
            warnings.warn(
                "the data loader gives other batches every time that it is iterated (it shuffles, or its rows change), "
                "so what was computed from them could not be found again, and is not stored; pass shuffle=False",
                stacklevel=7,
            )
            return None
        return rows * (1 if self._ranks is None else len(self._ranks))

    def close(self) -> None:
        """No more questions: workers of the data loader may end."""
        self._own.close()

    def _at(self, rows: int) -> str | None:
        # Making an iterator draws a random number: the pass that follows is to find the stream as it was, so that a
        # shuffle under a fixed seed is the same in both.
        with preserved_rng(nn.Identity()):
            return self._own.at_rows(rows)

    def _read_all(self) -> None:
        while self._at(self._own.rows + 1) is not None:
            pass


def _exchanged(parts: Sequence[bytes], device: torch.device) -> list[bytes]:
    """What every rank has, on every rank: two all-gathers of numbers."""
    mine = b"".join(parts)
    length = torch.tensor([len(mine)], device=device)
    lengths = [torch.empty_like(length) for _ in range(world_size())]
    dist.all_gather(lengths, length)
    most = max(int(number) for number in lengths)
    if not most:
        return [b""] * len(lengths)
    padded = torch.frombuffer(bytearray(mine + bytes(most - len(mine))), dtype=torch.uint8).to(device)
    every = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(every, padded)
    return [bytes(part.cpu().numpy())[: int(number)] for part, number in zip(every, lengths, strict=True)]


def _cut(joined: bytes, size: int) -> list[bytes]:
    return [joined[start : start + size] for start in range(0, len(joined), size)]


def _numbers(joined: bytes) -> list[int]:
    return [int.from_bytes(part, "little") for part in _cut(joined, 8)]


def _first(sizes: Sequence[int], rows: int) -> list[int]:
    """Sizes of the batches that hold the first rows; the last one may be cut."""
    out: list[int] = []
    for size in sizes:
        left = rows - sum(out)
        if left <= 0:
            break
        out.append(min(size, left))
    return out
