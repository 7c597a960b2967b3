from __future__ import annotations

import os

import pytest

from smartinit.errors import ArgumentError, ConfigError, NotStoredError
from smartinit.recipe import Recipe
from smartinit.store import Key, Store
from smartinit.store import explain as explaining
from smartinit.store.explain import describe, explain, folded, keyed, nearest, nearest_recipe, recent, shown
from smartinit.store.naming import find_key


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache")


def key(rank=16, model="a" * 64, kind="artefact", **more):
    return Key(kind, {"plan": {"rank": rank, "alpha": 32}, "model": model, "layers": [0, 1], **more})


def test_what_is_there(store):
    store.put(key(), meta={})
    assert explain(store, key()) == f"the store has artefact {key().digest[:12]}"
    assert explain(store, key().digest[:8]).startswith(
        f"the store has artefact {key().digest[:12]}: 0 bytes in 0 files"
    )
    assert store.explain(key()) == explain(store, key())


def test_a_miss_names_the_leaf_that_differs_from_the_nearest(store):
    for number, stored in enumerate((key(rank=8), key(rank=8, model="b" * 64))):
        store.put(stored)
        store.get(stored).close()
        os.utime(store.local.layout.used / stored.digest, (number, number))  # the nearest is not the one used last
    text = explain(store, key())
    assert text == (
        f"the store does not have artefact {key().digest[:12]}; the nearest, {key(rank=8).digest[:12]}, differs in "
        "1 leaf: plan.rank (16, there 8)"
    )
    manifest, found = nearest(store, key(rank=4, layers=[0, 2]))
    assert manifest.key == key(rank=8).digest
    assert found == [("plan.rank", 4, 8), ("layers[1]", 2, 1)]


def test_digests_are_cut_and_nothing_of_a_leaf_reaches_the_terminal(store):
    store.put(key(model="b" * 64, name="\x1b[2Jgone"))
    text = explain(store, key(name=""))
    assert 'model (aaaaaaaaaaaa…, there bbbbbbbbbbbb…), name ("", there "\\u001b[2Jgone")' in text
    assert len(shown(list(range(100)))) == 41


def test_leaves_of_many_layers_are_one_line_and_short_paths_come_first(store):
    def of(rank, other):
        ranks = {f"layers.{i}.q": rank for i in range(3)} | {"layers.3.q": other}
        return Key("artefact", {"alphas": ranks, "config": {"r": rank}})

    store.put(of(4, 5))
    found = nearest(store, of(8, 9))[1]
    assert folded(found) == [("config.r", 8, 4), ("alphas.layers.*.q (3×)", 8, 4), ("alphas.layers.3.q", 9, 5)]
    assert describe(found).startswith("config.r (8, there 4), alphas.layers.*.q (3×) (8, there 4), ")
    assert describe(found, most=1) == "config.r (8, there 4) and 2 more"


def test_itself_need_not_count(store):
    store.put(key())
    assert nearest(store, key(), but=key().digest) is None
    store.put(key(rank=8))
    assert nearest(store, key(), but=key().digest)[0].key == key(rank=8).digest


def test_only_entries_of_the_same_kind_are_compared(store):
    store.put(key(rank=8, kind="spectrum"))
    assert nearest(store, key()) is None
    assert explain(store, key()).endswith(", and no other entry of that kind")
    store.put(key(rank=2), tags=["artefact"])
    assert nearest(store, key())[0].key == key(rank=2).digest
    store.put(key(rank=8))  # without a tag it is not among those that are looked at
    assert [manifest.leaves["plan"]["rank"] for manifest in recent(store, "artefact")] == [2]


def test_of_equally_near_ones_the_one_used_last(store):
    for age, rank in enumerate((2, 4, 8)):
        store.put(key(rank=rank))
        store.get(key(rank=rank)).close()
        os.utime(store.local.layout.used / key(rank=rank).digest, (1000 - age, 1000 - age))
    assert nearest(store, key())[0].leaves["plan"]["rank"] == 2


def test_no_more_are_read_than_the_bound(store, monkeypatch):
    monkeypatch.setattr(explaining, "MOST", 3)
    for rank in range(1, 7):
        store.put(key(rank=rank))
        store.get(key(rank=rank)).close()
        os.utime(store.local.layout.used / key(rank=rank).digest, (rank, rank))
    assert [manifest.leaves["plan"]["rank"] for manifest in recent(store, "artefact")] == [6, 5, 4]


def test_a_broken_manifest_is_not_compared(store):
    store.put(key(rank=8))
    path = store.local.layout.entry(key(rank=8).digest)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="quarantine"):
        assert nearest(store, key()) is None


def recipe(**changes):
    values = {
        "method": "eva", "options": {"whiten": False}, "planner": {"ranks": {"q": 8}}, "targets": ("q",),
        "sampling": {"tau": 0.99, "max_batches": 4}, "numerics": {"state": "float32"}, "seed": 0, "version": "1",
    }  # fmt: skip
    return Recipe(**(values | changes))


def test_recipes_are_compared_by_what_stands_in_the_key(store):
    assert explain(store, recipe()) == "the store has no artefact to compare the recipe with"
    stored = Key("artefact", {**keyed(recipe().as_dict()), "model": "a" * 64, "alphas": {"q": 8}})
    store.put(stored)
    for same in (recipe(), recipe(version="2"), recipe(sampling={"tau": 0.99, "max_batches": 8})):
        assert "of the same recipe" in explain(store, same)
    assert nearest_recipe(store, recipe(seed=1).as_dict())[1] == [("seed", 1, 0)]
    assert explain(store, recipe(seed=1)).endswith("differs in 1 leaf: seed (1, there 0)")


def test_what_is_no_request(store):
    with pytest.raises(ArgumentError, match="a request is a Key"):
        explain(store, 3)


def test_names_of_keys(store):
    assert explain(store, "abcdef") == "the store has no entry 'abcdef'; `smartinit cache ls` lists what it has"
    for name in ("abcdef1", "abcdef2", "short"):
        store.put(name)
    assert find_key(store, "abcdef1") == "abcdef1"
    assert find_key(store, "short") == "short"
    store.put("fedcba987")
    assert find_key(store, "fedcba") == "fedcba987"
    with pytest.raises(ConfigError, match="2 keys begin with 'abcdef': abcdef1, abcdef2; give more letters"):
        find_key(store, "abcdef")
    with pytest.raises(ConfigError, match="too short"):
        find_key(store, "fed")
    with pytest.raises(NotStoredError, match="no entry '123456'"):
        find_key(store, "123456")
    with pytest.raises(ConfigError, match="is no key"):
        find_key(store, "../../etc/passwd")
