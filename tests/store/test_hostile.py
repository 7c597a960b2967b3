"""What someone else may have put into a store: nothing of it is followed, waited for, run or believed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import time
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from smartinit.errors import ArgumentError, ConfigError, SmartinitError, StoreError, VerificationError
from smartinit.formats.safetensors_header import read_header
from smartinit.store import Store
from smartinit.store.blobs import Blob, checksum
from smartinit.store.file_memo import file_sha256
from smartinit.store.keys import Key, canonical, check_name
from smartinit.store.manifest import MAX_BYTES, Manifest
from smartinit.store.verify import verify

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links and pipes as POSIX has them")
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int32)}
SECONDS = 60  # much more than any of this takes, even on a busy machine


class Waited(Exception):  # noqa: N818 - no error of the store's
    pass


@contextmanager
def at_most(seconds: int):
    def stop(*_: object) -> None:
        raise Waited(f"still not back after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def _never_waits():
    with at_most(SECONDS):
        yield


@pytest.fixture
def outside(tmp_path):
    """A folder of the victim's own; whatever happens, it stays as it is."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "secret").write_text("mine")
    os.utime(folder / "secret", (1e9, 1e9))
    before = listing(folder)
    yield folder
    assert listing(folder) == before


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "cache")
    store.put("key", TENSORS, {"x": 1}, files={"note.txt": b"a note", "start/more.json": b"{}"}, tags=("tag",))
    return store


@pytest.fixture
def later(monkeypatch):
    """Files that were just written may change again: it is later now, and they have not."""
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() + 10**10)


