"""What a remote store can do wrong: each is told in a sentence, leaves nothing, and costs read-through one warning."""

from __future__ import annotations

import json
import math
import struct
import threading
import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from smartinit.errors import StoreError, VerificationError
from smartinit.store import Store, adoption
from smartinit.store.blobs import draft_blob
from smartinit.store.connections import Connection
from smartinit.store.keys import Key
from smartinit.store.local import LocalStore
from smartinit.store.manifest import MAX_BYTES, Manifest
from smartinit.store.remote import RemoteStore
from smartinit.store.transport import RemoteError, Transport

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from smartinit.store.blobs import Blob

pytest.importorskip("moto", reason="the S3 server of the tests")
from servers import Bucket, Http, Proxy, Silent, reply, s3_server

KEY = Key("artefact", {"model": "a"})
ENTRY = f"entries/{KEY}.json"
PATIENCE = 1.0


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(endpoint: str) -> Iterator[Bucket]:
    made = Bucket(endpoint)
    yield made
    made.client.close()


@pytest.fixture
def full(bucket: Bucket, tmp_path: Path) -> Bucket:
    """With one entry."""
    store = LocalStore(tmp_path / "writer")
    torch.manual_seed(0)
    store.put(KEY, {"a": torch.randn(512, 1024)}, files={"notes.txt": b"n" * 100})
    RemoteStore(bucket.url, **bucket.options()).send(KEY, store)
    return bucket


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "here")


def nothing_is_left(local: LocalStore) -> None:
    assert list(local.keys()) == []
    folder = local.layout.unfinished
    assert not folder.exists() or list(folder.iterdir()) == []


def manifest_of(bucket: Bucket) -> Manifest:
    return Manifest.from_bytes(bucket.read(ENTRY), KEY.digest)


def blob_name(blob: Blob) -> str:
    return f"blobs/sha256/{blob.sha256[:2]}/{blob.sha256}"


def refused(remote: RemoteStore, local: LocalStore, match: str, kind: type[Exception] = VerificationError) -> None:
    """A fetch fails with a sentence and leaves nothing; read-through warns once and goes on."""
    with pytest.raises(kind, match=match) as caught:
        remote.fetch(KEY, local)
    assert "\n" not in str(caught.value)
    assert KEY not in local
    nothing_is_left(local)
    store = Store(local.layout.root, remote)
    with pytest.warns(UserWarning, match=match) as told:
        assert store.get(KEY) is None
    assert len(told) == 1
    asked = remote.transport.calls
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert store.get(KEY) is None
    assert remote.transport.calls == asked
    store.put("own", files={"a": b"1"})
    assert store.get("own") is not None


def publish_lie(bucket: Bucket, change: Callable[[Manifest], Manifest]) -> None:
    bucket.write(ENTRY, change(manifest_of(bucket)).to_bytes())


