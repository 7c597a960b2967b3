from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smartinit.errors import NotStoredError, OutputError, StoreError
from smartinit.store import Store
from smartinit.store.adapters import adapter_folder, copy_adapter, readable_folder

ROOT = Path(__file__).parents[2]
FILES = {"adapter_config.json": b'{"r": 2}', "smartinit.json": b"{}", "README.md": b"# card"}


@pytest.fixture
def tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{n}.lora_A.weight": torch.randn(4, 8, generator=generator) for n in range(3)}


@pytest.fixture
def store(tmp_path, tensors):
    saved = tmp_path / "saved"
    (saved / "start").mkdir(parents=True)
    for name in ("adapter_model.safetensors", "base-00001-of-00001.safetensors", "start/adapter_model.safetensors"):
        save_file(tensors, saved / name)
    files = {path.relative_to(saved).as_posix(): path for path in saved.rglob("*") if path.is_file()}
    store = Store(tmp_path / "cache")
    store.put("art", files=FILES | {"start/adapter_config.json": b"{}"} | files)
    return store


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def blobs(store: Store) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in store.local.layout.blobs.glob("*/*")}


def test_the_folder_has_every_file_under_its_name(store, tensors):
    folder = adapter_folder(store.local, "art")
    assert folder == store.local.layout.adapters / "art"
    assert content(folder) == {name: bytes(store.get("art").content(name)) for name in store.peek("art").blobs}
    read = load_file(folder / "adapter_model.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_it_is_made_once(store):
    folder = adapter_folder(store.local, "art")
    before = {path: path.stat().st_ino for path in [folder, *folder.rglob("*")]}
    assert adapter_folder(store.local, "art") == folder
    assert {path: path.stat().st_ino for path in [folder, *folder.rglob("*")]} == before
    assert not list(store.local.layout.unfinished.iterdir())


@pytest.mark.parametrize("how", ["truncated", "replaced", "one bit", "in place"])
def test_a_trainer_that_saves_over_it_changes_no_blob_and_loses_nothing(store, how):
    folder, before = adapter_folder(store.local, "art"), blobs(store)
    path = folder / "adapter_model.safetensors"
    right = path.read_bytes()
    path.chmod(0o644)
    if how == "truncated":
        path.write_bytes(b"trained")
    elif how == "replaced":
        path.unlink()
        path.write_bytes(b"trained")
    elif how == "one bit":
        path.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    else:
        with path.open("r+b") as file:
            file.write(b"trained")
    trained = path.read_bytes()
    assert blobs(store) == before
    assert store.verify() == []
    with pytest.warns(UserWarning, match="let trainers save elsewhere"):
        assert adapter_folder(store.local, "art") == folder
    assert path.read_bytes() == right
    (aside,) = store.local.layout.quarantine.iterdir()
    assert (aside / "adapter_model.safetensors").read_bytes() == trained


def test_files_that_were_added_stay(store):
    folder = adapter_folder(store.local, "art")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "x").write_text("mine")
    assert adapter_folder(store.local, "art") == folder
    assert (folder / "checkpoint-5" / "x").read_text() == "mine"


@pytest.mark.parametrize("what", ["file", "folder", "everything", "link to the right file", "link to a folder"])
def test_what_is_missing_or_linked_is_made_again(store, tmp_path, what):
    folder = adapter_folder(store.local, "art")
    right = content(folder)
    path = folder / "adapter_config.json"
    if what == "file":
        path.unlink()
    elif what == "folder":
        for inner in (folder / "start").iterdir():
            inner.unlink()
        (folder / "start").rmdir()
    elif what == "everything":
        folder.rename(tmp_path / "elsewhere")
        folder.write_text("a file")
    elif what == "link to the right file":
        path.rename(tmp_path / "moved")
        path.symlink_to(tmp_path / "moved")
    else:
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    with pytest.warns(UserWarning, match="was moved to"):
        adapter_folder(store.local, "art")
    assert content(folder) == right
    assert not any(path.is_symlink() for path in [folder, *folder.rglob("*")])


def test_a_copy_is_the_users_own(store, tmp_path):
    before = blobs(store)
    out = copy_adapter(store.local, "art", tmp_path / "deep" / "out")
    for path in out.rglob("*"):
        assert path.stat().st_nlink == 1 or path.is_dir()
        if path.is_file():
            assert path.stat().st_mode & 0o200
            path.write_bytes(b"mine")
    assert blobs(store) == before
    with pytest.raises(OutputError, match="exists already"):
        copy_adapter(store.local, "art", out)
    copy_adapter(store.local, "art", out, force=True)
    assert content(out) == content(adapter_folder(store.local, "art"))


