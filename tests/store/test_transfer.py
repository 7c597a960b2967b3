from __future__ import annotations

import os
import shutil
import time
from typing import TYPE_CHECKING

import pytest

from smartinit.errors import ConfigError, StoreError
from smartinit.store import Store
from smartinit.store.local import LocalStore
from smartinit.store.remote import RemoteStore
from smartinit.store.transfer import Transfer, TransferError, pull, push
from smartinit.store.transport import RemoteError, Transport

if TYPE_CHECKING:
    from pathlib import Path

NAMES = tuple(f"key-{number}" for number in range(12))


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "here")
    for name in NAMES:
        store.put(name, files={"own": name.encode() * 10, "shared": b"s" * 5000}, tags=["all"])
    return store


@pytest.fixture(params=["folder", "file URL", "remote"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "folder": str(tmp_path / "team"),
        "file URL": (tmp_path / "team two").as_uri(),
        "remote": f"memory://{tmp_path.name}-{tmp_path.stat().st_ino}",
    }[request.param]


def contents(store: LocalStore) -> dict[str, dict[str, bytes]]:
    found = {}
    for name in store.keys():  # noqa: SIM118 - no mapping
        entry = store.get(name)
        assert entry is not None
        with entry:
            found[name] = {file: path.read_bytes() for file, path in entry.files.items()}
    return found


def test_all_entries_go_over_and_come_back(local: LocalStore, target: str, tmp_path: Path) -> None:
    pushed = push(local, target)
    assert pushed.sent == tuple(sorted(NAMES))
    assert (pushed.skipped, dict(pushed.failed), pushed.conflicts) == ((), {}, ())
    assert pushed.bytes >= 5000 + sum(len(name) * 10 for name in NAMES)
    again = push(local, target)
    assert again == Transfer(skipped=tuple(sorted(NAMES)), failed=again.failed)

    other = LocalStore(tmp_path / "there")
    pulled = pull(other, target)
    assert pulled.sent == tuple(sorted(NAMES))
    assert contents(other) == contents(local)
    assert sorted(other.keys("all")) == sorted(NAMES)
    assert pull(other, target).skipped == tuple(sorted(NAMES))
    assert pull(other, target).bytes == 0


def test_only_the_keys_that_are_named(local: LocalStore, target: str, tmp_path: Path) -> None:
    done = push(local, target, ["key-1", "key-3", "key-1", "nothing"])
    assert done.sent == ("key-1", "key-3")
    assert list(done.failed) == ["nothing"]
    other = LocalStore(tmp_path / "there")
    done = pull(other, target, ["key-1", "key-2"])
    assert done.sent == ("key-1",)
    assert list(done.failed) == ["key-2"]
    assert done.failed["key-2"] == "it is not there, or not sound (a key must be whole here)"
    with pytest.raises(ConfigError, match="is no key"):
        push(local, target, ["../x"])


def test_what_both_have_differently(local: LocalStore, target: str, tmp_path: Path) -> None:
    push(local, target)
    other = LocalStore(tmp_path / "there")
    other.put("key-1", files={"own": b"another"})
    other.put("new", files={"own": b"n"})
    with pytest.warns(UserWarning, match="not deterministic"):
        done = push(other, target)
    assert (done.sent, done.skipped, done.conflicts) == (("new",), ("key-1",), ("key-1",))
    with pytest.warns(UserWarning, match="not deterministic"):
        done = pull(other, target, ["key-1", "key-2"])
    assert (done.sent, done.skipped, done.conflicts) == (("key-2",), ("key-1",), ("key-1",))
    assert contents(other)["key-1"] == {"own": b"another"}


def test_one_entry_that_is_broken_stops_nothing(local: LocalStore, target: str) -> None:
    blob = local.peek("key-5").blobs["own"]
    path = local.layout.blob(blob.sha256)
    path.chmod(0o644)
    path.write_bytes(b"x" * blob.size)
    if "memory" in target:
        with pytest.warns(UserWarning, match="was changed"):
            done = push(local, target)
    else:
        done = push(local, target)
    assert list(done.failed) == ["key-5"]
    assert len(done.sent) == len(NAMES) - 1
    other = (
        RemoteStore(target) if "memory" in target else LocalStore(target.removeprefix("file://").replace("%20", " "))
    )
    assert "key-5" not in set(other.keys())


def test_it_stops_at_the_first_trouble_that_all_would_have(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}-stops"
    left = 20
    upload = Transport.upload

    def breaks(self: Transport, name: str, path: Path) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise RemoteError("the line is dead")
        upload(self, name, path)

    monkeypatch.setattr(Transport, "upload", breaks)
    left = 5
    with pytest.raises(TransferError, match=r"the line is dead.*of 12 entries.*repeat it") as caught:
        push(local, url)
    done = caught.value.transfer
    assert isinstance(caught.value, StoreError)
    assert len(done.sent) < len(NAMES)
    assert all("the line is dead" in why for why in done.failed.values())
    assert set(RemoteStore(url).keys()) == set(done.sent)
    monkeypatch.undo()
    rest = push(local, url)
    assert set(rest.sent) == set(NAMES) - set(done.sent)
    assert rest.skipped == done.sent
    assert push(local, url).bytes == 0


def test_what_was_on_its_way_when_it_stopped_is_told(
    local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://{tmp_path.name}-stock"
    upload, first = Transport.upload, local.peek("key-0").blobs["own"].sha256

    def breaks(self: Transport, name: str, path: Path) -> None:
        if path.name == first:
            raise RemoteError("the line is dead")
        time.sleep(0.3)
        upload(self, name, path)

    monkeypatch.setattr(Transport, "upload", breaks)
    with pytest.raises(TransferError) as caught:
        push(local, url, sorted(NAMES))
    done = caught.value.transfer
    assert done.sent
    assert set(done.sent) == set(RemoteStore(url).keys())
    assert list(done.failed) == ["key-0"]


def test_a_pull_that_was_broken_off_goes_on(local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory://{tmp_path.name}-pull"
    push(local, url)
    other = LocalStore(tmp_path / "there")
    stream, left = Transport.stream, 30

    def breaks(self: Transport, name: str, most: int) -> object:
        nonlocal left
        left -= 1
        if left < 0:
            raise RemoteError("the line is dead")
        return stream(self, name, most)

    monkeypatch.setattr(Transport, "stream", breaks)
    left = 14
    with pytest.raises(TransferError) as caught:
        pull(other, url)
    monkeypatch.undo()
    assert set(other.keys()) == set(caught.value.transfer.sent)
    assert set(pull(other, url).sent) == set(NAMES) - set(caught.value.transfer.sent)
    assert contents(other) == contents(local)


def test_a_store_that_is_read_only(local: LocalStore, target: str, tmp_path: Path) -> None:
    push(local, target)
    shut = LocalStore(tmp_path / "shut", read_only=True)
    with pytest.raises(StoreError, match="read-only"):
        pull(shut, target)
    assert push(LocalStore(local.layout.root, read_only=True), target).skipped == tuple(sorted(NAMES))
    with pytest.raises(StoreError, match="read-only"):
        push(local, LocalStore(tmp_path / "shut", read_only=True))


def test_a_source_that_is_not_there(local: LocalStore, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", (tmp_path / "nowhere").as_uri(), tmp_path):
        with pytest.raises(StoreError, match="there is no store in"):
            pull(local, place)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(StoreError, match="there is no store in"):  # and nothing is made for it
        pull(LocalStore(tmp_path / "new"), tmp_path / "nowhere")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        push(local, tmp_path / "file")


@pytest.mark.parametrize("place", ["", " ", "file:team", "FILE:./team"])
def test_text_that_names_no_place(
    local: LocalStore, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for copy in (push, pull):
        with pytest.raises(ConfigError, match=r"is empty|is no address"):
            copy(local, place)
    with pytest.raises(ConfigError, match=r"is empty|is no address"):
        Store(place)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pull_from_a_folder_leaves_it_as_it_is(local: LocalStore, tmp_path: Path) -> None:
    def look() -> dict[str, int]:
        return {str(path): path.lstat().st_mtime_ns for path in local.layout.root.rglob("*")}

    before = look()
    pull(LocalStore(tmp_path / "there"), local.layout.root)
    assert look() == before
    inodes = {path.stat().st_ino for path in local.layout.blobs.rglob("*") if path.is_file()}
    copies = {path.stat().st_ino for path in (tmp_path / "there" / "blobs").rglob("*") if path.is_file()}
    assert not inodes & copies


def test_a_bar_is_shown_when_asked(local: LocalStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    push(local, tmp_path / "team")
    assert capfd.readouterr() == ("", "")
    push(local, tmp_path / "other", progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "12/12" in err


def test_the_facade_pushes_and_pulls(local: LocalStore, target: str, tmp_path: Path) -> None:
    assert Store(local.layout.root).push(target, ["key-1"]).sent == ("key-1",)
    assert Store(tmp_path / "there").pull(target).sent == ("key-1",)


def test_a_disk_that_is_full_stops_a_pull(
    local: LocalStore, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(local, target)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(TransferError, match=r"needs 8\.4 MB, but its disk has 0 bytes free"):
        pull(LocalStore(tmp_path / "there"), target)
    monkeypatch.undo()
    assert len(pull(LocalStore(tmp_path / "there"), target).sent) == len(NAMES)
    assert os.listdir(tmp_path / "there" / "tmp") == []  # noqa: PTH208
