"""Passes over data that several ranks make in step, and how many there may be."""

from __future__ import annotations

from collections.abc import Sized
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from smartinit.distributed.reduce import any_rank, failing_rank
from smartinit.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    import torch

    from smartinit.activations.sites import Site

_NO_BATCH = object()
_MOST_BATCHES = 10_000


@dataclass(frozen=True)
class RanksInStep:
    """Keeps the ranks of a data-parallel run in step, so that none waits for another for ever.

    What is exchanged per pass has one length on all ranks: one flag per target, whatever sites a rank has seen.
    """

    device: torch.device
    exchange: bool

    def together(self, batches: Iterable[Any], most: int | None = None) -> Iterator[Any]:
        """The batches, ``most`` of them, until the first rank has none left.

        Each is fetched, and the ranks tell each other so, before any of them runs its own: no rank begins a forward
        pass in which another one, whose data fail, would be missing.

        Raises:
            DataError: the data of another rank failed; of this one: what they raise.
        """
        stream: Iterator[Any] | None = None
        while True:
            failed, batch = True, _NO_BATCH
            try:
                if stream is None:
                    stream = islice(batches, most)
                batch = next(stream, _NO_BATCH)
                failed = False
            finally:
                rank, over = self._said(failed, over=batch is _NO_BATCH)
            if rank is not None:
                raise _elsewhere(rank)
            if over:
                return
            yield batch

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """If the block fails on one rank, it fails on all: the others must not wait in the next exchange.

        Raises:
            DataError: on the ranks that did not fail themselves.
        """
        failed = True
        try:
            yield
            failed = False
        finally:
            rank, _ = self._said(failed)
        if rank is not None:
            raise _elsewhere(rank)

    def _said(self, failed: bool, *, over: bool = False) -> tuple[int | None, bool]:
        """Of all ranks: one that failed, and whether any is over."""
        return failing_rank(failed, self.device, over=over) if self.exchange else (None, over)

    def agree_on_open(self, sites: Sequence[Site], names: Sequence[str]) -> bool:
        """A site stays open while any rank needs it: all ranks end their passes at the same layer.

        Returns:
            Whether any target needs more data; one that has not run yet does.
        """
        is_open = dict.fromkeys(names, True) | {name: site.open for site in sites for name in site.names}
        if self.exchange:
            is_open = dict(zip(names, any_rank([is_open[name] for name in names], self.device), strict=True))
            for site in sites:
                site.open = any(is_open[name] for name in site.names)
        return any(is_open.values())


def _elsewhere(rank: int) -> DataError:
    return DataError(f"another rank failed; the message of rank {rank} says why")


def length_of(batches: Iterable[Any]) -> int | None:
    """Number of batches where it is known: a `DataLoader` of a stream has ``__len__``, which raises."""
    try:
        return len(batches) if isinstance(batches, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def most_passes(batches: Iterable[Any], max_batches: int | None) -> int | None:
    """Most passes: as asked, or the data's own length; a stream of unknown length may have no end."""
    return _MOST_BATCHES if max_batches is None and length_of(batches) is None else max_batches


def expected_passes(batches: Iterable[Any], max_batches: int | None) -> int | None:
    """How many passes there will be at most, where it is known: for a progress bar."""
    bounds = [bound for bound in (length_of(batches), max_batches) if bound is not None]
    return min(bounds, default=None)
