from __future__ import annotations

import pytest

from smartinit.errors import StoreError
from smartinit.store import Key, Store
from smartinit.store import requests as module
from smartinit.store.requests import library_versions, missed, recall, remember

LEAVES = {"model": {"tensors": "a" * 64}, "data": {"files": ["b" * 64]}, "adapter": {"r": 8}}
ARTEFACT, FIRST = "1" * 64, "2" * 64


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


@pytest.fixture
def versions(monkeypatch):
    """Pretend other libraries."""

    def pretend(**found):
        monkeypatch.setattr(module, "library_versions", lambda: found)

    return pretend


def test_what_was_remembered_is_recalled(store):
    assert recall(store, LEAVES) is None
    remember(store, LEAVES, ARTEFACT, first=FIRST, about={"task_type": "CAUSAL_LM"})
    found = recall(store, LEAVES)
    assert (found.artefact, found.first, found.certain) == (ARTEFACT, FIRST, True)
    assert found.about == {"task_type": "CAUSAL_LM"}
    assert found.versions == library_versions()
    assert recall(store, {**LEAVES, "adapter": {"r": 9}}) is None


def test_other_versions_make_it_a_guess(store, versions):
    remember(store, LEAVES, ARTEFACT, first=FIRST)
    versions(torch="9.9")
    guess = recall(store, LEAVES)
    assert (guess.artefact, guess.certain) == (ARTEFACT, False)
    remember(store, LEAVES, "3" * 64)
    assert (recall(store, LEAVES).artefact, recall(store, LEAVES).certain) == ("3" * 64, True)


def test_another_version_of_this_package_is_another_request(store, monkeypatch):
    remember(store, LEAVES, ARTEFACT)
    monkeypatch.setattr(module, "__version__", "999")
    assert recall(store, LEAVES) is None


def test_the_newest_artefact_counts(store):
    remember(store, LEAVES, ARTEFACT)
    remember(store, LEAVES, "3" * 64)
    assert recall(store, LEAVES).artefact == "3" * 64


def test_remembering_the_same_again_writes_nothing(store):
    remember(store, LEAVES, ARTEFACT)
    (path,) = store.local.layout.entries.iterdir()
    before = path.stat()
    remember(store, LEAVES, ARTEFACT)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_a_miss_names_the_nearest_request(store):
    assert missed(store, LEAVES) == "the store remembers no request to compare this one with"
    remember(store, {**LEAVES, "adapter": {"r": 16}}, ARTEFACT)
    assert missed(store, LEAVES) == "the nearest request (artefact 111111111111) differs in adapter.r (8, there 16)"
    remember(store, LEAVES, ARTEFACT)
    assert missed(store, LEAVES) == "the same request was made before, but its artefact is gone"


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"artefact": "../../etc/passwd", "first": None, "about": {}},
        {"artefact": ARTEFACT, "first": "x", "about": {}},
        {"artefact": ARTEFACT, "first": None, "about": 3},
        {"artefact": [ARTEFACT], "first": None, "about": {}},
    ],
)
def test_entries_that_say_something_else_are_not_believed(store, meta):
    remember(store, LEAVES, ARTEFACT)
    (name,) = store.keys()
    manifest = store.peek(name)
    store.put(Key(manifest.kind, manifest.leaves), meta=meta, tags=manifest.tags, replace=True)
    assert recall(store, LEAVES) is None


def test_an_entry_under_another_name_is_not_believed(store, versions):
    remember(store, LEAVES, ARTEFACT)
    manifest = store.peek(next(store.keys()))
    versions(torch="9.9")
    liar = Key("request", {**manifest.leaves, "adapter": {"r": 9}})
    store.put(liar, meta={**manifest.meta, "artefact": "4" * 64}, tags=manifest.tags)
    assert recall(store, LEAVES).artefact == ARTEFACT


def test_a_store_that_is_only_read(store, tmp_path):
    remember(store, LEAVES, ARTEFACT)
    reading = Store(tmp_path / "cache", read_only=True)
    assert recall(reading, LEAVES).certain
    with pytest.raises(StoreError, match="read-only"):
        remember(reading, LEAVES, "3" * 64)
