from __future__ import annotations

import json
import secrets
import sys
import threading
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smartinit.errors import ConfigError, MissingDependencyError, StoreError
from smartinit.store.keys import Key
from smartinit.store.local import LocalStore
from smartinit.store.remote import RemoteStore
from smartinit.store.transport import RemoteError, Transport, without_secrets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from servers import Dav

pytest.importorskip("moto", reason="the S3 server of the tests")
from servers import Bucket, s3_server, webdav_server

KEY = Key("artefact", {"model": "a", "rank": 8})


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str) -> Iterator[Bucket]:
    made = Bucket(endpoint)
    yield made
    made.client.close()


@pytest.fixture(params=["s3", "webdav"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bucket | Dav]:
    """A remote folder, with a look behind the scenes."""
    if request.param == "s3":
        yield request.getfixturevalue("bucket")
        return
    pytest.importorskip("webdav4", reason="the WebDAV client")
    pytest.importorskip("wsgidav", reason="the WebDAV server of the tests")
    folder = tmp_path / "served"
    folder.mkdir()
    with webdav_server(folder) as dav:
        yield dav


in_a_folder = pytest.mark.parametrize("place", ["webdav"], indirect=True)  # whatever the protocol


@pytest.fixture
def remote(place: Bucket | Dav) -> RemoteStore:
    return RemoteStore(place.url, **place.options())


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "here")


def fill(store: LocalStore, key: Key | str = KEY, value: float = 1.0, **more: Any) -> None:
    tensors = {"a": torch.full((64, 32), value), "b": torch.full((3,), value, dtype=torch.bfloat16)}
    store.put(key, tensors, {"of": str(key)}, files={"sub/notes.txt": b"n" * 1000, "empty": b""}, **more)


def blobs_of(store: LocalStore, key: Key | str = KEY) -> dict[str, bytes]:
    entry = store.get(key)
    assert entry is not None
    with entry:
        return {name: path.read_bytes() for name, path in entry.files.items()}


def test_an_entry_arrives_as_it_was_sent(remote: RemoteStore, local: LocalStore, tmp_path: Path) -> None:
    fill(local, tags=["run-1", "model-a"], basis="b1")
    assert remote.peek(KEY) is None
    sent = remote.send(KEY, local)
    assert sent is not None
    assert sent.new
    assert sent.bytes == local.peek(KEY).size

    assert remote.peek(KEY) == local.peek(KEY)
    assert list(remote.keys()) == list(remote.keys("run-1")) == list(remote.keys("model-a")) == [KEY.digest]
    assert list(remote.keys("run-2")) == []
    other = LocalStore(tmp_path / "there")
    fetched = remote.fetch(KEY, other)
    assert fetched == sent
    assert blobs_of(other) == blobs_of(local)
    assert other.peek(KEY) == local.peek(KEY)
    assert list(other.keys("run-1")) == [KEY.digest]
    assert not list(other.layout.unfinished.iterdir())


def test_what_is_not_there(remote: RemoteStore, local: LocalStore) -> None:
    assert remote.peek("nothing") is None
    assert remote.fetch("nothing", local) is None
    assert remote.send("nothing", local) is None
    assert list(remote.keys()) == []
    assert not local.layout.root.exists()


def test_what_is_there_is_not_sent_again(remote: RemoteStore, local: LocalStore) -> None:
    fill(local, "one")
    fill(local, "two")  # the same bytes
    assert remote.send("one", local).bytes > 0
    second = remote.send("two", local)
    assert second.new
    assert second.bytes == 0
    before = remote.transport.calls
    assert not remote.send("one", local).new
    assert remote.transport.calls - before <= 1 + 3  # the manifest, and a look at each blob


def test_the_files_lie_as_in_a_folder(place: Bucket | Dav, remote: RemoteStore, local: LocalStore) -> None:
    fill(local, tags=["t"])
    remote.send(KEY, local)
    folder = {path.relative_to(local.layout.root).as_posix() for path in local.layout.root.rglob("*") if path.is_file()}
    expected = {name for name in folder if name.split("/")[0] in ("blobs", "entries", "index", "smartinit-store.json")}
    assert place.names() == expected
    assert all(place.read(name) == (local.layout.root / name).read_bytes() for name in expected)