def listing(folder: Path) -> dict[str, object]:
    return {
        str(path.relative_to(folder)): (os.lstat(path).st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in sorted(folder.rglob("*"))
    }


def blob_path(store: Store, file: str = "tensors.safetensors") -> Path:
    return store.local.layout.blob(store.peek("key").blobs[file].sha256)


def seal(values: object) -> bytes:
    """The bytes of a manifest that answers for itself, whatever it says."""
    body = json.dumps(values, separators=(",", ":")).encode()[:-1] if not isinstance(values, bytes) else values
    return body + b',"check":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'


def values_of(store: Store, **changes: object) -> dict[str, object]:
    values = json.loads(store.local.layout.entry("key").read_bytes())
    values.pop("check")
    return values | changes


def place(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def quietly(call):
    """The result, or the error of a kind that callers expect; warnings may be raised, and must be harmless to print."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            result = call()
        except (StoreError, VerificationError, ConfigError) as error:
            result = error
    for text in [*(str(one.message) for one in said), *([str(result)] if isinstance(result, Exception) else [])]:
        assert text.isprintable(), repr(text)
        assert len(text) < 2000
    return result


# --- things in the place of a file --------------------------------------------------------------------------------


def a_link(path, outside):
    path.symlink_to(outside / "secret")


def a_link_to_itself(path, outside):
    path.symlink_to(path)


def a_dangling_link(path, outside):
    path.symlink_to(outside / "not there")


def a_link_to_equal_bytes(path, outside, content):
    copy = path.with_name("copy-of-it")
    copy.write_bytes(content)
    path.symlink_to(copy)


def a_pipe(path, outside):
    os.mkfifo(path)


def a_socket(path, outside):
    server = socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    try:  # names of sockets are short
        os.chdir(path.parent)
        server.bind(path.name)
    finally:
        os.chdir(here)
        server.close()


def a_folder(path, outside):
    (path / "inner").mkdir(parents=True)


def a_device(path, outside):
    try:
        os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices")


def a_link_to_a_device(path, outside):
    path.symlink_to("/dev/zero")


THINGS = [a_link, a_link_to_itself, a_dangling_link, a_pipe, a_socket, a_folder, a_device, a_link_to_a_device]


def put_in_place(thing, path, outside):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    thing(path, outside)


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
@pytest.mark.parametrize("file", ["tensors.safetensors", "note.txt"])
def test_a_blob_that_is_no_file_is_a_miss(store, outside, thing, file):
    put_in_place(thing, blob_path(store, file), outside)
    assert quietly(lambda: store.get("key")) is None
    quietly(store.verify)
    assert quietly(lambda: store.put("key", TENSORS, {"x": 1}, files={"note.txt": b"a note"}, replace=True))
    assert torch.equal(store.get("key").tensors["a"], TENSORS["a"])


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_a_manifest_that_is_no_file_is_a_miss(store, outside, thing):
    put_in_place(thing, store.local.layout.entry("key"), outside)
    assert quietly(lambda: store.peek("key")) is None
    assert quietly(lambda: store.get("key")) is None
    assert "key" not in store
    quietly(store.verify)
    quietly(lambda: store.prune(max_bytes=0, dry_run=True))
    assert quietly(lambda: store.put("key", TENSORS)) is not None
    assert torch.equal(store.get("key").tensors["a"], TENSORS["a"])


@pytest.mark.parametrize("what", ["blob", "manifest"])
def test_not_even_a_link_to_the_right_bytes_is_followed(store, outside, what):
    path = blob_path(store) if what == "blob" else store.local.layout.entry("key")
    content = path.read_bytes()
    path.unlink()
    a_link_to_equal_bytes(path, outside, content)
    assert quietly(lambda: store.get("key")) is None


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_whatever_the_note_of_the_version_is(store, outside, thing):
    put_in_place(thing, store.local.layout.schema, outside)
    found = quietly(lambda: Store(store.local.layout.root))
    assert isinstance(found, (Store, StoreError))


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
@pytest.mark.parametrize("folder", ["used", "pins", "index/tag", "leases", "locks", "aside", "tmp", "quarantine"])
def test_whatever_lies_among_the_marks(store, outside, thing, folder):
    layout = store.local.layout
    names = {"leases": "key.host.1.0", "locks": "key.lock", "aside": "key.0123456789abcdef.json"}
    path = layout.root / folder / names.get(folder, "key")
    path.parent.mkdir(parents=True, exist_ok=True)
    put_in_place(thing, path, outside)
    if path.is_symlink() or path.exists():
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    quietly(lambda: store.put("key", TENSORS, tags=("tag",)))
    assert torch.equal(store.get("key").tensors["a"], TENSORS["a"])
    assert list(store.keys("tag")) in ([], ["key"])
    with store.single_flight("key", timeout=0.2) as held:
        assert held in (True, False)
    quietly(lambda: store.pin("key"))
    quietly(lambda: store.unpin("key"))
    quietly(store.verify)
    quietly(lambda: store.prune(max_bytes=10**9))
    quietly(lambda: store.local.remove("key"))


FOLDERS = (
    "blobs blobs/sha256 entries index used pins leases locks aside quarantine adapters memo tmp".split()  # noqa: SIM905
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_store_one_of_whose_folders_is_a_link_is_refused(store, outside, folder):
    path = store.local.layout.root / folder
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(outside)
    with pytest.raises(StoreError, match="is a link"):
        Store(store.local.layout.root)


def test_the_store_itself_may_be_a_link(store, tmp_path):
    (tmp_path / "elsewhere").symlink_to(store.local.layout.root)
    found = Store(tmp_path / "elsewhere")
    assert torch.equal(found.get("key").tensors["a"], TENSORS["a"])
    found.put("other", TENSORS)
    assert "other" in store


def test_a_link_in_place_of_a_folder_of_blobs_is_not_written_through(store, outside):
    path = blob_path(store)
    shutil.rmtree(path.parent)
    path.parent.symlink_to(outside)
    assert quietly(lambda: store.get("key")) is None
    assert isinstance(quietly(lambda: store.put("key", TENSORS, {"x": 1}, replace=True)), StoreError)
    quietly(store.verify)
    (outside / path.name).write_bytes(b"named as a blob is")
    os.utime(outside / path.name, (1e9, 1e9))
    quietly(lambda: store.prune(max_bytes=0))
    assert (outside / path.name).read_bytes() == b"named as a blob is"
    (outside / path.name).unlink()


def test_a_link_in_place_of_a_folder_of_a_tag_is_not_written_through(store, outside):
    path = store.local.layout.index("tag")
    shutil.rmtree(path)
    path.symlink_to(outside)
    assert isinstance(quietly(lambda: store.put("other", TENSORS, tags=("tag",))), (StoreError, Manifest))
    quietly(lambda: store.prune(max_bytes=0))


def test_a_hard_link_to_a_file_of_the_system_is_not_served(store, tmp_path):
    for source in (Path("/etc/passwd"), tmp_path / "own"):
        if source.parent == tmp_path:
            source.write_text("mine")
        before = source.read_bytes(), source.stat().st_mtime_ns
        path = blob_path(store)
        path.unlink(missing_ok=True)
        try:
            path.hardlink_to(source)
        except OSError:  # another file system, or not allowed
            assert source.parent != tmp_path
            continue
        assert quietly(lambda: store.get("key")) is None
        store.put("key", TENSORS, {"x": 1}, files={"note.txt": b"a note"}, replace=True)
        assert torch.equal(store.get("key").tensors["a"], TENSORS["a"])
        assert (source.read_bytes(), source.stat().st_mtime_ns) == before


# --- names --------------------------------------------------------------------------------------------------------

NAMES = [
    "",
    ".",
    "..",
    "../key",
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:\\x",
    "~root",
    "a\nb",
    "key\n",
    "a\0b",
    "a\x1b[2Jb",
    "\u202etxt",
    "K",
    "é",
    "²",
    "con",
    "nul",
    "com1",
    "-rf",
    ".hidden",
    "a" * 129,
    "x" * 10**6,
    "\ud800",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:20]))
def test_a_name_that_is_no_plain_name_is_refused_everywhere(store, tmp_path, name):
    before = listing(tmp_path)
    calls = [
        lambda: store.get(name),
        lambda: store.peek(name),
        lambda: store.put(name, TENSORS),
        lambda: store.put("new", TENSORS, tags=(name,)),
        lambda: list(store.keys(name)),
        lambda: store.pin(name),
        lambda: store.unpin(name),
        lambda: store.local.remove(name),
    ]
    for call in calls:
        assert isinstance(quietly(call), ConfigError)
    assert isinstance(quietly(lambda: store.put("new", files={f"{name}/..": b"x"})), (ConfigError, VerificationError))
    assert listing(tmp_path) == before
    with pytest.raises(ConfigError):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "a/../b", "a//b", "..", "a\nb", "a\0", "\x1b]0;x\a", "a/b/c", ""]
)
def test_a_manifest_that_names_files_elsewhere_is_not_sound(store, name):
    blob = {"sha256": "0" * 64, "size": 1, "xxh3": "0" * 32}
    place(store.local.layout.entry("key"), seal(values_of(store, blobs={name: blob})))
    assert quietly(lambda: store.get("key")) is None
    assert not store.local.layout.entry("key").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"blobs": {"a": {"sha256": "../../../etc/passwd", "size": 1, "xxh3": "0" * 32}}},
        {"blobs": {"a": {"sha256": "/" * 64, "size": 1, "xxh3": "0" * 32}}},
        {"blobs": {"a": {"sha256": "0" * 64, "size": -1, "xxh3": "0" * 32}}},
        {"blobs": {"a": {"sha256": "0" * 64, "size": 2**63, "xxh3": "0" * 32}}},
        {"blobs": {"a": {"sha256": "0" * 64, "size": True, "xxh3": "0" * 32}}},
        {"blobs": {"a": {"sha256": "0" * 64, "size": 1.0, "xxh3": "0" * 32}}},
        {"blobs": {"a": {"sha256": "0" * 64, "size": 1, "xxh3": "0" * 32, "\x1b[2J\n": 1}}},
        {"blobs": {"a": {"sha256": "0" * 64}}},
        {"blobs": [1]},
        {"blobs": None},
        {"\x1b[31m": 1},
        {"key": "../key"},
        {"key": "other"},
        {"key": None},
        {"tags": ["../x"]},
        {"tags": "abc"},
        {"tags": [["a"]]},
        {"tags": {"a": 1}},
        {"tags": ["\x1b[2J" * 10**5]},
        {"meta": []},
        {"leaves": "x"},
        {"writer": None},
        {"kind": 3},
        {"basis": ["x"]},
        {"created": "now"},
        {"created": True},
        {"created": 1e300},
        {"created": -1e300},
        {"created": 10**400},
        {"created": float("inf")},
        {"created": float("nan")},
        {"meta": {"x": float("nan")}},
        {"schema": 2},
        {"schema": "\x1b[2J" * 10**5},
        {"schema": True},
        {"schema": None},
    ],
    ids=lambda changes: ascii(changes)[:60],
)
def test_a_manifest_that_says_what_no_writer_says(store, changes):
    place(store.local.layout.entry("key"), seal(values_of(store, **changes)))
    found = quietly(lambda: store.get("key"))
    assert found is None or (isinstance(found, StoreError) and "schema" in changes)
    quietly(store.verify)
    quietly(lambda: store.prune(max_bytes=0, dry_run=True))


MANIFESTS = {
    "nothing": b"",
    "no JSON": seal(b"{x"),
    "a list": seal(b"["),
    "a number": seal(b"3"),
    "only itself": seal(b'{"schema":1'),
    "deep lists": seal(b'{"schema":1,"x":' + b"[" * 100_000),
    "deep mappings": seal(b'{"schema":1,"x":' + b'{"a":' * 100_000),
    "a long number": seal(b'{"schema":1,"x":' + b"9" * 1_000_000),
    "many long numbers": seal(b'{"schema":1,"x":[' + b",".join([b"9" * 4000] * 1000) + b"]"),
    "a number without end": seal(b'{"schema":1,"created":1e999999999'),
    "no UTF-8": seal(b'{"schema":1,"\xff\xfe":1'),
    "UTF-16": seal('{"schema":1'.encode("utf-16")),
    "half a pair": seal(b'{"schema":1,"\\ud800":1'),
    "pickle": pickle.dumps({"a": 1}),
    "zeros": bytes(1000),
    "sparse": None,
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_of_any_bytes_is_a_miss(store, content):
    path = store.local.layout.entry("key")
    if content is None:  # 33 MB and a TB
        path.unlink()
        with path.open("wb") as file:
            file.truncate(2**40)
    else:
        place(path, content)
    assert quietly(lambda: store.get("key")) is None
    assert not path.exists()
    assert "key" not in store


def test_a_manifest_of_33_megabytes_is_not_read(store):
    values = values_of(store, meta={"x": "y" * (33 << 20)})
    assert len(seal(values)) > MAX_BYTES
    place(store.local.layout.entry("key"), seal(values))
    assert quietly(lambda: store.get("key")) is None


def test_what_could_not_be_read_again_is_not_written(store):
    with pytest.raises(ArgumentError, match="at most"):
        store.put("long", TENSORS, {"x": "y" * MAX_BYTES})
    deep: object = 1
    for _ in range(200):
        deep = [deep]
    with pytest.raises(ArgumentError, match="in each other"):
        store.put("deep", TENSORS, {"x": deep})
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(ArgumentError):
        store.put("deeper", TENSORS, {"x": deep})
    assert set(store.keys()) == {"key"}


def test_the_deepest_that_may_be_written_is_read(store):
    deep: object = []
    for _ in range(60):
        deep = [deep]
    store.put("deep", TENSORS, {"x": deep})
    assert store.get("deep").meta["x"] == deep


# --- blobs whose manifest vouches for them ------------------------------------------------------------------------


def entry_of(store: Store, content: bytes, file: str = "tensors.safetensors") -> Path:
    """An entry as an attacker writes it: every digest right."""
    sha256 = hashlib.sha256(content).hexdigest()
    blob = Blob(sha256, len(content), checksum(memoryview(content)))
    path = store.local.layout.blob(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    manifest = Manifest("key", {file: blob})
    place(store.local.layout.entry("key"), manifest.to_bytes())
    return path


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def torch_file(payload: Payload) -> bytes:
    found = io.BytesIO()
    torch.save({"a": payload}, found)
    return found.getvalue()


def zip_file(payload: Payload) -> bytes:
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w") as archive:
        archive.writestr("../../evil", "x")
        archive.writestr("data.pkl", pickle.dumps(payload))
    return found.getvalue()


PICKLES = {"pickle": pickle.dumps, "torch": torch_file, "zip": zip_file}


@pytest.mark.parametrize("make", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("place_of", ["tensors", "file", "manifest", "mark", "schema", "lock", "memo"])
def test_pickles_are_never_opened(store, tmp_path, make, place_of, later):
    done = tmp_path / "payload was run"
    content, layout = make(Payload(done)), store.local.layout
    if place_of in ("tensors", "file"):
        entry_of(store, content, "tensors.safetensors" if place_of == "tensors" else "model.bin")
    elif place_of == "memo":
        subject = tmp_path / "data.jsonl"
        subject.write_text("{}\n")
        os.utime(subject, (1e9, 1e9))
        sha256 = file_sha256(subject, layout.memo)
        for note in layout.memo.iterdir():
            place(note, content)
        assert file_sha256(subject, layout.memo) == sha256
    else:
        paths = {"manifest": layout.entry("key"), "mark": layout.used / "key", "schema": layout.schema}
        path = paths.get(place_of, layout.locks / "key.lock")
        path.parent.mkdir(exist_ok=True)
        place(path, content)
        with store.single_flight("key", timeout=1):
            pass
    entry = quietly(lambda: Store(layout.root).get("key"))
    if place_of == "file":
        assert entry.files["model.bin"].read_bytes() == content
        with pytest.raises(SmartinitError):
            _ = entry.tensors
    elif place_of in ("tensors", "manifest"):
        assert entry is None
    quietly(lambda: verify(store.local, repair=True))
    quietly(lambda: store.prune(max_bytes=0))
    assert not done.exists()
    assert not (tmp_path / "evil").exists()
    pickle.loads(pickle.dumps(Payload(done))).close()  # noqa: S301 - it would have
    assert done.exists()


def item(start, stop, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


HEADERS = {
    "empty file": b"",
    "seven bytes": bytes(7),
    "length without a header": struct.pack("<Q", 100),
    "the longest length": b"\xff" * 8 + b"{}",
    "2^63": struct.pack("<Q", 2**63) + b"{}",
    "a header that is short by one": struct.pack("<Q", 3) + b"{}",
    "overlapping": safetensors({"a": item(0, 4), "b": item(2, 6)}, bytes(6)),
    "negative": safetensors({"a": item(-4, 4, shape=[8])}, bytes(4)),
    "backwards": safetensors({"a": item(4, 0, shape=[0])}, bytes(4)),
    "out of the file": safetensors({"a": item(0, 400)}, bytes(4)),
    "huge": safetensors({"a": item(0, 2**63)}, bytes(4)),
    "beyond 64 bits": safetensors({"a": item(0, 2**64 + 4, shape=[2**64 + 4])}, bytes(4)),
    "a product that overflows": safetensors({"a": item(0, 0, shape=[2**32, 2**32, 0])}),
    "strides that overflow": safetensors({"a": item(0, 0, "F64", shape=[0, 2**62, 2**62, 2**62])}),
    "many dimensions": safetensors({"a": item(0, 1, shape=[1] * 100_000)}, b"x"),
    "64 dimensions too many": safetensors({"a": item(0, 1, shape=[1] * 65)}, b"x"),
    "long numbers": safetensors(b'{"a":{"dtype":"U8","shape":[' + b"9" * 10**6 + b'],"data_offsets":[0,1]}}', b"x"),
    "numbers of the longest kind": safetensors({"a": item(0, 1, shape=[10**4000] * 500)}, b"x"),
    "fractions": safetensors({"a": item(0, 1, shape=[1.0])}, b"x"),
    "true": safetensors({"a": item(0, 1, shape=[True])}, b"x"),
    "not a number": safetensors(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"x"),
    "text": safetensors({"a": item(0, 1, shape="1")}, b"x"),
    "a mapping": safetensors({"a": item(0, 1, shape={"1": 1})}, b"x"),
    "three places": safetensors({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}}, b"x"),
    "unknown dtype": safetensors({"a": item(0, 1, "\x1b[2J\n")}, b"x"),
    "a dtype that is a list": safetensors({"a": item(0, 1, ["U8"])}, b"x"),
    "names of a terminal's": safetensors({"\x1b[2J\n\0": item(0, 2)}, b"x"),
    "a long name": safetensors({"n" * 10**6: item(0, 2)}, b"x"),
    "duplicated": safetensors(b'{"a":%b,"a":%b}' % ((json.dumps(item(0, 1)).encode(),) * 2), b"x"),
    "metadata twice": safetensors(b'{"__metadata__":{},"__metadata__":{"a":"b"}}'),
    "metadata that is a list": safetensors({"__metadata__": ["a"]}),
    "metadata of numbers": safetensors({"__metadata__": {"a": 1}}),
    "deep": safetensors(b'{"a":' * 100_000),
    "deep lists": safetensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "no UTF-8": safetensors(b'{"\xff":1}'),
    "a list of all": safetensors([1]),
    "null": safetensors(b"null"),
    "bytes left": safetensors({"a": item(0, 1)}, b"xy"),
    "a header of 100 MB": struct.pack("<Q", 100 << 20) + b" " * (100 << 20),
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_broken_safetensors_file_is_a_miss_although_all_digests_are_right(store, content):
    path = entry_of(store, content)
    assert quietly(lambda: store.get("key")) is None
    assert not path.exists(), "it lies in quarantine"
    assert not isinstance(quietly(store.verify), Exception)


FINE = {
    "no tensors": (safetensors({}), {}),
    "zero dimensions": (
        safetensors({"a": item(0, 4, "F32", shape=[])}, struct.pack("<f", 2)),
        {"a": torch.tensor(2.0)},
    ),
    "no elements": (safetensors({"a": item(0, 0, "F32", shape=[3, 0, 2])}), {"a": torch.zeros(3, 0, 2)}),
    "names as they come": (safetensors({"\x1b[2J\n": item(0, 1)}, b"\1"), {"\x1b[2J\n": torch.ones(1).byte()}),
    "not aligned": (
        safetensors(b'{"a":{"dtype":"I32","shape":[1],"data_offsets":[0,4]}}  '[:-1], struct.pack("<i", 7)),
        {"a": torch.tensor([7], dtype=torch.int32)},
    ),
}


@pytest.mark.parametrize(("content", "expected"), FINE.values(), ids=FINE)
def test_odd_but_sound_files_are_read(store, content, expected):
    entry_of(store, content)
    tensors = store.get("key").tensors
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_keys_hold_nothing_but_values():
    for leaves in ({"a": object()}, {1: 2}, {"a": float("nan")}, {"a": {1, 2}}, {"a": b"x"}):
        with pytest.raises(ArgumentError):
            _ = Key("kind", leaves).digest
    assert canonical({"\ud800\n": "é"}).isascii()


def test_a_memo_that_is_no_file_is_not_waited_for(tmp_path, later):
    subject = tmp_path / "data.jsonl"
    subject.write_text("{}\n")
    os.utime(subject, (1e9, 1e9))
    sha256 = file_sha256(subject, tmp_path / "memo")
    notes = list((tmp_path / "memo").iterdir())
    assert notes
    for note in notes:
        note.unlink()
        os.mkfifo(note)
    assert file_sha256(subject, tmp_path / "memo") == sha256


def test_names_in_messages_about_a_remote_entry_are_harmless(tmp_path, store):
    there = Store(tmp_path / "there")
    bad = torch.tensor([float("nan")])
    there.put(Key("artefact", {"a": 1}), {"\x1b[2J\n": bad})
    (sentence,) = quietly(lambda: store.pull(there.local.layout.root)).failed.values()
    assert "NaN" in sentence
    assert sentence.isprintable()
    content = safetensors({"\x1b[2J\n": item(1, 2), "b": item(0, 0)}, b"xy")
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="begins at byte") as told:
        read_header(path)
    assert str(told.value).isprintable()