def test_another_folder_is_never_replaced(store, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").write_text("mine")
    with pytest.raises(OutputError):
        copy_adapter(store.local, "art", tmp_path / "mine", force=True)
    with pytest.raises(OutputError):
        adapter_folder(store.local, "art", out=tmp_path / "mine")
    assert content(tmp_path / "mine") == {"x": b"mine"}


def test_a_place_that_is_named_is_used_again_but_not_replaced(store, tmp_path):
    out = adapter_folder(store.local, "art", out=tmp_path / "out")
    inode = out.stat().st_ino
    assert adapter_folder(store.local, "art", out=tmp_path / "out").stat().st_ino == inode
    (out / "adapter_config.json").write_text("changed")
    with pytest.raises(OutputError):
        adapter_folder(store.local, "art", out=out)
    assert (out / "adapter_config.json").read_text() == "changed"


def test_a_read_only_store_gives_what_it_has(store, tmp_path):
    closed = Store(store.local.layout.root, read_only=True).local
    with pytest.raises(StoreError, match="--out"):
        adapter_folder(closed, "art")
    assert not store.local.layout.adapters.exists()
    expected = content(adapter_folder(closed, "art", out=tmp_path / "out"))
    folder = adapter_folder(store.local, "art")
    assert adapter_folder(closed, "art") == folder
    assert content(folder) == expected


@pytest.mark.parametrize("call", [adapter_folder, lambda local, key: copy_adapter(local, key, "never made")])
def test_what_is_no_artefact(store, call):
    store.put("statistic", {"a": torch.ones(1)})
    for key in ("missing", "statistic"):
        with pytest.raises(NotStoredError):
            call(store.local, key)
    path = store.local.layout.blob(store.peek("art").blobs["README.md"].sha256)
    path.chmod(0o644)
    path.write_bytes(b"# evil")
    with pytest.warns(UserWarning, match="checksum differs"), pytest.raises(NotStoredError):
        call(store.local, "art")
    assert not Path("never made").exists()


def test_names_that_collide_are_an_error_and_leave_nothing(store):
    store.put("odd", files={"adapter_config.json": b"{}", "start": b"file", "start/x": b"y"})
    with pytest.raises(StoreError):
        adapter_folder(store.local, "odd")
    assert not (store.local.layout.adapters / "odd").exists()
    assert not list(store.local.layout.unfinished.iterdir())


MANY = """
import sys, warnings
warnings.simplefilter("error")
from smartinit.store import Store
from smartinit.store.adapters import adapter_folder
print(adapter_folder(Store(sys.argv[1]).local, "art"))
assert "torch" not in sys.modules
"""


def test_many_processes_make_one_folder_without_torch(store):
    command = [sys.executable, "-c", MANY, str(store.local.layout.root)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(6)
    ]
    told = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 6, told
    assert {out.strip() for out, _ in told} == {str(store.local.layout.adapters / "art")}
    assert content(store.local.layout.adapters / "art").keys() == store.peek("art").blobs.keys()
    assert not list(store.local.layout.unfinished.iterdir())


def test_no_blob_is_shared_with_a_folder(store):
    folder = adapter_folder(store.local, "art")
    inodes = {path.stat().st_ino for path in store.local.layout.blobs.glob("*/*")}
    assert not inodes & {path.stat().st_ino for path in folder.rglob("*")}
    if os.name == "posix":
        assert not any(path.stat().st_mode & 0o222 for path in folder.rglob("*") if path.is_file())


# -- the same result, computed again ----------------------------------------------------------------------------------


def computed_again(store, **changes):
    """The same artefact once more, as another run of the computation leaves it."""
    record = {"version": 1, "plan": {"ranks": 2}, "provenance": {"run": 1}, "timings": {"store": 0.5}} | changes
    there = {name: bytes(store.get("art").content(name)) for name in store.peek("art").blobs}
    told = {"smartinit.json": json.dumps(record).encode(), "README.md": json.dumps(changes).encode()}
    store.put("art", files=there | told, replace=True)


def test_a_folder_of_the_same_result_is_kept(store):
    computed_again(store)
    folder = adapter_folder(store.local, "art")
    before = content(folder)
    computed_again(store, provenance={"run": 2}, timings={})
    assert adapter_folder(store.local, "art") == folder  # a warning would be an error here
    assert content(folder) == before
    assert not store.local.layout.quarantine.exists()


def test_a_folder_whose_record_says_something_else_is_made_again(store):
    computed_again(store)
    folder = adapter_folder(store.local, "art")
    computed_again(store, plan={"ranks": 3})
    with pytest.warns(UserWarning, match="was moved to"):
        adapter_folder(store.local, "art")
    assert json.loads((folder / "smartinit.json").read_text())["plan"] == {"ranks": 3}


# -- stores that cannot be written ------------------------------------------------------------------------------------


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    """The user's folder for caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_what_cannot_be_written_is_read_from_a_place_of_the_users_own(store, cache_home):
    closed = Store(store.local.layout.root, read_only=True).local
    folder = readable_folder(closed, "art")
    assert folder == cache_home / "smartinit" / "adapters" / "art"
    assert content(folder) == {name: bytes(store.get("art").content(name)) for name in store.peek("art").blobs}
    inode = folder.stat().st_ino
    assert readable_folder(closed, "art").stat().st_ino == inode, "it is used again"
    (folder / "adapter_model.safetensors").write_bytes(b"trained")
    assert readable_folder(closed, "art").stat().st_ino != inode, "but not when it was changed"
    assert content(folder)["adapter_model.safetensors"] != b"trained"
    with pytest.raises(NotStoredError):
        readable_folder(closed, "missing")
    assert readable_folder(store.local, "art") == store.local.layout.adapters / "art"


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_a_place_that_others_may_write_to_is_not_used(store, cache_home, tmp_path, monkeypatch):
    (cache_home / "smartinit").mkdir(parents=True)
    (cache_home / "smartinit" / "adapters").symlink_to(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    closed = Store(store.local.layout.root, read_only=True).local
    place = tmp_path / "scratch" / f"smartinit-adapters-{os.getuid()}"
    assert readable_folder(closed, "art") == place / "art"
    place.chmod(0o777)
    with pytest.raises(OutputError, match="XDG_CACHE_HOME"):
        readable_folder(closed, "art")
