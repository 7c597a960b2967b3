from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "megatron"))

from ranks import Ranks
from reuse_cases import batches, forward, model

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["batches", "forward", "model", "two_ranks"]


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[Ranks]:
    """A gloo group of two processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()
