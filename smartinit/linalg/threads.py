"""One CPU thread for small dense problems."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def one_thread() -> Iterator[None]:
    """Run the block with one intra-op thread, then restore.

    LAPACK's eigensolver on a 48×48 matrix takes five times longer with two threads than with one: the
    threads spend the time waiting for each other.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
