"""Rows from files or the hub, tokenised as a trainer would, in padded batches.

`read_batches` is the way in; `load_rows` alone gives a `datasets.Dataset`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smartinit.data.batches import Batches
    from smartinit.data.files import load_rows
    from smartinit.data.reading import read_batches
    from smartinit.data.sampling import Sampling

__all__ = ["Batches", "Sampling", "load_rows", "read_batches"]

_HOME = {"Batches": "batches", "load_rows": "files", "read_batches": "reading", "Sampling": "sampling"}


def __getattr__(name: str) -> object:
    """Import on first use: paths are checked before `datasets` and torch are loaded."""
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
