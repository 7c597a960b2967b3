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

    from smartinit.reuse.data import OfferedData, Unit
    from smartinit.reuse.keeping import Keeper

_NOTED = {"called", "data", "batches", "tokens", "bad_batches"}
_MOST = 64  # runs that are looked at; there is one for each length of the data that was ever asked for


@dataclass(frozen=True)
class Runs:
    """Passes over rows that begin alike, under one policy.

    Attributes:
        keeper: the store.
        policy: see `smartinit.reuse.identity.Identity.policy`.
        data: what may be read now.
        unit: what of them is named and counted.
    """

    keeper: Keeper
    policy: Mapping[str, Any]
    data: OfferedData
    unit: Unit

    def matching(self) -> list[Run]:
        """Those whose rows are the first of the data at hand; the longest first."""
        found = []
        for name in self.keeper.keys(self._tag)[:_MOST]:
            meta = self.keeper.meta(name)
            if isinstance(meta.get("rows"), int) and {"called", "data", "batches", "tokens", "bad_batches"} <= set(
                meta
            ):
                found.append(meta)
        runs = []
        for meta in sorted(found, key=lambda one: int(one["rows"])):  # the data are read once, forwards
            rows = int(meta["rows"])
            if meta["called"] in self.data.names(rows, self.unit):
                runs.append(Run(rows, str(meta["data"]), self.data.ends_after(rows, self.unit), meta))
        return runs[::-1]

    def keep(self, rows: int, counts: Mapping[str, Any]) -> Run | None:
        """Note a pass; None if the data are not what they were.

        Args:
            rows: how many of the unit it read, on all ranks.
            counts: of batches and tokens, for the record.
        """
        names = self.data.names(rows, self.unit)
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
        return Run(rows, str(meta["data"]), self.data.ends_after(rows, self.unit), meta)

    @property
    def _tag(self) -> str:
        return "run-" + Key("first row", {**self.policy, "row": self.data.first(self.unit)}).digest[:40]
