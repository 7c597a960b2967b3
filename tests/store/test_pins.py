from __future__ import annotations

import errno
import os

import pytest

from smartinit.errors import ConfigError, NotStoredError, StoreError
from smartinit.store import Key, Store, durable
from smartinit.store.pins import pin, pinned_keys, unpin


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_pins_come_and_go(store):
    key = Key("kind", {"a": 1})
    store.put(key, files={"x": b"1"})
    store.put("b", files={"x": b"1"})
    pin(store.local, key)
    store.pin(key)
    store.pin("b")
    assert pinned_keys(store.local.layout) == {key.digest, "b"}
    assert unpin(store.local, key) is True
    assert unpin(store.local, key) is False
    assert pinned_keys(store.local.layout) == {"b"}
    store.local.remove("b")
    assert pinned_keys(store.local.layout) == set()


def test_only_what_is_there_can_be_pinned(store):
    assert pinned_keys(store.local.layout) == set()
    with pytest.raises(NotStoredError, match="'a' is not in the store"):
        store.pin("a")
    with pytest.raises(ConfigError, match="no key"):
        store.pin("../a")
    store.unpin("a")
    assert not store.local.layout.root.exists()


def test_a_store_that_cannot_be_written(store, tmp_path, monkeypatch):
    store.put("a", files={"x": b"1"})
    store.pin("a")
    watched = Store(tmp_path / "store", read_only=True)
    for change in (watched.pin, watched.unpin):
        with pytest.raises(StoreError, match="read-only"):
            change("a")

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(durable, "touch", refuse)
    monkeypatch.setattr(durable, "remove", refuse)
    for change in (store.pin, store.unpin):
        with pytest.raises(StoreError, match=r"cannot (un)?pin 'a' in .*: Read-only file system"):
            change("a")


def test_strange_names_are_no_pins(store):
    store.put("a", files={"x": b"1"})
    store.pin("a")
    (store.local.layout.pins / "NO KEY").touch()
    assert pinned_keys(store.local.layout) == {"a"}
