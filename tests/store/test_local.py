"""A store in a folder: what put and get promise to one process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from faulty import Steps, audit, entry_files, watched

from smartinit.errors import ArgumentError, ArtefactError, ConfigError, MissingFileError, StoreError, UnknownNameError
from smartinit.store import Key, Store
from smartinit.store import manifest as manifests
from smartinit.store.leases import leased_keys
from smartinit.store.local import LocalStore

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


@pytest.fixture
def store(ram):
    return LocalStore(ram / "store")


def everything(root):
    """All files of a store and their bytes."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_what_is_put_is_got(store):
    key = Key("statistic", {"model": "m", "rows": [1, 2]})
    tensors = {"a": torch.randn(3, 4), "b.c": torch.arange(5)}
    put = store.put(key, tensors, {"rank": 16}, files={"start/x.json": b"{}", "empty": b""}, tags=["one", "two"])
    assert put.kind == "statistic"
    assert put.leaves == key.leaves
    with LocalStore(store.layout.root).get(key.digest) as entry:
        assert entry.key == key.digest
        assert entry.manifest == put
        assert entry.meta == {"rank": 16}
        assert entry.tensors.keys() == tensors.keys()
        assert all(torch.equal(entry.tensors[name], tensor) for name, tensor in tensors.items())
        assert bytes(entry.content("start/x.json")) == entry.files["start/x.json"].read_bytes() == b"{}"
        assert leased_keys(store.layout) == {key.digest}
    assert leased_keys(store.layout) == set()
    assert [list(store.keys(tag)) for tag in (None, "one", "two", "three")] == [[key.digest]] * 3 + [[]]
    assert key in store
    assert "other" not in store
    assert 3 not in store


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7)], ids=str)
def test_every_dtype_and_shape(store, dtype, shape):
    tensor = torch.rand(shape).mul(100).to(dtype)
    store.put("k", {"t": tensor})
    found = store.get("k").tensors["t"]
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert found.contiguous().reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_unusual_tensors(store):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "expanded": torch.ones(1).expand(50),
        "shared": base,
        "shared again": base,
        "parameter": torch.nn.Parameter(base),
        "conjugate": torch.view_as_complex(base.reshape(12, 2).clone()).conj(),
        "négative é\n": torch.ones(2, dtype=torch.complex64).conj().imag,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "": torch.zeros(1),
    }
    store.put("k", tensors)
    found = store.get("k").tensors
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name].nan_to_num(7), tensor.nan_to_num(7)), name
    found["shared"].zero_()
    assert torch.equal(base, torch.arange(24.0).reshape(4, 6))
    assert torch.equal(store.get("k").tensors["shared"], base), "a private map"


def test_no_tensors_is_told(store):
    store.put("k", files={"a": b"b"})
    with pytest.raises(ArtefactError, match="the entry 'k' holds a, but no tensors"):
        _ = store.get("k").tensors
    with pytest.raises(UnknownNameError, match="has no file 'b'; it has a"):
        store.get("k").content("b")
    store.put("none", {})
    assert store.get("none").tensors == {}


