"""Everything that was computed, kept once, by what it was computed from.

    store = Store("cache")
    store.put(key, tensors, meta)        # whole or not at all, whoever is killed when
    entry = store.get(key)               # None: not there, or not sound (then it is put aside and reported)

See `smartinit.store.layout` for the files, `smartinit.store.keys` for what a key is.
"""

from __future__ import annotations

from smartinit.store.keys import Key
from smartinit.store.store import Store

__all__ = ["Key", "Store"]
