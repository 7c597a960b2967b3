from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import threading
import warnings

import pytest

from smartinit.errors import StoreError
from smartinit.store import Store, durable
from smartinit.store.verify import verify


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    for name in "abc":
        store.put(name, files={"own": name.encode() * 1000, "shared": b"shared" * 50, "none": b""}, tags=("group",))
    return store


def spoil(path, place=10):
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.chmod(0o644)
    path.write_bytes(content)


def blob_of(store, key, file="own"):
    return store.local.layout.blob(store.peek(key).blobs[file].sha256)


def kinds(found):
    return sorted(unsound.what for unsound in found)


def in_quarantine(store):
    return len(list(store.local.layout.quarantine.glob("*")))


def test_a_sound_store_and_none_at_all(store, tmp_path):
    read = []
    assert verify(store.local, progress=read.append) == []
    assert sum(read) == 3 * 1000 + 300, "each blob once"
    assert verify(store.local, repair=True) == []
    assert verify(Store(tmp_path / "none").local) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("place", [0, 500, 999])
def test_a_changed_blob(store, place):
    path = blob_of(store, "b")
    spoil(path, place)
    found = store.verify()
    assert kinds(found) == ["blob", "missing"]
    assert found[0].name == f"blobs/sha256/{path.name[:2]}/{path.name}"
    assert found[1].name == "b"
    assert "'own'" in found[1].sentence
    assert path.exists(), "nothing is touched unless it is asked for"
    assert kinds(store.verify(repair=True)) == ["blob", "missing"]
    assert store.verify() == []
    assert in_quarantine(store) == 2
    assert sorted(store.keys()) == ["a", "c"]
    store.put("b", files={"own": b"b" * 1000})
    assert store.verify() == []


def test_a_changed_blob_of_several_entries(store):
    spoil(blob_of(store, "a", "shared"))
    found = store.verify(repair=True)
    assert kinds(found) == ["blob", "missing", "missing", "missing"]
    assert list(store.keys()) == []
    assert store.verify() == []


@pytest.mark.parametrize("place", [3, -20, -1])
def test_a_changed_manifest(store, place):
    spoil(store.local.layout.entry("b"), place)
    found = store.verify(repair=True)
    assert [(unsound.name, unsound.what) for unsound in found] == [("entries/b.json", "manifest")]
    assert store.verify() == []
    assert sorted(store.keys()) == ["a", "c"]


