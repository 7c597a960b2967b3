from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """A gloo group of two processes."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    """A gloo group of four processes."""
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Both."""
    return request.getfixturevalue("two_ranks" if request.param == 2 else "four_ranks")
