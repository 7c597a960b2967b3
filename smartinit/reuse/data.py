"""Which data a computation reads, by content: looked at before it, and while it runs.

What may be another sequence every time that it is iterated is iterated once: what the look-up has read is kept, and the
first pass begins with that and reads on.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from smartinit.activations.data_digest import RowLog, global_orders
from smartinit.distributed.passes import most_passes
from smartinit.distributed.reduce import any_rank, exchange_bytes
from smartinit.errors import ConfigError
from smartinit.reuse.random_stream import RandomStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

Unit = Literal["rows", "batches"]
"""What is counted and named: rows without their padding, or batches as they are where padding or batching matters."""

_DIGEST = 32  # bytes of a digest


@dataclass(frozen=True)
class _Share:
    """What one rank offers: digests of its rows and batches, and how many rows each batch has."""

    rows: list[bytes]
    sizes: list[int]
    batches: list[bytes]

    def first(self, passes: int) -> _Share:
        """Of the first batches."""
        sizes = self.sizes[:passes]
        return _Share(self.rows[: sum(sizes)], sizes, self.batches[:passes])


class OfferedData:
    """What a call may read, in order; only as much is looked at as the questions need.

    Data-parallel ranks offer what they have together, in each of the orders in which one sequence is dealt out to
    ranks: so the same rows are found again at another world size. They read all they may before the first question.

    Args:
        dataloader: what can be iterated.
        max_batches: bound on batches.
    """

    def __init__(self, dataloader: Iterable[Any], max_batches: int | None) -> None:
        self._loader = dataloader
        self._most = most_passes(dataloader, max_batches)
        self._kept: list[Any] | None = None if _repeatable(dataloader) else []
        self._log = RowLog()
        self._random = RandomStream()
        self._stream: Iterator[Any] | None = None
        self._over = False
        self._error: Exception | None = None
        self._ranks: list[_Share] | None = None
        self.problem: str | None = None
        """Why the data have no name; None if they have, as far as they were looked at."""

    def look(self) -> None:
        """Read the first batch."""
        self._read_to(1, "batches")

    def share(self, device: torch.device) -> None:
        """Read everything, and learn what the other ranks offer; collective.

        Args:
            device: where the process group can send from.
        """
        while self._read():
            pass
        bad = any_rank([self.problem is not None], device)[0]
        if bad:
            self.problem = self.problem or "the data of another rank have no name"
            return
        own = self._own()
        parts = [b"".join(own.rows), b"".join(size.to_bytes(8, "little") for size in own.sizes), b"".join(own.batches)]
        rows, sizes, batches = (exchange_bytes(part, device) for part in parts)
        shares = [
            _Share(_cut(one, _DIGEST), [int.from_bytes(size, "little") for size in _cut(two, 8)], _cut(three, _DIGEST))
            for one, two, three in zip(rows, sizes, batches, strict=True)
        ]
        passes = min(len(share.sizes) for share in shares)  # ranks go in step, until the first has no more
        self._ranks = [share.first(passes) for share in shares]

    def first(self, unit: Unit) -> str:
        """Digest of the first row or batch; empty without data."""
        self._read_to(1, unit)
        for share in self._shares():
            found = share.rows if unit == "rows" else share.batches
            if found:
                return found[0].hex()
        return ""

    def names(self, count: int, unit: Unit) -> list[str]:
        """What the first rows or batches may be called, the usual name first; empty if there are not so many."""
        self._read_to(count, unit)
        shares = self._shares()
        if self.problem is not None or count > _total(shares, unit):
            return []
        if len(shares) == 1:
            part = [shares[0].rows[:count] if unit == "rows" else shares[0].batches[:count]]
            return global_orders(part)
        counts = [0, *map(sum, zip(*(accumulate(share.sizes) for share in shares), strict=True))]
        passes = count // len(shares) if unit == "batches" else _index(counts, count)
        some = [share.first(passes) for share in shares if passes is not None]
        if not some or _total(some, unit) != count:
            return []
        if unit == "batches":
            return global_orders([share.batches for share in some])
        return global_orders([share.rows for share in some], [share.sizes for share in some])

    def ends_after(self, count: int, unit: Unit) -> bool:
        """Whether there are exactly so many."""
        self._read_to(count + 1, unit)
        return self.problem is None and _total(self._shares(), unit) == count

    def first_pass(self) -> Watched:
        """The batches, to be used in place of the data loader."""
        return Watched(self, self._loader)

    def used(self, watched: Watched, passes: int | None, unit: Unit, device: torch.device) -> int | None:
        """How many rows or batches, on all ranks, a pass has read; None if they have no name. Collective.

        Args:
            watched: what the pass iterated over.
            passes: batches that counted; None: all.
            unit: what to count.
            device: where the process group can send from.

        Warns:
            UserWarning: the data loader gave other batches than when it was looked at.
        """
        passes = watched.log.batches if passes is None else passes
        self._read_to(passes, "batches")
        ours, theirs = self._own().first(passes), _share_of(watched.log).first(passes)
        other = self.problem is not None or ours != theirs
        if any_rank([other], device)[0] if self._ranks is not None else other:
            warnings.warn(
                "the data loader gives other batches every time that it is iterated (it shuffles, or its rows change), "
                "or they have no content that can be named, so what was computed from them could not be found again, "
                "and is not stored; pass shuffle=False",
                stacklevel=7,
            )
            return None
        return _total([share.first(passes) for share in self._shares()], unit)

    def begin(self) -> Iterator[Any]:
        """The batches of a pass: what was read and kept, then the rest."""
        if self._kept is None:
            yield from self._loader
            return
        yield from self._kept
        self._kept = []
        while self._read(keep=True):
            yield self._kept.pop()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """No more questions: workers of the data loader may end."""
        self._over, self._stream, self._kept = True, None, None

    def _shares(self) -> list[_Share]:
        return [self._own()] if self._ranks is None else self._ranks

    def _own(self) -> _Share:
        return _share_of(self._log)

    def _read_to(self, count: int, unit: Unit) -> None:
        if self._ranks is None:
            while (self._log.rows if unit == "rows" else self._log.batches) < count and self._read():
                pass

    def _read(self, *, keep: bool = False) -> bool:
        """One more batch; whether there was one that has a name (or, with ``keep``, any)."""
        if self._over or (self.problem is not None and not keep):
            return False
        with self._random.drawing():  # as the pass would: making an iterator, or a row, may draw random numbers
            if self._stream is None:
                self._stream = iter(islice(self._loader, self._most))
            try:
                batch = next(self._stream)
            except StopIteration:
                self._over = True
                return False
            except Exception as error:  # noqa: BLE001 - whatever a loader raises is raised in the pass
                self._over, self._error, self.problem = True, error, f"the data cannot be read: {error}"
                return False
        if self._kept is not None:
            self._kept.append(batch)
        self.problem = self.problem or _added(self._log, batch)
        return keep or self.problem is None


class Watched:
    """Batches whose digests are taken when a pass fetches them.

    Attributes:
        log: of the latest pass.
    """

    def __init__(self, data: OfferedData, loader: Iterable[Any]) -> None:
        self._data, self._loader = data, loader
        self._begun = False
        self.log = RowLog()

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type]  # raises what len() raises where there is none

    def __iter__(self) -> Iterator[Any]:
        stream = iter(self._loader) if self._begun else self._data.begin()
        self._begun, log = True, RowLog()
        self.log = log
        return self._watch(stream, log)

    def _watch(self, stream: Iterator[Any], log: RowLog) -> Iterator[Any]:
        for batch in stream:
            self._data.problem = self._data.problem or _added(log, batch)
            yield batch


def _added(log: RowLog, batch: object) -> str | None:
    """Take a batch's digests; why that cannot be."""
    try:
        log.add(batch)
    except ConfigError as error:
        return str(error)
    return None


def _repeatable(loader: object) -> bool:
    """Whether every iteration is known to give the same: else one is shared by the look-up and the first pass."""
    if isinstance(loader, DataLoader):
        plain = isinstance(loader.sampler, SequentialSampler) and not isinstance(loader.dataset, IterableDataset)
        return plain and not loader.persistent_workers
    return isinstance(loader, (list, tuple)) or bool(getattr(loader, "repeatable", False))


def _share_of(log: RowLog) -> _Share:
    return _Share(log.digests, log.batch_rows, list(log.whole))


def _total(shares: Sequence[_Share], unit: Unit) -> int:
    return sum(len(share.rows) if unit == "rows" else len(share.batches) for share in shares)


def _index(counts: Sequence[int], count: int) -> int | None:
    """After how many batches of each rank there are so many rows."""
    return counts.index(count) if count in counts else None


def _cut(joined: bytes, size: int) -> list[bytes]:
    return [joined[start : start + size] for start in range(0, len(joined), size)]
