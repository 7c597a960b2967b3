"""Which passes over these very rows the store knows of.

A pass may end before the data do, once its layers have settled; so what it read is known only afterwards, and a later
call reads just as many rows to see whether they are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from smartinit.reuse.statistics import Run
from smartinit.store.keys import Key

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smartinit.reuse.data import OfferedData
    from smartinit.reuse.keeping import Keeper

_MOST = 64  # runs that are looked at; there is one for each length of the data that was ever asked for


@dataclass(frozen=True)
class Runs:
    """Passes over rows that begin alike, under one policy.

    Attributes:
        keeper: the store.
        policy: see `smartinit.reuse.identity.Identity.policy`.
        data: what may be read now.
    """

    keeper: Keeper
    policy: Mapping[str, Any]
    data: OfferedData

    def matching(self) -> list[Run]:
        """Those whose rows are the first of the data at hand; the longest first."""
        found = []
        for name in self.keeper.keys(self._tag)[:_MOST]:
            manifest = self.keeper.store.peek(name)
            if manifest is None:
                continue
            rows, called = int(manifest.meta["rows"]), str(manifest.meta["called"])
            found.append((rows, called, manifest.meta))
        runs = []
        for rows, called, meta in sorted(found, key=lambda one: one[0]):  # the data are read once, forwards
            if called in self.data.digests(rows):
                runs.append(Run(rows, str(meta["data"]), self.data.ends_after(rows), meta))
        return runs[::-1]

    def keep(self, rows: int, counts: Mapping[str, Any]) -> Run | None:
        """Note a pass; None if the data are not what they were.

        Args:
            rows: how many it read, on all ranks.
            counts: of batches and tokens, for the record.
        """
        names = self.data.digests(rows)
        if not names:
            return None
        meta = {**counts, "rows": rows, "data": names[0]}
        for name in dict.fromkeys(names):
            key = Key("run", {**self.policy, "rows": rows, "digest": name})
            there = self.keeper.peek(key)
            if there is not None:
                meta = {**meta, "data": there.meta["data"]}
        for name in dict.fromkeys(names):
            key = Key("run", {**self.policy, "rows": rows, "digest": name})
            self.keeper.put(key, meta={**meta, "called": name}, tags=[self._tag])
        return Run(rows, str(meta["data"]), self.data.ends_after(rows), meta)

    @property
    def _tag(self) -> str:
        return "run-" + Key("first row", {**self.policy, "row": self.data.first}).digest[:40]
