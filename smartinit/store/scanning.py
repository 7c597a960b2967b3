"""Looking through folders of very many files."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_PART = 8192


def scan(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """What is in a folder; nothing if there is none.

    In parts of some thousands that are sorted by their place on the disk: names come in an order that is random to it,
    and reading files in that order is many times slower wherever they are not in memory already.

    Raises:
        OSError: it cannot be listed.

    Cost: memory for one part, a few MB.
    """
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as items:
        while part := sorted(islice(items, _PART), key=os.DirEntry.inode):
            yield from part
