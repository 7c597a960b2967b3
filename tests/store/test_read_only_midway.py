"""A store whose file system is remounted read-only while it is in use."""

from __future__ import annotations

import subprocess

import pytest
from faulty import audit, entry_files

from smartinit.errors import StoreError
from smartinit.store import Store
from smartinit.store.local import LocalStore


def mount(*args):
    return subprocess.run(["mount", *map(str, args)], capture_output=True, check=False).returncode == 0  # noqa: S607


@pytest.fixture
def disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", place):
        pytest.skip("file systems can be mounted by root only")
    yield place
    subprocess.run(["umount", "-l", place], check=True)  # noqa: S607


def test_reading_goes_on_and_writing_says_why_not(disk, tally):
    store = Store(disk / "store")
    for number in range(3):
        store.put(f"k{number}", files=entry_files(number), tags=["all"])
    held = store.local.get("k0", tensors=False)
    assert mount("-o", "remount,ro", disk)
    for number in range(3):  # warnings are errors in tests
        with store.local.get(f"k{number}", tensors=False) as entry:
            assert entry.files["own"].read_bytes() == entry_files(number)["own"]
    assert store.get("absent") is None
    assert "k1" in store
    assert sorted(store.keys()) == ["k0", "k1", "k2"]
    held.close()
    for put in (store.put, LocalStore(disk / "store").put, LocalStore(disk / "another").put):
        with pytest.raises(StoreError, match="Read-only file system"):
            put("k3", files=entry_files(3))
    with pytest.raises(StoreError, match="Read-only file system"):
        store.local.remove("k1")
    with store.single_flight("k3", timeout=1) as alone:  # no lock can be had, and none is needed
        assert not alone
    assert mount("-o", "remount,rw", disk)
    store.put("k3", files=entry_files(3))
    assert store.local.get("k3", tensors=False) is not None
    assert audit(disk / "store") == []
    tally(fault="remounted read-only in mid-run", reads=3, refused=4)


def test_what_is_broken_stays_where_it_is(disk):
    store = LocalStore(disk / "store")
    store.put("k0", files=entry_files(0))
    path = store.get("k0", tensors=False).files["own"]
    path.chmod(0o644)
    path.write_bytes(b"x" * path.stat().st_size)
    assert mount("-o", "remount,ro", disk)
    with pytest.warns(UserWarning, match="checksum differs; it counts as missing"):
        assert store.get("k0", tensors=False) is None
