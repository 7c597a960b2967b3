from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from ranks import Ranks

if TYPE_CHECKING:
    from collections.abc import Iterator


_PROCESSES = {"two_ranks", "four_ranks", "core_ranks", "four_core_ranks"}


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs what needs groups of processes: two workers would start them twice, for two cores."""
    for item in items:
        if _PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ranks"))
