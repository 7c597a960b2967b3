"""Disks that are full, broken or write-protected: one sentence, nothing half visible, and on it goes afterwards."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
from faulty import CHANGING, Steps, audit, content, entry_files, watched

from smartinit.errors import StoreError
from smartinit.store import durable, folder
from smartinit.store.local import LocalStore

FULL = {"open", "write", "mkdir", "link", "replace", "fsync"}
FAULTS = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EIO: CHANGING | {"write"},
    errno.EROFS: CHANGING - {"fsync"},
    errno.EACCES: CHANGING - {"fsync"},
    errno.ESTALE: CHANGING | {"write"},
    errno.ENOENT: {"open", "replace", "link", "unlink", "utime"},
}


def faulty(number, which, first, *, lasting):
    """Steps of which the one that is number ``first``, or all from then on, fail."""
    count = [0]

    def before(name, args):
        if name == "open" and not args[1] & os.O_CREAT and number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            return
        if name in which:
            count[0] += 1
            if count[0] == first or (lasting and count[0] > first):
                raise OSError(number, os.strerror(number))

    return Steps(before), count


def refusal(root, key="k1", **what):
    """What put said; None: it was acknowledged."""
    try:
        LocalStore(root).put(key, **(what or {"files": entry_files(1), "tags": ["all"]}))
    except StoreError as error:
        return str(error)
    return None


def put(root):
    """Whether it was acknowledged; if not, it was one sentence."""
    said = refusal(root)
    assert said is None or (str(root) in said and "\n" not in said)
    return said is None


def got(store, key):
    with_lease = store.get(key, tensors=False)
    if with_lease is None:
        return None
    with with_lease as entry:
        return {name: path.read_bytes() for name, path in entry.files.items()}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from_then_on"])
@pytest.mark.parametrize("number", FAULTS, ids=[errno.errorcode[number] for number in FAULTS])
def test_every_step_of_a_put_may_fail(ram, number, lasting, tally):
    tries = failed = 0
    for prepared in (0, 1):
        for first in range(1, 500):
            root = ram / f"{prepared}-{first}"
            for known in range(prepared):
                LocalStore(root).put(f"k{known}", files=entry_files(known), tags=["all"])
            durable._kept.clear()
            steps, count = faulty(number, FAULTS[number], first, lasting=lasting)
            with watched(steps):
                done = put(root)
            if count[0] < first:
                assert done
                break
            tries, failed = tries + 1, failed + (not done)
            store = LocalStore(root)
            assert audit(root) == []
            assert all(got(store, f"k{known}") == entry_files(known) for known in range(prepared))
            assert got(store, "k1") in ([entry_files(1)] if done else [None, entry_files(1)])
            if FAULTS[number] is FULL and store.layout.unfinished.is_dir():
                assert list(store.layout.unfinished.iterdir()) == [], "what is full is not left fuller"
            assert put(root), "it works again"
            assert got(LocalStore(root), "k1") == entry_files(1)
        else:
            raise AssertionError("a put of 500 steps")
    if number == errno.ENOENT and not lasting:
        assert failed == 0, "someone removed a folder: it is made again"
    else:
        assert failed > 10
    tally(fault=f"{errno.errorcode[number]} {'from a step on' if lasting else 'once'}", steps=tries, refused=failed)


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO, errno.EACCES])
def test_reading_needs_no_writing(ram, number):
    store = LocalStore(ram / "store")
    store.put("k1", files=entry_files(1))
    steps, _ = faulty(number, CHANGING | {"write"}, 1, lasting=True)
    with watched(steps):
        assert got(LocalStore(ram / "store"), "k1") == entry_files(1)
        assert LocalStore(ram / "store").get("absent") is None


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_a_file_system_without_links_or_flushes_of_folders_does(ram, number):
    def before(name, _args):
        if name == "link":
            raise OSError(number, os.strerror(number))

    with watched(Steps(before)):
        assert put(ram / "store")
        assert put(ram / "store")
    assert got(LocalStore(ram / "store"), "k1") == entry_files(1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place],  # noqa: S607
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("file systems can be mounted by root only")
    yield place
    subprocess.run(["umount", "-l", place], check=True)  # noqa: S607


def test_a_full_disk_is_told_before_anything_is_written(small_disk):
    with pytest.raises(StoreError, match=r"needs 11\.4 MB, but its disk has 4\.\d MB free; free some"):
        LocalStore(small_disk / "store").put("k", files={"a": content(1, 3_000_000)})
    assert list((small_disk / "store" / "blobs").rglob("*/*/*")) == []


def test_a_disk_fills_up_while_it_is_written(small_disk, monkeypatch, tally):
    monkeypatch.setattr(folder, "_MARGIN", -(1 << 40))  # as if others had taken the space in this moment
    store = LocalStore(small_disk / "store")
    kept, refused = [], 0
    for number in range(40):
        files = {"a": content(number, 250_000), "b": content(-number, 100_000)}
        said = refusal(small_disk / "store", f"k{number}", files=files)
        if said is None:
            kept.append(number)
        else:
            refused += 1
            assert "No space left on device" in said
            assert list(store.layout.unfinished.iterdir()) == []
    assert len(kept) >= 5
    assert refused >= 5
    assert audit(store.layout.root) == []
    assert all(got(store, f"k{number}")["a"] == content(number, 250_000) for number in kept)
    blobs = {path.stat().st_size for path in store.layout.blobs.rglob("*") if path.is_file()}
    assert blobs == {250_000, 100_000}
    assert len(list(store.layout.blobs.rglob("*/*"))) == 2 * len(kept), "a refused put leaves no blob"
    first = store.get(f"k{kept[0]}", tensors=False)
    for path in first.files.values():
        path.unlink()
    store.remove(f"k{kept[0]}")
    store.put("again", files={"a": content(99, 250_000)})
    assert got(store, "again")["a"] == content(99, 250_000)
    tally(fault="a real file system of 4 MB fills up", puts=40, refused=refused)