def test_the_manifest_is_sent_last(place: Bucket | Dav, local: LocalStore) -> None:
    class Breaks(Transport):
        left = 0

        def put(self, name: str, content: bytes, *, once: bool = False) -> bool:
            self._count()
            return super().put(name, content, once=once)

        def upload(self, name: str, path: Path) -> None:
            self._count()
            super().upload(name, path)

        def _count(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise RemoteError("broken off")

    fill(local, tags=["t"])
    whole = local.peek(KEY).size
    last, found = 0, RemoteStore(place.url, **place.options())
    remote = RemoteStore(place.url, **place.options())
    remote.transport = transport = Breaks(place.url, place.options())
    for steps in range(20):
        transport.left, remote._known = steps, None
        try:
            done = remote.send(KEY, local)
        except RemoteError:
            assert found.peek(KEY) is None
            assert list(found.keys()) == []
            last = steps
            continue
        assert done.bytes < whole  # the rest, after what went over before
        break
    assert last >= 1
    assert found.peek(KEY) == local.peek(KEY)


def test_of_many_conditional_writes_one_wins(bucket: Bucket) -> None:
    transport = Transport(bucket.url, bucket.options())
    won: list[bytes] = []

    def write(content: bytes) -> None:
        if transport.put("entries/x.json", content, once=True):
            won.append(content)

    threads = [threading.Thread(target=write, args=(secrets.token_bytes(100),)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(won) == 1
    assert bucket.read("entries/x.json") == won[0]


def test_a_name_is_given_once_if_asked(place: Bucket | Dav) -> None:
    transport = Transport(place.url, place.options())
    assert transport.put("entries/x.json", b"first", once=True)
    assert not transport.put("entries/x.json", b"second", once=True)
    assert place.read("entries/x.json") == b"first"
    assert transport.put("entries/x.json", b"third")
    assert place.read("entries/x.json") == b"third"
    assert place.names() == {"entries/x.json"}  # nothing unfinished is left


def test_another_result_is_kept_aside(
    place: Bucket | Dav, remote: RemoteStore, local: LocalStore, tmp_path: Path
) -> None:
    fill(local, basis="same")
    remote.send(KEY, local)
    other = LocalStore(tmp_path / "other")
    fill(other, value=2.0, basis="same")
    with pytest.warns(UserWarning, match="not deterministic"):
        sent = remote.send(KEY, other)
    assert sent.conflict
    assert not sent.new
    assert remote.peek(KEY) == local.peek(KEY)
    (aside,) = place.names("aside/")
    assert place.read(aside) == other.peek(KEY).to_bytes()

    with pytest.warns(UserWarning, match="not deterministic"):  # and in the other direction
        assert remote.fetch(KEY, other).conflict
    assert other.peek(KEY).blobs != local.peek(KEY).blobs
    (aside_here,) = other.layout.aside.iterdir()
    assert aside_here.read_bytes() == local.peek(KEY).to_bytes()


@pytest.mark.parametrize("how", ["another basis", "the same tensors"])
def test_what_is_no_contradiction(remote: RemoteStore, local: LocalStore, tmp_path: Path, how: str) -> None:
    fill(local, basis="one")
    remote.send(KEY, local)
    other = LocalStore(tmp_path / "other")
    if how == "another basis":
        fill(other, value=2.0, basis="two")
    else:
        tensors = dict(local.get(KEY).tensors)
        other.put(KEY, tensors, files={"sub/notes.txt": b"written on another day", "empty": b""}, basis="one")
    sent = remote.send(KEY, other)
    assert not sent.conflict
    assert not sent.new
    assert remote.peek(KEY) == local.peek(KEY)


def test_someone_else_is_faster(
    place: Bucket | Dav, local: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one's manifest comes between our look whether there is one and our own."""
    fill(local, basis="same")
    other = LocalStore(tmp_path / "other")
    fill(other, value=2.0, basis="same")
    theirs, ours = RemoteStore(place.url, **place.options()), RemoteStore(place.url, **place.options())
    put = ours.transport.put

    def late(name: str, content: bytes, *, once: bool = False) -> bool:
        if name.startswith("entries/"):
            assert theirs.send(KEY, other).new
        return put(name, content, once=once)

    monkeypatch.setattr(ours.transport, "put", late)
    with pytest.warns(UserWarning, match="not deterministic"):
        sent = ours.send(KEY, local)
    assert sent.conflict
    assert not sent.new
    assert ours.peek(KEY) == other.peek(KEY)


def test_a_broken_manifest_is_replaced(place: Bucket | Dav, remote: RemoteStore, local: LocalStore) -> None:
    fill(local)
    remote.send(KEY, local)
    name = f"entries/{KEY}.json"
    place.write(name, place.read(name)[:-7])
    with pytest.warns(UserWarning, match="it is replaced"):
        assert remote.send(KEY, local).new
    assert remote.peek(KEY) == local.peek(KEY)


@pytest.mark.parametrize("harm", ["lost", "cut"])
def test_a_blob_that_is_lost_is_sent_again(
    place: Bucket | Dav, remote: RemoteStore, local: LocalStore, harm: str
) -> None:
    fill(local)
    remote.send(KEY, local)
    blob = local.peek(KEY).blobs["tensors.safetensors"]
    name = f"blobs/sha256/{blob.sha256[:2]}/{blob.sha256}"
    content = place.read(name)
    place.remove(name)
    if harm == "cut":
        place.write(name, content[:-1])
    sent = remote.send(KEY, local)
    assert sent.new
    assert sent.bytes == blob.size
    assert place.read(name) == content


@in_a_folder
def test_a_store_of_a_newer_version_is_left_alone(place: Bucket | Dav, remote: RemoteStore, local: LocalStore) -> None:
    fill(local)
    place.write("smartinit-store.json", b'{"schema": 2}')
    for call in (lambda: remote.peek(KEY), lambda: list(remote.keys()), lambda: remote.send(KEY, local)):
        with pytest.raises(RemoteError, match="schema 2, but this version knows 1; upgrade smartinit"):
            call()
    assert place.names() == {"smartinit-store.json"}


@in_a_folder
def test_an_entry_of_a_newer_version(place: Bucket | Dav, remote: RemoteStore, local: LocalStore) -> None:
    fill(local)
    newer = replace(local.peek(KEY), schema=2)
    place.write(f"entries/{KEY}.json", newer.to_bytes())
    with pytest.raises(RemoteError, match="upgrade smartinit"):
        remote.peek(KEY)


@in_a_folder
@pytest.mark.parametrize("content", [b"", b"[", b"[]", b'{"schema": null}', b"x" * 100_000])
def test_a_file_that_says_nothing_of_the_version(place: Bucket | Dav, local: LocalStore, content: bytes) -> None:
    place.write("smartinit-store.json", content)
    fill(local)
    remote = RemoteStore(place.url, **place.options())
    assert remote.send(KEY, local).new
    assert remote.peek(KEY) == local.peek(KEY)


@in_a_folder
def test_names_that_are_none_are_no_keys(place: Bucket | Dav, remote: RemoteStore) -> None:
    for name in ("UPPER.json", "a.b.json", "ok.txt", "ok-1.json", "x" * 129 + ".json"):
        place.write(f"entries/{name}", b"{}")
    assert list(remote.keys()) == ["ok-1"]


@in_a_folder
def test_nothing_is_read_from_a_read_only_store_into_one(remote: RemoteStore, local: LocalStore) -> None:
    fill(local)
    remote.send(KEY, local)
    shut = LocalStore(local.layout.root, read_only=True)
    with pytest.raises(StoreError, match="read-only"):
        remote.fetch(KEY, shut)


def test_a_connection_is_made_anew_after_a_fork(bucket: Bucket, local: LocalStore) -> None:
    transport = Transport(bucket.url, bucket.options())
    transport.put("x", b"1")
    transport._connection._process -= 1  # as if another process had made it
    first = transport._connection
    assert transport.read_small("x", 10) == b"1"
    assert transport._connection is not first


def test_other_protocols_of_fsspec(local: LocalStore, tmp_path: Path) -> None:
    remote = RemoteStore(f"memory://{secrets.token_hex(8)}/store")
    fill(local, tags=["t"])
    assert remote.send(KEY, local).new
    assert list(remote.keys("t")) == [KEY.digest]
    other = LocalStore(tmp_path / "there")
    assert remote.fetch(KEY, other).new
    assert blobs_of(other) == blobs_of(local)


def test_protocols_that_are_only_read(local: LocalStore) -> None:
    fill(local)
    for url in ("http://127.0.0.1:9/store", "hf://datasets/someone/something"):
        with pytest.raises(StoreError, match="can only be read"):
            Transport(url).put("x", b"")


@pytest.mark.parametrize("url", ["zip://x", "simplecache://x", "reference://x", "jupyter://x", "git://x"])
def test_protocols_that_are_none_for_a_store(url: str) -> None:
    with pytest.raises(ConfigError, match="no protocol for a store"):
        RemoteStore(url).peek("x")


@pytest.mark.parametrize(("package", "url"), [("s3fs", "s3://bucket/x"), ("webdav4.fsspec", "webdav://h/x")])
def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, package: str, url: str) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(_registry, "s3", raising=False)  # what fsspec has imported before
    with pytest.raises(MissingDependencyError, match=r"pip install 'smartinit\[(s3|webdav)\]'"):
        RemoteStore(url).peek("x")


def test_secrets_of_an_address_are_not_shown(local: LocalStore) -> None:
    assert without_secrets("webdavs://me:pass@host:1/p?token=1") == "webdavs://host:1/p"
    remote = RemoteStore("webdav://me:hidden-word@127.0.0.1:9/p", timeout=1, attempts=1)
    assert "hidden-word" not in repr(remote)
    with pytest.raises(RemoteError) as caught:
        remote.peek("x")
    assert "hidden-word" not in str(caught.value)


def test_options_that_cannot_be() -> None:
    for options in ({"timeout": 0}, {"attempts": 0}):
        with pytest.raises(ConfigError, match="expected more than 0 seconds and 1 or more"):
            RemoteStore("s3://x/y", **options)


def test_nothing_is_sent_before_the_first_question(endpoint: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "s3://nowhere/x" in repr(RemoteStore("s3://nowhere/x", endpoint_url=endpoint))


@in_a_folder
def test_manifests_stay_json(remote: RemoteStore, place: Bucket | Dav, local: LocalStore) -> None:
    fill(local)
    remote.send(KEY, local)
    assert json.loads(place.read(f"entries/{KEY}.json"))["key"] == KEY.digest
