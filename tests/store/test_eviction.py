"""Readers, writers and pruning at once: bytes are right or absent, and what was put and not removed is there."""

from __future__ import annotations

import os
import time

import pytest
from faulty import audit, entry_files

from smartinit.store import sweep
from smartinit.store.local import LocalStore
from smartinit.store.prune import plan_prune

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")


@needs_fork
def test_every_read_gives_the_right_bytes_or_nothing(program, ram, times, tally, seed):
    found = program("eviction.py", ram, "rules", times(150, 1500), seed)
    assert found["hits"] > 0
    assert found["swept"] > 0
    tally(fault="readers beside eviction, removal and rewriting", **found)


@needs_fork
def test_what_is_put_while_blobs_are_swept_is_there(program, ram, times, tally, seed):
    found = program("eviction.py", ram, "sweeps", times(150, 1500), seed)
    assert found["gc"] > 3
    tally(fault="writers beside two sweeps without a grace", **found)


@needs_fork
def test_sweeps_may_be_killed(program, ram, times, tally, seed):
    found = program("eviction.py", ram, "killed", times(150, 1000), seed)
    assert found["kills"] > 3
    tally(fault="sweeps that are killed all the time", **found)


def test_a_blob_in_the_trash_of_a_killed_sweep_is_served(tmp_path):
    store = LocalStore(tmp_path / "store")
    manifest = store.put("k", files=entry_files(1))
    blob = store.layout.blob(manifest.blobs["own"].sha256)
    trash = store.layout.unfinished / f"trash.blob.{blob.name}.{blob.stat().st_mtime_ns}.{'0' * 16}"
    blob.rename(trash)
    assert LocalStore(tmp_path / "store", read_only=True).get("k", tensors=False) is None
    with store.get("k", tensors=False) as entry:
        assert bytes(entry.content("own")) == entry_files(1)["own"]
    assert blob.is_file()
    assert not trash.exists()


def test_what_a_reader_holds_stays_readable_when_it_is_removed_and_swept(tmp_path, monkeypatch):
    monkeypatch.setattr("smartinit.store.prune.GRACE", -1.0)
    store = LocalStore(tmp_path / "store")
    store.put("k", {}, files=entry_files(1))
    held = store.get("k")
    store.remove("k")
    assert plan_prune(store).execute().blobs > 0
    assert not held.files["own"].exists()
    assert bytes(held.content("own")) == entry_files(1)["own"]
    assert store.get("k") is None


def test_what_is_leased_stays(tmp_path):
    store = LocalStore(tmp_path / "store")
    store.put("k", files=entry_files(1))
    store.put("other", files=entry_files(2))
    with store.get("k", tensors=False) as held:
        plan_prune(store, max_bytes=0, now=time.time() + 10**9).execute()
        assert held.files["own"].exists()
        assert list(store.keys()) == ["k"]
    plan_prune(store, max_bytes=0, now=time.time() + 10**9).execute()
    assert list(store.keys()) == []


def test_a_blob_that_is_named_after_the_plan_stays(tmp_path, monkeypatch):
    """The plan is made when the blob is there and its manifest is not; it is executed when put has returned."""
    monkeypatch.setattr("smartinit.store.prune.GRACE", -1.0)
    store, plans = LocalStore(tmp_path / "store"), []
    publish = LocalStore._publish

    def late(self, *args, **options):
        plans.append(plan_prune(store))
        return publish(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "_publish", late)
        store.put("k", files=entry_files(1))
    assert len(plans[0].blobs) == 3, "they were to go"
    assert plans[0].execute().blobs == 0
    with store.get("k", tensors=False) as entry:
        assert bytes(entry.content("own")) == entry_files(1)["own"]


def test_a_blob_that_goes_before_its_manifest_comes_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("smartinit.store.prune.GRACE", -1.0)
    store = LocalStore(tmp_path / "store")
    publish = LocalStore._publish

    def late(self, *args, **options):
        assert plan_prune(store).execute().blobs == 3
        return publish(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "_publish", late)
        store.put("k", files=entry_files(1))
    assert audit(tmp_path / "store") == []


def test_a_reader_that_came_in_the_last_moment_keeps_its_entry(tmp_path, monkeypatch):
    store, held = LocalStore(tmp_path / "store"), []
    store.put("k", files=entry_files(1))
    plan = plan_prune(store, max_bytes=0, now=time.time() + 10**9)
    last_use = sweep.last_use

    def then_read(*args):
        before = last_use(*args)
        held.append(store.get("k", tensors=False))
        return before

    monkeypatch.setattr(sweep, "last_use", then_read)
    assert plan.execute().entries == 0
    assert held[0].files["own"].exists()
    assert audit(tmp_path / "store") == []
    assert "k" in store


def test_an_entry_that_another_sweep_puts_back_keeps_its_blobs(tmp_path, monkeypatch):
    """It was pinned in this moment: the other one has seen that, this one has not."""
    monkeypatch.setattr("smartinit.store.prune.GRACE", -1.0)
    store = LocalStore(tmp_path / "store")
    store.put("k", files=entry_files(1))
    settle = sweep.settle

    def beside_another(layout, trash, kind, wanted):
        for item, freed in settle(layout, trash, kind, wanted):
            if kind == sweep.ENTRY:
                os.link(item.path, layout.entry(item.name))
            yield item, freed

    monkeypatch.setattr(sweep, "settle", beside_another)
    plan_prune(store, max_bytes=0).execute()
    assert list(store.keys()) == ["k"]
    assert audit(tmp_path / "store") == []