# --- what lies there is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["half", "longer", "another", "empty", "one bit", "none"])
def test_a_wrong_blob(full: Bucket, local: LocalStore, harm: str) -> None:
    blob = manifest_of(full).blobs["tensors.safetensors"]
    content = full.read(blob_name(blob))
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    wrong = {
        "half": content[: len(content) // 2],
        "longer": content + b"x",
        "another": bytes(len(content)),
        "empty": b"",
        "one bit": bytes(changed),
    }
    full.remove(blob_name(blob))
    if harm in wrong:
        full.write(blob_name(blob), wrong[harm])
    match = {"longer": "is longer than the", "none": "names a blob that is not there"}.get(harm, "in place of the")
    refused(RemoteStore(full.url, **full.options()), local, match)


@pytest.mark.parametrize("harm", ["half", "one bit", "of another key", "not json", "empty", "too long"])
def test_a_wrong_manifest(full: Bucket, local: LocalStore, harm: str) -> None:
    content = full.read(ENTRY)
    changed = bytearray(content)
    changed[len(content) // 2] ^= 1
    wrong = {
        "half": content[: len(content) // 2],
        "one bit": bytes(changed),
        "of another key": replace(manifest_of(full), key="other").to_bytes(),
        "not json": b"<html>sign in</html>",
        "empty": b"",
        "too long": b" " * (MAX_BYTES + 1),
    }
    full.write(ENTRY, wrong[harm])
    match = "longer than" if harm == "too long" else "the manifest of"
    refused(RemoteStore(full.url, **full.options()), local, match)


def test_a_manifest_that_would_fill_the_disk(full: Bucket, local: LocalStore) -> None:
    def larger(manifest: Manifest) -> Manifest:
        return replace(manifest, blobs={name: replace(b, size=1 << 39) for name, b in manifest.blobs.items()})

    publish_lie(full, larger)
    remote = RemoteStore(full.url, **full.options())
    before = remote.transport.calls
    with pytest.raises(StoreError, match="MB free"):
        remote.fetch(KEY, local)
    assert remote.transport.calls - before == 2  # the version and the manifest: no blob was asked for
    publish_lie(full, lambda m: replace(m, blobs={n: replace(b, size=1 << 60) for n, b in m.blobs.items()}))
    refused(RemoteStore(full.url, **full.options()), local, "at most")


def test_an_entry_of_too_many_files(full: Bucket, local: LocalStore) -> None:
    (blob,) = (blob for name, blob in manifest_of(full).blobs.items() if name == "notes.txt")
    publish_lie(full, lambda m: replace(m, blobs={f"f{i}": blob for i in range(adoption._MOST_FILES + 1)}))
    refused(RemoteStore(full.url, **full.options()), local, "at most")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_numbers_that_are_none(
    bucket: Bucket, local: LocalStore, tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[2, 3] = value
    store = LocalStore(tmp_path / "writer")
    store.put(KEY, {"fine": torch.ones(4), "bad": tensor})
    remote = RemoteStore(f"memory://{tmp_path.name}-{dtype}-{value}")
    remote.send(KEY, store)
    refused(remote, local, "'bad' in 'tensors.safetensors' of the entry .* holds NaN or Inf")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_small_numbers_that_are_none(local: LocalStore, tmp_path: Path, dtype: torch.dtype) -> None:
    bad = torch.tensor([1.0, math.nan, -2.0]).to(dtype)
    store = LocalStore(tmp_path / "writer")
    store.put(KEY, {"bad": bad})
    remote = RemoteStore(f"memory://{tmp_path.name}-{dtype}")
    remote.send(KEY, store)
    refused(remote, local, "holds NaN or Inf")


def test_statistics_may_hold_infinities_and_large_numbers_are_some(local: LocalStore, tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "writer")
    start = {"best": torch.full((3,), -math.inf)}
    large = {
        str(dtype): torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny, -0.0], dtype=torch.float64).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
    }
    large |= {"whole": torch.tensor([2**31 - 1, -1], dtype=torch.int32), "none": torch.empty(0, 3)}
    remote = RemoteStore(f"memory://{tmp_path.name}-statistics")
    for key, tensors in ((Key("statistic", {"a": 1}), start), (Key("spectrum", {"a": 1}), large)):
        store.put(key, tensors)
        remote.send(key, store)
        assert remote.fetch(key, local).new
        assert {name: t.dtype for name, t in local.get(key).tensors.items()} == {n: t.dtype for n, t in tensors.items()}


def test_a_header_that_lies(local: LocalStore, tmp_path: Path) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 8]}}).encode()
    store = LocalStore(tmp_path / "writer")
    store.put(KEY, files={"adapter_model.safetensors": struct.pack("<Q", len(text)) + text + bytes(8)})
    draft = draft_blob(store.layout, [struct.pack("<Q", len(text)) + text + bytes(8)])
    remote = RemoteStore(f"memory://{tmp_path.name}-header")
    content = replace(manifest := store.peek(KEY), blobs={"adapter_model.safetensors": draft.blob}).to_bytes()
    assert manifest.blobs["adapter_model.safetensors"] == draft.blob
    remote.transport.put(ENTRY, content)
    remote.transport.upload(blob_name(draft.blob), draft.path)
    refused(remote, local, "is no safetensors file")


# --- the way there ---------------------------------------------------------------------------------------------------


def test_a_server_that_never_answers(bucket: Bucket, local: LocalStore) -> None:
    with Silent() as silent:
        remote = RemoteStore(bucket.url, timeout=PATIENCE, **bucket.options(silent.port))
        refused(remote, local, "cannot be read in the store", RemoteError)
        asked = silent.asked
        store = Store(local.layout.root, remote)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for number in range(200):
                assert store.get(f"key-{number}") is None
                assert list(store.keys("some-tag")) == []
        assert silent.asked <= asked + 4  # one attempt, then it is left alone


def test_a_protocol_that_waits_for_ever(local: LocalStore) -> None:
    """Some have no timeouts of their own."""
    end = threading.Event()

    class Stuck(Connection):
        def open(self, *_: Any) -> None:
            end.wait(60)

    remote = RemoteStore("memory://stuck", timeout=PATIENCE)
    remote.transport._connection = Stuck(None, "", "memory")
    refused(remote, local, "no answer within 1 s", RemoteError)
    end.set()