def test_truncated_files(store):
    for path in (blob_of(store, "a"), store.local.layout.entry("b")):
        os.truncate(path, path.stat().st_size // 2)
    assert kinds(store.verify(repair=True)) == ["blob", "manifest", "missing"]
    assert (store.verify(), list(store.keys())) == ([], ["c"])


def test_a_missing_blob(store):
    blob_of(store, "a").unlink()
    assert kinds(store.verify(repair=True)) == ["missing"]
    assert store.verify() == []
    assert "a" not in store


def test_a_manifest_that_lies_about_a_sound_blob(store):
    manifest = store.peek("a")
    blobs = {"own": dataclasses.replace(manifest.blobs["own"], xxh3="0" * 32)}
    lie = dataclasses.replace(manifest, blobs=blobs, tags=()).to_bytes()
    path = store.local.layout.entry("a")
    path.unlink()
    path.write_bytes(lie)
    found = store.verify()
    assert kinds(found) == ["missing"]
    assert "not the one that its manifest describes" in found[0].sentence


def test_results_that_were_kept_aside(store):
    with pytest.warns(UserWarning, match="not deterministic"):
        store.put("a", files={"own": b"other"})
    assert store.verify() == []
    (path,) = store.local.layout.aside.iterdir()
    spoil(path)
    assert kinds(store.verify(repair=True)) == ["manifest"]
    assert store.verify() == []
    assert "a" in store


def test_what_no_store_has(store, tmp_path):
    layout = store.local.layout
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    own = blob_of(store, "a")
    strange = [layout.entries / "NO KEY.json", layout.entries / "a.json~", layout.blobs / "stray", own.parent / "short"]
    for path in strange:
        path.write_bytes(b"x")
    for path in (
        layout.blobs / own.name[:2] / ("0" * 64),
        layout.entries / "link.json",
        layout.entries / "new\nline.json",
    ):
        path.symlink_to(outside)
        strange.append(path)
    os.mkfifo(layout.entries / "pipe.json")  # opening one for reading would wait for a writer for ever
    wrong = layout.blobs / "zz"
    wrong.mkdir()
    shutil.copy(own, wrong / own.name)
    strange += [layout.entries / "pipe.json", wrong / own.name]
    found = store.verify()
    assert len(found) == len(strange)
    assert set(kinds(found)) == {"file", "manifest"}
    assert all("\n" not in unsound.sentence + unsound.name for unsound in found)
    assert len(store.verify(repair=True)) == len(strange)
    assert store.verify() == []
    assert not any(os.path.lexists(path) for path in strange)
    assert outside.read_bytes() == b"precious"
    assert all(store.get(key) is not None for key in "abc")


def test_a_lost_mark_is_made_again(store):
    shutil.rmtree(store.local.layout.index("group"))
    found = store.verify()
    assert [(unsound.name, unsound.what) for unsound in sorted(found)] == [(key, "mark") for key in "abc"]
    store.verify(repair=True)
    assert sorted(store.keys("group")) == ["a", "b", "c"]
    assert store.verify() == []


def test_a_store_that_does_not_say_its_schema(store):
    path = store.local.layout.schema
    path.chmod(0o644)
    path.write_text("{}")
    assert kinds(store.verify(repair=True)) == ["file"]
    Store(store.local.layout.root).put("d", files={"x": b"1"})
    assert path.read_text() == '{"schema": 1}\n'
    assert store.verify() == []


def test_what_cannot_be_read_is_said_and_left_alone(store, monkeypatch):
    import smartinit.store.verify as module

    bad, original = blob_of(store, "a"), module.read_digests

    def broken(path):
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(path)

    newer = dataclasses.replace(store.peek("b"), schema=99, tags=())
    path = store.local.layout.entry("b")
    path.unlink()
    path.write_bytes(newer.to_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_digests", broken)
        found = store.verify(repair=True)
    assert kinds(found) == ["unreadable", "unreadable"]
    assert sum("Input/output error" in unsound.sentence for unsound in found) == 1
    assert sum("upgrade smartinit" in unsound.sentence for unsound in found) == 1
    assert bad.exists()
    assert "a" in store


def test_what_was_replaced_while_it_was_read_stays(store, monkeypatch):
    bad = blob_of(store, "a")
    spoil(bad)
    original = durable.publish

    def publish(unfinished, final):
        if unfinished == bad:
            store.put("z", files={"own": b"a" * 1000})  # heals it at this very moment
        original(unfinished, final)

    monkeypatch.setattr(durable, "publish", publish)
    store.verify(repair=True)
    assert bad.read_bytes() == b"a" * 1000
    assert sorted(store.keys()) == ["a", "b", "c", "z"]
    assert store.verify() == []


def test_a_blob_that_pruning_has_in_hand_is_looked_at_again(store, monkeypatch):
    import smartinit.store.verify as module

    path, original = blob_of(store, "a"), module.read_manifest
    away = path.with_name("tmp")
    content, seen = path.read_bytes(), []

    def read_manifest(where, key):
        if not seen:
            path.rename(away)
        elif len(seen) == 3:
            away.rename(path)
        seen.append(key)
        return original(where, key)

    monkeypatch.setattr(module, "read_manifest", read_manifest)
    assert store.verify() == []
    assert path.read_bytes() == content
    assert len(seen) == 4


def test_a_read_only_store_is_verified_but_not_repaired(store):
    spoil(blob_of(store, "a"))
    watched = Store(store.local.layout.root, read_only=True)
    assert kinds(watched.verify()) == ["blob", "missing"]
    with pytest.raises(StoreError, match="read-only"):
        watched.verify(repair=True)


def test_others_write_and_remove_meanwhile(store):
    """Whatever is found then would be found wrongly."""
    stop, found = threading.Event(), []

    def write():
        for step in range(10_000):
            if stop.is_set():
                return
            store.put(f"new-{step % 5}", files={"x": str(step).encode()}, replace=True)
            if step % 3 == 0:
                store.local.remove(f"new-{step % 5}")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thread = threading.Thread(target=write)
        thread.start()
        try:
            for _ in range(10):
                found += store.verify(repair=True)
        finally:
            stop.set()
            thread.join(timeout=60)
    assert found == []
    assert in_quarantine(store) == 0


def test_a_manifest_of_nothing_is_sound(store):
    store.put("empty", meta={"artefact": "x"})
    assert store.verify() == []