BAD = {
    "meta_list": (dict(meta=[1]), ConfigError, "is not sound"),
    "meta_object": (dict(meta={"a": object()}), ArgumentError, "JSON values only"),
    "meta_nan": (dict(meta={"a": float("nan")}), ArgumentError, "JSON values only"),
    "meta_long": (dict(meta={"a": "x" * (manifests.MAX_BYTES // 2)}), ConfigError, "give large values as tensors"),
    "sparse": (
        dict(tensors={"good": torch.ones(9), "bad": torch.ones(2, 2).to_sparse()}),
        ArgumentError,
        "dense tensor",
    ),
    "on_meta": (dict(tensors={"bad": torch.ones(2, device="meta")}), ArgumentError, "with values"),
    "dtype": (dict(tensors={"bad": torch.ones(2, dtype=torch.complex128)}), ArgumentError, "complex128"),
    "no_tensor": (dict(tensors={"bad": [1.0]}), ArgumentError, "dense tensor"),
    "no_mapping": (dict(tensors=[torch.ones(1)]), ArgumentError, "mapping from names"),
    "file_name": (dict(files={"../x": b""}), ConfigError, "the file name '../x'"),
    "absolute": (dict(files={"/x": b""}), ConfigError, "the file name '/x'"),
    "file_text": (dict(files={"x": "text"}), ArgumentError, "expected bytes or a Path"),
    "tags_text": (dict(tags="all"), ArgumentError, "expected a list"),
    "tag_name": (dict(tags=["../x"]), ConfigError, "is no key"),
    "basis": (dict(basis=3), ConfigError, "basis is no text"),
    "two": (dict(tensors={}, files={"tensors.safetensors": b""}), ConfigError, "another one"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_stored_leaves_nothing(store, what):
    options, error, words = BAD[what]
    with pytest.raises(error, match=re.escape(words)):
        store.put("k", **options)
    assert not store.layout.root.exists()
    store.put("k", files={"a": b"b"})
    before = everything(store.layout.root)
    with pytest.raises(error):
        store.put("k2", **options)
    assert everything(store.layout.root) == before


def test_a_missing_file_is_named(store, tmp_path):
    with pytest.raises(MissingFileError, match=r"there is no file at '.*nothing' to be stored as 'x'"):
        store.put("k", files={"x": tmp_path / "nothing"})


def test_the_same_again_changes_nothing(store):
    first = store.put("k", {"a": torch.ones(3)}, {"seconds": 1}, files={"x": b"1"})
    before = everything(store.layout.root)
    assert store.put("k", {"a": torch.ones(3)}, {"seconds": 2}, files={"x": b"1"}) == first
    after = everything(store.layout.root)
    assert after.pop("used/k") == b""
    assert after == before


def test_a_differing_result_is_kept_aside(store):
    first = store.put("k", files={"a": b"1"})
    for _ in range(2):
        with pytest.warns(UserWarning, match="another result for the entry 'k'.*not deterministic"):
            assert store.put("k", files={"a": b"2"}) == first
    assert len(list(store.layout.aside.iterdir())) == 1
    with store.get("k", tensors=False) as entry:
        assert bytes(entry.content("a")) == b"1"


def test_another_basis_is_no_contradiction(store):
    first = store.put("k", files={"a": b"1"}, basis="small")
    assert store.put("k", files={"a": b"2"}, basis="large") == first
    assert not store.layout.aside.exists()


def test_only_what_is_compared_must_be_equal(store):
    first = store.put("k", files={"a": b"1", "timings": b"1 s"})
    assert store.put("k", files={"a": b"1", "timings": b"2 s"}, compare=["a"]) == first
    with pytest.warns(UserWarning, match="not deterministic"):
        store.put("k", files={"a": b"2", "timings": b"1 s"}, compare=["a"])


def test_replace(store):
    store.put("k", files={"a": b"1"})
    store.put("k", files={"a": b"2"}, replace=True)
    with store.get("k", tensors=False) as entry:
        assert bytes(entry.content("a")) == b"2"
    assert not store.layout.aside.exists()


def test_remove(store):
    assert store.remove("k") is False
    assert not store.layout.root.exists()
    store.put("k", files={"a": b"1"}, tags=["all"])
    assert store.remove("k") is True
    assert store.remove("k") is False
    assert store.get("k") is None
    assert [*store.keys(), *store.keys("all")] == []


def test_an_entry_that_lost_a_blob_is_absent_and_is_put_again(store):
    blob = store.put("k", files=entry_files(1)).blobs["own"]
    store.layout.blob(blob.sha256).unlink()
    assert store.get("k", tensors=False) is None
    assert "k" not in store
    store.put("k", files=entry_files(1))
    assert "k" in store


def test_keys_and_names_as_long_as_they_may_be(store):
    key, tag = "k" * 128, "t" * 128
    file = f"{'d' * 100}/{'f' * 150}"
    store.put(key, {"t": torch.ones(1)}, files={file: b"x"}, tags=[tag])
    with store.get(key) as entry, Store(store.layout.root).single_flight(key) as held:
        assert held
        assert bytes(entry.content(file)) == b"x"
    assert list(store.keys(tag)) == [key]
    with pytest.warns(UserWarning, match="not deterministic"):
        store.put(key, {"t": torch.zeros(1)})
    with pytest.raises(ConfigError, match="is no key"):
        store.put("k" * 129)
    store.put("only-meta", meta={"a": 1})
    assert store.get("only-meta").meta == {"a": 1}


def test_places_that_are_no_store(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"is a file; a store is a folder"):
        LocalStore(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert LocalStore(tmp_path / "dangling").get("k") is None
    with pytest.raises(StoreError, match="cannot write to the store"):
        LocalStore(tmp_path / "dangling").put("k", files={"a": b"1"})
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(StoreError, match="cannot be read: Not a directory"):
        LocalStore(tmp_path / "file" / "below")


def test_a_link_to_a_folder_is_a_store(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    LocalStore(tmp_path / "link").put("k", files={"a": b"1"})
    assert "k" in LocalStore(tmp_path / "real")


def test_a_store_stays_where_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = LocalStore("here")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.put("k", files={"a": b"1"})
    assert (tmp_path / "here" / "entries" / "k.json").is_file()


def test_looking_makes_nothing(tmp_path):
    store = LocalStore(tmp_path / "store")
    assert store.get("k") is None
    assert store.peek("k") is None
    assert list(store.keys()) == []
    assert not (tmp_path / "store").exists()


def test_a_miss_leaves_no_mark(store):
    store.put("k", files={"a": b"1"})
    before = everything(store.layout.root)
    assert store.get("other") is None
    assert everything(store.layout.root) == before


def test_a_read_only_store_is_never_written(store):
    store.put("k", files={"a": b"1"})
    before = everything(store.layout.root)
    reader = LocalStore(store.layout.root, read_only=True)
    assert bytes(reader.get("k", tensors=False).content("a")) == b"1"
    for change in (lambda: reader.put("k2", files={"a": b"1"}), lambda: reader.remove("k")):
        with pytest.raises(StoreError, match="was opened read-only; name another one to write to"):
            change()
    assert everything(store.layout.root) == before


def test_folders_that_are_removed_meanwhile_are_made_again(store):
    for gone in (store.layout.unfinished, store.layout.blobs, store.layout.entries, store.layout.root):
        store.put("k", files=entry_files(1))
        shutil.rmtree(gone)
        store.put("k", files=entry_files(1))
        assert audit(store.layout.root) == []
        assert "k" in store


def test_an_interrupted_put_leaves_nothing_half_done(store):
    store.put("other", files=entry_files(2))
    interrupted = 0
    for step in range(1, 200):
        left = [step]

        def before(_name, _args, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        try:
            with watched(Steps(before)):
                store.put("k", files=entry_files(1))
        except KeyboardInterrupt:
            interrupted += 1
        left_over = list(store.layout.unfinished.iterdir())
        assert len(left_over) <= 1, "one if the interruption came when it was being removed"
        assert audit(store.layout.root) == []
        store.remove("k")
        for path in left_over:
            path.unlink()
        if left[0] > 0:
            break
    assert interrupted > 20


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o022, 0o755, 0o444), (0o077, 0o700, 0o400), (0o002, 0o775, 0o444)], ids=oct
)
def test_the_umask_decides_who_may_read(tmp_path, umask, folder, file):
    before = os.umask(umask)
    try:
        store = LocalStore(tmp_path / "store")
        store.put("k", files={"a": b"1"}, tags=["all"])
    finally:
        os.umask(before)
    paths = [store.layout.root, *store.layout.root.rglob("*")]
    modes = {path.name: path.stat().st_mode & 0o7777 for path in paths}
    assert modes["store"] == modes["entries"] == modes["tmp"] == folder
    assert modes["k.json"] == file


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_colleagues_share_a_folder_of_their_group_whatever_their_umask(tmp_path, umask):
    root = tmp_path / "team"
    root.mkdir()
    root.chmod(0o2770)
    before = os.umask(umask)
    try:
        store = Store(root)
        store.put("k", files={"a": b"1"}, tags=["all"])
        store.local.get("k", tensors=False)
        with store.single_flight("k"):
            pass
    finally:
        os.umask(before)
    for path in root.rglob("*"):
        mode = path.stat().st_mode & 0o7777
        if path.is_dir():
            assert mode == 0o2770, path
        elif path.parent.name in ("used", "all", "leases", "locks"):
            assert mode == 0o660, path
        else:
            assert mode == 0o440, path


def test_the_store_needs_no_torch_for_files(tmp_path):
    code = """
import sys
from smartinit.store import Store
store = Store(sys.argv[1])
store.put("k", files={"a": b"1"})
assert bytes(store.local.get("k", tensors=False).content("a")) == b"1"
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "store"], check=True, timeout=200)


def test_modules_of_one_system_are_not_needed(tmp_path):
    """On Windows there is no fcntl, and os lacks some functions."""
    code = """
import os, sys
sys.modules["fcntl"] = None
for name in ("fchmod", "getuid", "O_NOFOLLOW", "O_NONBLOCK", "preadv", "O_CLOEXEC"):
    delattr(os, name)
from smartinit.store.local import LocalStore
store = LocalStore(sys.argv[1])
store.put("k", files={"a": b"1"})
assert bytes(store.get("k", tensors=False).content("a")) == b"1"
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "store"], check=True, timeout=200)