def test_each_trouble_is_told_once(full: Bucket, local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = manifest_of(full).blobs["tensors.safetensors"]
    full.write(blob_name(blob), bytes(blob.size))
    store = Store(local.layout.root, RemoteStore(full.url, **full.options()))
    now = time.monotonic()
    with pytest.warns(UserWarning, match="in place of the") as told:
        assert store.get(KEY) is None
    monkeypatch.setattr(time, "monotonic", lambda: now + 1000)  # it is tried again then
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.get(KEY) is None
    assert len(told) == 1


def test_nobody_listens(bucket: Bucket, local: LocalStore) -> None:
    with Silent() as silent:
        port = silent.port
    remote = RemoteStore(bucket.url, timeout=60, **bucket.options(port))
    refused(remote, local, "check its address, your access and the network", RemoteError)
    local.put("mine", files={"a": b"1"})
    with pytest.raises(RemoteError):
        remote.send("mine", local)


def test_a_server_that_fails(full: Bucket, local: LocalStore) -> None:
    def answer(_method: str, _path: str) -> Iterator[bytes]:
        yield reply(
            b"<Error><Code>InternalError</Code><Message>We broke</Message></Error>", "500 Internal Server Error"
        )

    with Http(answer) as server:
        remote = RemoteStore(full.url, timeout=60, attempts=3, **full.options(server.port))
        with pytest.raises(RemoteError, match="cannot be read"):
            remote.peek(KEY)
        assert len(server.asked) == 3
        refused(RemoteStore(full.url, timeout=60, **full.options(server.port)), local, "cannot be read", RemoteError)


def test_a_failure_by_chance_is_overcome(full: Bucket, local: LocalStore) -> None:
    port = int(full.endpoint.rpartition(":")[2])
    with Proxy(port) as proxy:
        failures = iter([True, True])
        proxy.fault = lambda piece: None if next(failures, False) else piece
        remote = RemoteStore(full.url, timeout=60, **full.options(proxy.port))
        assert remote.fetch(KEY, local).new
    assert local.get(KEY) is not None


def test_an_answer_that_breaks_off(full: Bucket, local: LocalStore) -> None:
    """The head promises a whole blob; half of it comes, and the line is dead, every time."""
    port = int(full.endpoint.rpartition(":")[2])
    with Proxy(port) as proxy:
        got = 0

        def cut(piece: bytes) -> bytes | None:
            nonlocal got
            got = len(piece) if piece.startswith(b"HTTP/1.1") else got + len(piece)
            return piece if got < 1 << 20 else None

        proxy.fault = cut
        remote = RemoteStore(full.url, timeout=60, attempts=2, **full.options(proxy.port))
        refused(remote, local, "cannot be read in the store", RemoteError)


def test_a_server_that_stalls_in_the_middle(full: Bucket, local: LocalStore) -> None:
    port = int(full.endpoint.rpartition(":")[2])
    with Proxy(port) as proxy:
        got = 0

        def stall(piece: bytes) -> bytes:
            nonlocal got
            got += len(piece)
            return piece if got < 1 << 20 else b""

        remote = RemoteStore(full.url, timeout=60, **full.options(proxy.port))
        assert remote.peek(KEY) is not None
        proxy.fault, remote.transport.timeout = stall, PATIENCE
        with pytest.raises(RemoteError, match="cannot be read"):
            remote.fetch(KEY, local)
        nothing_is_left(local)


def test_a_server_that_goes_away_during_a_download(full: Bucket, local: LocalStore) -> None:
    port = int(full.endpoint.rpartition(":")[2])
    proxy = Proxy(port)
    with proxy:

        def leave(piece: bytes) -> bytes | None:
            if len(piece) > 10_000:  # a blob
                proxy._listening.close()
                proxy.hang_up()
                return None
            return piece

        proxy.fault = leave
        remote = RemoteStore(full.url, timeout=60, **full.options(proxy.port))
        with pytest.raises(RemoteError, match="cannot be read"):
            remote.fetch(KEY, local)
    nothing_is_left(local)


@pytest.mark.parametrize("what", ["entries", "blobs"])
@pytest.mark.parametrize("protocol", ["s3", "http"])
def test_a_file_without_an_end(full: Bucket, local: LocalStore, what: str, protocol: str) -> None:
    sent = 0

    def answer(_method: str, path: str) -> Iterator[bytes]:
        nonlocal sent
        name = path.partition("/store/")[2].partition("?")[0]
        if not name.startswith(what):
            try:
                yield reply(full.read(name))
            except full.client.exceptions.NoSuchKey:
                yield reply(b"<Error><Code>NoSuchKey</Code></Error>", "404 Not Found")
            return
        yield f"HTTP/1.1 200 OK\r\nContent-Length: {1 << 50}\r\nConnection: close\r\n\r\n".encode()
        for _ in range(1 << 14):  # 16 GiB, which nobody takes
            sent += 1 << 20
            yield bytes(1 << 20)

    with Http(answer) as server:
        if protocol == "s3":
            remote = RemoteStore(full.url, timeout=60, **full.options(server.port))
        else:
            remote = RemoteStore(server.url, timeout=60)
        refused(remote, local, "is longer than the")
    assert sent < 4 * (MAX_BYTES + (64 << 20))


def test_a_list_without_an_end(bucket: Bucket, local: LocalStore) -> None:
    """Every page of an S3 listing names a next one."""

    def answer(_method: str, path: str) -> Iterator[bytes]:
        if "list-type" not in path:
            yield reply(b"<Error><Code>NoSuchKey</Code></Error>", "404 Not Found")
            return
        page = (
            '<?xml version="1.0"?><ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>again'
            "</NextContinuationToken><KeyCount>1</KeyCount><Contents><Key>store/entries/a.json</Key><Size>1</Size>"
            "</Contents></ListBucketResult>"
        )
        yield reply(page.encode())

    with Http(answer) as server:
        remote = RemoteStore(bucket.url, timeout=60, **bucket.options(server.port))
        assert remote.peek("a") is None
        remote.transport.timeout = 0.3
        with pytest.raises(RemoteError, match="cannot be listed"):
            list(remote.keys())
        asked = len(server.asked)
        time.sleep(1)
        assert len(server.asked) <= asked + 1  # it was given up, not left running


def test_names_in_a_list_lead_nowhere(bucket: Bucket) -> None:
    def answer(_method: str, path: str) -> Iterator[bytes]:
        if "list-type" not in path:
            yield reply(b"", "404 Not Found")
            return
        names = ["../../etc/passwd", "..json", "a/../../b.json", "ok.json", "x\x1b[2J.json", "-rf.json"]
        contents = "".join(f"<Contents><Key>store/entries/{n}</Key><Size>1</Size></Contents>" for n in names[:4])
        yield reply(f'<?xml version="1.0"?><ListBucketResult>{contents}</ListBucketResult>'.encode())

    with Http(answer) as server:
        remote = RemoteStore(bucket.url, timeout=60, **bucket.options(server.port))
        assert "ok" in set(remote.keys())
        assert all("/" not in key and "." not in key for key in remote.keys())  # noqa: SIM118 - no mapping


def test_clocks_that_differ(full: Bucket, local: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_lie(full, lambda manifest: replace(manifest, created=time.time() + 1e9))
    remote = RemoteStore(full.url, **full.options())
    store = Store(local.layout.root, remote)
    assert store.peek("missing") is None
    for offset in (-1e9, 1e8, -1e6):
        now = time.time() + offset
        monkeypatch.setattr(time, "time", lambda now=now: now)
        assert store.peek(KEY) is not None
        assert store.peek("missing") is None
    monkeypatch.undo()
    assert store.get(KEY) is not None
    publish_lie(full, lambda manifest: replace(manifest, created=-1e9))
    other = LocalStore(local.layout.root / "other")
    assert remote.fetch(KEY, other).new


def test_a_server_that_finds_our_clock_wrong(full: Bucket, local: LocalStore) -> None:
    def answer(_method: str, _path: str) -> Iterator[bytes]:
        body = b"<Error><Code>RequestTimeTooSkewed</Code><Message>The difference is too large</Message></Error>"
        yield reply(body, "403 Forbidden")

    with Http(answer) as server:
        remote = RemoteStore(full.url, timeout=60, **full.options(server.port))
        refused(remote, local, "The difference is too large", RemoteError)


def test_our_own_disk_is_not_the_fault_of_the_other_side(
    full: Bucket, local: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = RemoteStore(full.url, **full.options())

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smartinit.store.durable.os.fsync", no_space)
    with pytest.raises(StoreError, match="cannot write to the store") as caught:
        remote.fetch(KEY, local)
    assert not isinstance(caught.value, RemoteError)
    monkeypatch.undo()
    assert list(local.keys()) == []
    assert remote.fetch(KEY, local).new


def test_a_message_has_one_line_and_an_end(bucket: Bucket) -> None:
    def answer(_method: str, _path: str) -> Iterator[bytes]:
        body = b"<Error><Code>Odd</Code><Message>" + "line\n\u202ered ".encode() * 1000 + b"</Message></Error>"
        yield reply(body, "400 Bad Request")

    with Http(answer) as server:
        transport = Transport(bucket.url, bucket.options(server.port), timeout=60, attempts=1)
        with pytest.raises(RemoteError, match="line") as caught:
            transport.read_small("x", 10)
    assert "\n" not in str(caught.value)
    assert "\u202e" not in str(caught.value)
    assert len(str(caught.value)) < 500
