"""The power fails: what was flushed is there, of the rest anything may be (see power.py)."""

from __future__ import annotations

import random
import shutil
import warnings

import pytest
from faulty import Steps, audit, entry_files, watched
from power import ALL, FLUSHED, NOTHING, Disk

from smartinit.store import durable
from smartinit.store.local import LocalStore

HOW = [FLUSHED, ALL, NOTHING, "anything"]


class Recorded:
    """A session with a store, and how often to stop in it."""

    def __init__(self, ram, session):
        self.ram, self.session = ram, session

    def crashes(self, how, random_):
        """After each step: what is on the disk, and what had been acknowledged by then."""
        root = self.ram / "running"
        root.mkdir()
        disk, acknowledged, found = Disk(root), {}, 0
        crashed = self.ram / "crashed"
        pending = []

        def after(name, args, result):
            disk.heard(name, args, result)
            disk.crash(crashed, how, random_)
            pending.append(1)
            check(crashed / "store", acknowledged)
            shutil.rmtree(crashed)

        with watched(Steps(lambda *_: None, after)):
            durable._kept.clear()
            self.session(LocalStore(root / "store"), acknowledged)
        found = len(pending)
        shutil.rmtree(root)
        return found


def check(root, acknowledged):
    """In another store object, whose steps are not recorded."""
    steps, durable.os = durable.os, __import__("os")
    opener = durable.open
    del durable.open
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken marks of use and the like
            store = LocalStore(root)
            for number in range(4):
                key = f"k{number}"
                entry = store.get(key, tensors=False)
                allowed = acknowledged.get(key, [None, entry_files(number)])
                got = None if entry is None else {name: path.read_bytes() for name, path in entry.files.items()}
                assert got in allowed, f"{key}: {'absent' if got is None else 'other bytes'}"
                if entry is not None:
                    entry.close()
            tagged = set(store.keys("all"))
            assert {key for key, allowed in acknowledged.items() if None not in allowed} <= tagged
            store.put("k3", files=entry_files(3))
            again = store.get("k3", tensors=False)
            assert again is not None
            assert again.files["own"].read_bytes() == entry_files(3)["own"]
            again.close()
        assert [problem for problem in audit(root) if "other bytes" in problem] == []
    finally:
        durable.os, durable.open = steps, opener


def puts(store, acknowledged):
    for number in range(2):
        store.put(f"k{number}", files=entry_files(number), tags=["all"])
        acknowledged[f"k{number}"] = [entry_files(number)]
    store.put("k0", files=entry_files(0))
    acknowledged["k0"] = [entry_files(0), entry_files(5)]  # from now on either
    store.put("k0", files=entry_files(5), tags=["all"], replace=True)
    acknowledged["k0"] = [entry_files(5)]
    acknowledged["k1"] = [entry_files(1), None]
    store.remove("k1")
    store.put("k1", files=entry_files(1), tags=["all"])
    acknowledged["k1"] = [entry_files(1)]


def behind_another(store, acknowledged):
    """Another process has done the same, but was stopped before any flush of a folder."""
    real = durable.flush_folder
    durable.flush_folder = lambda _folder: None
    store.put("k0", files=entry_files(0), tags=["all"])
    durable.flush_folder = real
    durable._kept.clear()  # what that process knows
    store = LocalStore(store.layout.root)
    store.put("k0", files=entry_files(0), tags=["all"])
    acknowledged["k0"] = [entry_files(0)]
    store.put("k1", files=entry_files(1), tags=["all"])
    acknowledged["k1"] = [entry_files(1)]


@pytest.mark.parametrize("session", [puts, behind_another])
@pytest.mark.parametrize("how", HOW)
def test_what_was_acknowledged_is_there_and_nothing_is_wrong(ram, how, session, times, tally, seed):
    random_ = random.Random(seed)
    crashes = sum(Recorded(ram, session).crashes(how, random_) for _ in range(times(1, 10) if how == "anything" else 1))
    assert crashes > 100
    tally(fault=f"power loss: {how}, {session.__name__.replace('_', ' ')}", crashes=crashes)
