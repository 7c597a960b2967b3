"""Clocks that go back, or forward by years, or differ between machines: nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial

import pytest
from faulty import audit, entry_files

from smartinit.store import durable
from smartinit.store.leases import leased_keys, take_lease
from smartinit.store.local import LocalStore
from smartinit.store.owner import FOREIGN_SECONDS
from smartinit.store.prune import plan_prune

YEAR = 365 * 86400.0
TIMES = {
    "1970": 0.0,
    "ten_years_ago": -10 * YEAR,
    "an_hour_ago": -3600.0,
    "in_an_hour": 3600.0,
    "in_ten_years": 10 * YEAR,
}


@pytest.fixture
def store(ram):
    return LocalStore(ram / "store")


def at(name, began=None):
    return 1.0 if name == "1970" else (time.time() if began is None else began) + TIMES[name]


def whole(store, number):
    with store.get(f"k{number}", tensors=False) as entry:
        return {name: bytes(entry.content(name)) for name in entry.files} == entry_files(number)


@pytest.mark.parametrize("then", TIMES)
@pytest.mark.parametrize("now", TIMES)
def test_entries_survive_every_jump(store, then, now, monkeypatch, tally):
    began = time.time()
    monkeypatch.setattr(time, "time", partial(at, then, began))
    store.put("k0", files=entry_files(0), tags=["all"])
    for path in (path for path in store.layout.root.rglob("*") if path.is_file()):
        os.utime(path, (at(then), at(then)))
    monkeypatch.setattr(time, "time", partial(at, now, began))
    assert whole(store, 0)
    store.put("k1", files=entry_files(1), tags=["all"])
    store.put("k0", files=entry_files(0), tags=["all"])
    plan_prune(store).execute()
    assert whole(store, 0)
    assert whole(store, 1)
    assert sorted(store.keys("all")) == ["k0", "k1"]
    assert audit(store.layout.root) == []
    tally(fault="clock jumps between two of 1970, ten years and an hour ago, in an hour, in ten years", jumps=1, lost=0)


@pytest.mark.parametrize("step", ["write_new", "publish", "publish_once", "flush_folder"])
def test_a_put_goes_on_when_pruning_believes_that_ten_years_have_passed(store, step, monkeypatch):
    """Everything unfinished and unnamed is old then, also what is being written: it is written again."""
    store.put("k0", files=entry_files(0))
    real, left = getattr(durable, step), [2]

    def then_prune(*args, **options):
        result = real(*args, **options)
        left[0] -= 1
        if left[0] == 0:
            with monkeypatch.context() as patch:
                patch.setattr(durable, step, real)
                plan_prune(store, now=time.time() + 10 * YEAR).execute()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(durable, step, then_prune)
        for number in (1, 2):
            store.put(f"k{number}", files=entry_files(number))
    assert left[0] <= 0, "there were so many steps"
    assert all(whole(store, number) for number in range(3))
    assert audit(store.layout.root) == []


@pytest.mark.parametrize("name", TIMES)
def test_a_lease_of_a_living_process_counts_at_any_time(store, name):
    store.put("k0", files=entry_files(0))
    lease = take_lease(store.layout, "k0")
    os.utime(lease.path, (at(name), at(name)))
    for now in TIMES:
        assert leased_keys(store.layout, now=at(now)) == {"k0"}
    lease.release()
    assert leased_keys(store.layout) == set()


@pytest.mark.parametrize(
    ("age", "counts"),
    [(0, True), (FOREIGN_SECONDS - 60, True), (FOREIGN_SECONDS + 60, False), (-3600, True), (-10 * YEAR, False)],
)
def test_another_machines_lease_counts_for_a_day_by_any_clock(store, age, counts):
    store.put("k0", files=entry_files(0))
    lease = store.layout.leases / "k0.elsewhere-1.123.abcd"
    durable.touch(lease)
    os.utime(lease, (time.time() - age, time.time() - age))
    assert leased_keys(store.layout) == ({"k0"} if counts else set())
    assert lease.exists() is counts


def test_a_lease_of_a_process_that_has_ended_goes(store):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        child = process.pid
    host = take_lease(store.layout, "k0").path.name.split(".")[1]
    durable.touch(store.layout.leases / f"k1.{host}.{child}.abcd")
    durable.touch(store.layout.leases / f"k2.{host}.{10**30}.abcd")
    assert leased_keys(store.layout) == {"k0"}


def test_a_blob_from_the_future_is_young(store):
    store.put("k0", files=entry_files(0))
    store.remove("k0")
    blobs = [path for path in store.layout.blobs.rglob("*") if path.is_file()]
    for path in blobs:
        os.utime(path, (time.time() + YEAR, time.time() + YEAR))
    plan_prune(store).execute()
    assert all(path.exists() for path in blobs)
    for path in blobs:
        os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert plan_prune(store).execute().blobs == len(blobs)
