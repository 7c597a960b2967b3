from __future__ import annotations

import os
import time
import tracemalloc

import pytest

from smartinit.errors import StoreError
from smartinit.store import Key, Store
from smartinit.store.listing import list_entries, stored_bytes


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_what_is_said_of_an_entry(store):
    key = Key("spectrum", {"method": "eva", "layer": "model.layers.0", "options": {"rho": 2}, "weight": "ef" * 32})
    before = time.time()
    store.put(key, files={"a": b"x" * 100, "b": b"y" * 50}, meta={"limit": 16, "model": "ab" * 32, "settled": True})
    (listed,) = list_entries(store.local.layout)
    assert (listed.key, listed.kind, listed.size) == (key.digest, "spectrum", 150)
    assert dict(listed.about) == {"method": "eva", "layer": "model.layers.0", "limit": "16", "model": "ab" * 6}
    assert before - 1 <= listed.created <= time.time()
    assert (listed.pinned, listed.leased, listed.problem) == (False, False, None)
    when = listed.used
    assert abs(when - listed.created) < 60
    store.pin(key)
    with store.get(key):
        os.utime(store.local.layout.used / key.digest, (when + 500, when + 500))
        (listed,) = list_entries(store.local.layout)
    assert (listed.pinned, listed.leased, listed.used) == (True, True, when + 500)


def test_files_are_counted_once(store):
    assert stored_bytes(store.local.layout) == 0
    for name in "ab":
        store.put(name, files={"own": name.encode() * 10, "shared": b"s" * 100})
    assert stored_bytes(store.local.layout) == 120
    assert sum(listed.size for listed in list_entries(store.local.layout)) == 220


def test_strange_files_are_no_entries_and_broken_ones_are_named(store):
    store.put("a", meta={"x": 1})
    store.put("b", meta={"x": 1})
    layout = store.local.layout
    (layout.entries / "NO KEY.json").write_bytes(b"x")
    (layout.entries / "c.tmp").write_bytes(b"x")
    os.truncate(layout.entry("b"), 20)
    found = {listed.key: listed.problem for listed in list_entries(layout)}
    assert found.keys() == {"a", "b"}
    assert found["a"] is None
    assert "cut off" in found["b"]
    assert layout.entry("b").exists(), "listing changes nothing"


def test_an_entry_that_goes_meanwhile_is_left_out(store):
    for index in range(5):
        store.put(f"k{index}", meta={})
    listing = list_entries(store.local.layout)
    first = next(listing).key
    for key in {*store.keys()} - {first}:
        store.local.remove(key)
    assert list(listing) == []


def test_no_store_and_one_that_cannot_be_listed(store, monkeypatch):
    assert list(list_entries(store.local.layout)) == []
    store.put("a", meta={})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("entries"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StoreError, match="cannot list the store"):
        list(list_entries(store.local.layout))


def test_memory_does_not_grow_with_entries(store, monkeypatch):
    """Entries are handed out one at a time."""
    from smartinit.store.manifest import Manifest

    store.put("first", meta={})
    for index in range(2000):
        name = f"entry-{index}"
        content = Manifest(key=name, blobs={}, leaves={"layer": "x" * 500}).to_bytes()
        store.local.layout.entry(name).write_bytes(content)
    peaks = []
    monkeypatch.setattr("smartinit.store.scanning._PART", 100)
    for most in (200, 2001):
        tracemalloc.start()
        for index, _ in enumerate(list_entries(store.local.layout)):
            if index + 1 == most:
                break
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000
