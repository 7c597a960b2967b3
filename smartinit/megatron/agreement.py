"""What all ranks must do together: fail together, and tell each other a few words.

Without a default process group, or alone in it, nothing is exchanged.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from smartinit import errors
from smartinit.adapters.parallel.initial import collective_device
from smartinit.distributed.reduce import world_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_MOST_WORDS = 4000  # characters of an error's message that the other ranks are told


def own_rank() -> int:
    """This process's number in the default process group; 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def everyone(text: str) -> list[str]:
    """What each rank says, by rank; collective."""
    if world_size() == 1:
        return [text]
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return [bytes(row.tolist()).decode() for row in _of_all(data)]


def every_number(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers (64 bit, as many as a rank likes) of each rank, by rank; collective."""
    if world_size() == 1:
        return [list(numbers)]
    return [row.tolist() for row in _of_all(torch.tensor(list(numbers), dtype=torch.int64))]


@contextmanager
def failing_together() -> Iterator[None]:
    """If the block fails on one rank, it fails on all, with one message; collective.

    Raises:
        SmartinitError: on the ranks that did not fail themselves, of the class that the other one met.
    """
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:  # told to the others first: they must not wait for this rank
        failed = error
        raise
    finally:
        said = everyone(_words(failed))
    for rank, words in enumerate(said):
        if words:
            told = json.loads(words)
            kind = getattr(errors, told["kind"], None)
            if not isinstance(kind, type) or kind is errors.NonFiniteError:
                kind = errors.SmartinitError
            raise kind(f"on rank {rank}: {told['text']}")


def _words(error: BaseException | None) -> str:
    return "" if error is None else json.dumps({"kind": type(error).__name__, "text": str(error)[:_MOST_WORDS]})


def _of_all(row: torch.Tensor) -> list[torch.Tensor]:
    """Rows of different lengths, from all ranks."""
    device = collective_device()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(row)], device=device))
    longest = max(int(size) for size in sizes)
    if longest == 0:
        return [row.new_empty(0) for _ in sizes]
    padded = torch.zeros(longest, dtype=row.dtype)
    padded[: len(row)] = row
    rows = [torch.empty(longest, dtype=row.dtype, device=device) for _ in sizes]
    dist.all_gather(rows, padded.to(device))
    return [one[: int(size)].cpu() for one, size in zip(rows, sizes, strict=True)]
