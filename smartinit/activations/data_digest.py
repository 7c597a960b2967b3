"""Which rows a data loader gave, by their content: nothing of a batch is kept but 32 bytes per row.

A row is one sample: the same samples in batches of another size, padded to another length at the end, have the same
digests. The order counts.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from itertools import accumulate, chain, zip_longest
from typing import TYPE_CHECKING, Any

from smartinit.activations.row_content import batch_digest, row_digests

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_SIZE = 32  # bytes of a sha256


class RowLog:
    """Digests of the rows of some batches, in order.

    Args:
        label_mask_value: of labels that do not count.
    """

    def __init__(self, label_mask_value: int = -100) -> None:
        self._ignored = label_mask_value
        self._rows = bytearray()
        self._ends: list[int] = []
        self.whole: list[bytes] = []
        """One sha256 per batch so far, of the batch as it is: padding and all."""

    @property
    def rows(self) -> int:
        """Rows so far."""
        return len(self._rows) // _SIZE

    @property
    def batches(self) -> int:
        """Batches so far."""
        return len(self._ends)

    @property
    def digests(self) -> list[bytes]:
        """One sha256 per row so far."""
        return [bytes(self._rows[start : start + _SIZE]) for start in range(0, len(self._rows), _SIZE)]

    @property
    def batch_rows(self) -> list[int]:
        """Rows of each batch so far."""
        return [end - start for start, end in zip([0, *self._ends], self._ends, strict=False)]

    def add(self, batch: Any) -> None:  # noqa: ANN401 - whatever the data loader yields
        """One more batch.

        Raises:
            ConfigError: something in it has no content digest.
        """
        rows = b"".join(row_digests(batch, self.batches, self._ignored))
        self.whole.append(batch_digest(batch, self.batches))
        self._rows += rows
        self._ends.append(self.rows)

    def at_rows(self, count: int) -> str | None:
        """Sha256 over the first ``count`` rows; None if there are fewer."""
        if count > self.rows:
            return None
        return hashlib.sha256(memoryview(self._rows)[: count * _SIZE]).hexdigest()

    def at_batches(self, count: int) -> str | None:
        """Sha256 over the rows of the first ``count`` batches; None if there are fewer."""
        if count > self.batches:
            return None
        return self.at_rows(self._ends[count - 1] if count else 0)


class RowDigests(RowLog):
    """The rows that a data loader gives, read as far as they are asked about; what was read is not read again.

    Iterating over a data loader draws from torch's random numbers, so that one which shuffles gives another order each
    time.

    Args:
        batches: iterated once.
        max_batches: the data end after so many.
        label_mask_value: of labels that do not count.
    """

    def __init__(self, batches: Iterable[Any], max_batches: int | None = None, *, label_mask_value: int = -100) -> None:
        super().__init__(label_mask_value)
        self._source: Iterable[Any] | None = batches
        self._stream: Iterator[Any] | None = None
        self._most = max_batches
        self.one_shot = isinstance(batches, Iterator)
        """Whether the batches are gone once they were looked at: who needs them too must keep them himself."""

    def at_rows(self, count: int) -> str | None:
        """As of `RowLog`, of all the data; reads on as far as necessary."""
        while self.rows < count and self._read():
            pass
        return super().at_rows(count)

    def at_batches(self, count: int) -> str | None:
        """As of `RowLog`, of all the data; reads on as far as necessary."""
        while self.batches < count and self._read():
            pass
        return super().at_batches(count)

    def first(self, count: int) -> str:
        """Sha256 over the rows of the first ``count`` batches, or of all if there are fewer."""
        found = self.at_batches(count)
        return found if found is not None else str(self.at_rows(self.rows))

    def ends_after(self, rows: int) -> bool:
        """Whether the data have exactly so many rows; reads one batch more than those at most."""
        return self.at_rows(rows + 1) is None and self.rows == rows

    def close(self) -> None:
        """Read no more: the data loader's workers may end."""
        self._source = self._stream = None

    def _read(self) -> bool:
        """Whether there was one more batch."""
        if self._source is None or (self._most is not None and self.batches >= self._most):
            self.close()
            return False
        if self._stream is None:
            self._stream = iter(self._source)
        for batch in self._stream:
            self.add(batch)
            return True
        self.close()
        return False


def global_orders(ranks: Sequence[Sequence[bytes]], batch_rows: Sequence[Sequence[int]] | None = None) -> list[str]:
    """Digests of all rows in the orders in which several data-parallel ranks may have shared one sequence.

    Row by row (DistributedSampler), batch by batch (accelerate), one block after the other. One of them is what a
    single process, or another number of ranks, has for the same sequence. Rows that a sampler repeats to make the ranks
    equal are rows like others.

    Args:
        ranks: of each rank, the digests of its rows: `RowLog.digests`.
        batch_rows: of each rank, the rows of its batches: `RowLog.batch_rows`; without it there is no order by batches.

    Returns:
        Sha256 digests as of `RowLog.at_rows`, equal ones once.
    """
    orders = [_by_turns(ranks), b"".join(map(b"".join, ranks))]
    if batch_rows is not None:
        cut = []
        for rows, sizes in zip(ranks, batch_rows, strict=True):
            ends = list(accumulate(sizes))
            cut.append([b"".join(rows[end - size : end]) for end, size in zip(ends, sizes, strict=True)])
        orders.insert(1, _by_turns(cut))
    return list(dict.fromkeys(hashlib.sha256(order).hexdigest() for order in orders))


def callable_key(function: Callable[..., Any] | None) -> str | None:
    """What stands for a user's function in a key; None if nothing says when it changes, so that nothing can be stored.

    Functions of this package: their name. Any other: its attribute ``store_key``, a text which its author changes with
    what it does. No function: ``"none"``.
    """
    if function is None:
        return "none"
    module, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
    # A wrapper may carry the name of what it wraps (functools.wraps): only what is found under the name is that.
    if module.partition(".")[0] == "smartinit" and getattr(sys.modules.get(module), name, None) is function:
        return f"{module}:{name}"
    key = getattr(function, "store_key", None)
    return f"store_key:{key}" if isinstance(key, str) else None


def _by_turns(ranks: Sequence[Sequence[bytes]]) -> bytes:
    return b"".join(filter(None, chain.from_iterable(zip_longest(*ranks))))
