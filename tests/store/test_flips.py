"""Bits flip, files end early or go on: every time it is told, nothing of it is served, and the next put mends it."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from faulty import audit, content

from smartinit.store.local import LocalStore

TENSORS = {"a": torch.arange(300.0).reshape(3, 100), "b": torch.ones(7, dtype=torch.bfloat16)}
FILES = {"config.json": b'{"r": 16}', "more.bin": content(3, 9_000), "empty": b""}


def put(store):
    return store.put("k", TENSORS, {"rank": 16, "note": "x" * 50}, files=FILES, tags=["all"])


def served(store):
    """None, or the entry's content, which must be the one that was put."""
    entry = store.get("k")
    if entry is None:
        return False
    with entry:
        assert entry.meta == {"rank": 16, "note": "x" * 50}
        assert entry.tensors.keys() == TENSORS.keys()
        assert all(torch.equal(entry.tensors[name], tensor) for name, tensor in TENSORS.items())
        assert {name: bytes(entry.content(name)) for name in FILES} == FILES
    return True


def flip(data, random_):
    place = random_.randrange(len(data) * 8)
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def cut(data, random_):
    return data[: random_.randrange(len(data))]


def grow(data, random_):
    return data + random_.randbytes(random_.randrange(1, 20))


def zero(data, random_):
    """A block that was never written: zeros up to the end."""
    kept = random_.randrange(len(data))
    return data[:kept] + bytes(len(data) - kept) if any(data[kept:]) else data[:-1] + b"x"


DAMAGE = {"bit flips": flip, "truncations": cut, "additions": grow, "zeros": zero}


def damage(path, change, random_):
    path.chmod(0o644)
    path.write_bytes(change(path.read_bytes(), random_))


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("what", ["blobs", "entries"])
def test_every_damage_is_found_and_none_is_served(ram, what, kind, times, tally, seed):
    random_ = random.Random(seed)
    store = LocalStore(ram / "store")
    put(store)
    count = times(60, 4000) if kind == "bit flips" else times(25, 1000)
    for number in range(count):
        files = [path for path in (ram / "store" / what).rglob("*") if path.is_file() and path.stat().st_size]
        path = random_.choice(sorted(files))
        damage(path, DAMAGE[kind], random_)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert not served(LocalStore(ram / "store")), f"{kind} number {number} of '{path}' was served"
        assert len(caught) == 1
        assert "it was put into quarantine" in str(caught[0].message)
        assert not path.exists()
        assert len(list(store.layout.quarantine.iterdir())) == 1
        for broken in store.layout.quarantine.iterdir():
            broken.unlink()
        put(store)
        assert served(store)
    assert audit(ram / "store") == []
    tally(fault=f"{kind} in {what}", tried=count, found=count, served=0)


@pytest.mark.parametrize("kind", DAMAGE)
def test_other_files_cannot_spoil_an_entry(ram, kind, times, tally, seed):
    """Temporary files, and marks of use, pins, leases, tags: damaged, they change no answer."""
    random_ = random.Random(seed)
    store = LocalStore(ram / "store")
    put(store)
    (store.layout.unfinished / "host.1.half").write_bytes(content(1, 1000))
    count = times(10, 500)
    for _ in range(count):
        with store.get("k"):
            places = (store.layout.used, store.layout.leases, store.layout.index("all"), store.layout.unfinished)
            for path in [path for place in places for path in place.iterdir()]:
                path.chmod(0o644)
                path.write_bytes(DAMAGE[kind](path.read_bytes() or b"abc", random_))
        assert served(LocalStore(ram / "store"))
        assert list(store.keys("all")) == ["k"]
    assert audit(ram / "store") == []
    tally(fault=f"{kind} in temporary files and marks", tried=count, served=0)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_put_mends_what_nobody_has_read_yet(ram, kind, seed):
    random_ = random.Random(seed)
    store = LocalStore(ram / "store")
    manifest = put(store)
    for blob in manifest.blobs.values():
        if blob.size:
            damage(store.layout.blob(blob.sha256), DAMAGE[kind], random_)
    put(store)  # acknowledged: so it must be there
    assert served(store)
    assert audit(ram / "store") == []


def test_a_broken_file_that_was_replaced_meanwhile_is_not_put_aside(ram):
    store = LocalStore(ram / "store")
    path = store.layout.blob(put(store).blobs["more.bin"].sha256)
    which = path.stat()
    path.unlink()
    put(store)
    with pytest.warns(UserWarning, match="it counts as missing"):
        store.discard(path, "it was broken", (which.st_dev, which.st_ino))
    assert served(store)


def test_two_readers_find_the_same_damage(ram):
    store = LocalStore(ram / "store")
    path = store.layout.blob(put(store).blobs["more.bin"].sha256)
    damage(path, flip, random.Random(0))
    real = LocalStore.discard

    class Second(LocalStore):
        def discard(self, *args):
            with pytest.warns(UserWarning, match="put into quarantine"):
                real(self, *args)
            real(self, *args)

    with pytest.warns(UserWarning, match="it counts as missing"):
        assert Second(ram / "store").get("k") is None
    assert len(list(store.layout.quarantine.iterdir())) == 1


@pytest.mark.parametrize("what", ["blobs", "entries"])
def test_a_read_only_store_puts_nothing_aside(ram, what):
    put(LocalStore(ram / "store"))
    path = max(
        (path for path in (ram / "store" / what).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    damage(path, flip, random.Random(1))
    with pytest.warns(UserWarning, match="it counts as missing"):
        assert not served(LocalStore(ram / "store", read_only=True))
    assert path.exists()
    assert not (ram / "store" / "quarantine").exists()
