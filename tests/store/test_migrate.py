from __future__ import annotations

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from smartinit.errors import StoreError
from smartinit.store import Key, Store
from smartinit.store.keys import SCHEMA
from smartinit.store.layout import Layout
from smartinit.store.manifest import Manifest
from smartinit.store.migrate import MIGRATIONS, found_schema, migrate
from smartinit.store.verify import verify


@pytest.fixture
def layout(tmp_path):
    """A store as schema 0 might have been: one file per entry, named by its leaves, and no digests."""
    layout = Layout(tmp_path / "store")
    layout.root.mkdir()
    layout.schema.write_text('{"schema": 0}\n')
    old = layout.root / "old"
    old.mkdir()
    for number in range(5):
        (old / f"{number}.json").write_text(json.dumps({"number": number}))
    return layout


def zero_to_one(layout):
    """Every old file becomes an entry; what is done already is left alone."""
    for path in sorted((layout.root / "old").glob("*.json")):
        leaves = json.loads(path.read_text())
        manifest = Manifest(key=Key("number", leaves).digest, kind="number", leaves=leaves, blobs={})
        layout.entries.mkdir(exist_ok=True)
        layout.entry(manifest.key).write_bytes(manifest.to_bytes())
        path.unlink()


def test_a_store_of_an_older_schema_is_refused_until_it_is_migrated(layout):
    with pytest.raises(StoreError, match="smartinit cache migrate"):
        Store(layout.root)
    assert migrate(layout, migrations={0: zero_to_one}) == (0, 1)
    assert found_schema(layout) == SCHEMA == 1
    store = Store(layout.root)
    assert all(store.peek(Key("number", {"number": number})) for number in range(5))
    assert verify(store.local) == []
    assert migrate(layout, migrations={0: zero_to_one}) == (1, 1)


def test_a_migration_that_was_interrupted_is_run_again(layout):
    seen = []

    def killed(layout):
        files = sorted((layout.root / "old").glob("*.json"))
        for path in files[3:]:
            path.rename(path.with_suffix(".later"))
        zero_to_one(layout)
        for path in (layout.root / "old").glob("*.later"):
            path.rename(path.with_suffix(".json"))
        seen.append(len(list(layout.entries.iterdir())))
        raise OSError(5, "Input/output error")

    with pytest.raises(StoreError, match="Input/output error; run it again"):
        migrate(layout, migrations={0: killed})
    assert seen == [3]
    assert found_schema(layout) == 0, "the number comes last"
    assert migrate(layout, migrations={0: zero_to_one}) == (0, 1)
    assert len(list(Store(layout.root).keys())) == 5


def test_several_schemas_one_after_the_other(layout):
    steps = []
    ways = {number: lambda layout, number=number: steps.append((number, found_schema(layout))) for number in range(3)}
    assert migrate(layout, migrations=ways, target=3) == (0, 3)
    assert steps == [(0, 0), (1, 1), (2, 2)]
    assert found_schema(layout) == 3


def test_a_newer_schema_and_one_without_a_way(layout):
    assert dict(MIGRATIONS) == {}, "there is no older schema yet"
    with pytest.raises(StoreError, match="no way leads from 0 to 1"):
        migrate(layout)
    with pytest.raises(StoreError, match="no way leads from 1 to 2"):
        migrate(layout, migrations={0: zero_to_one}, target=2)
    layout.schema.write_text('{"schema": 7}')
    with pytest.raises(StoreError, match="upgrade smartinit"):
        migrate(layout, migrations={0: zero_to_one})
    assert len(list((layout.root / "old").iterdir())) == 5


def test_no_store_and_one_of_this_version(tmp_path):
    layout = Layout(tmp_path / "none")
    assert found_schema(layout) is None
    assert migrate(layout) == (1, 1)
    assert not layout.root.exists()
    store = Store(tmp_path / "one")
    store.put("a", meta={})
    assert migrate(store.local.layout) == (1, 1)
    store.local.layout.schema.unlink()
    assert found_schema(store.local.layout) == 1, "keys and manifests have the number too"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"schema": "1"}', '{"schema": true}', "[" * 100_000])
def test_a_store_that_does_not_say(layout, content):
    layout.schema.write_text(content)
    with pytest.raises(StoreError, match="does not say which schema"):
        migrate(layout, migrations={0: zero_to_one})


def slow(layout):
    """A migration in another process that is under way until it is told to end."""
    (layout.root / "begun").touch()
    end = time.monotonic() + 60
    while not (layout.root / "end").exists() and time.monotonic() < end:
        time.sleep(0.01)


def run_slowly(root):
    migrate(Layout(Path(root)), migrations={0: slow})


def test_two_at_once(layout):
    process = multiprocessing.get_context("fork").Process(target=run_slowly, args=(str(layout.root),))
    process.start()
    try:
        end = time.monotonic() + 60
        while not (layout.root / "begun").exists() and time.monotonic() < end:
            time.sleep(0.01)
        with pytest.raises(StoreError, match="another process migrates"):
            migrate(layout, migrations={0: zero_to_one}, wait=0.1)
        (layout.root / "end").touch()
        assert migrate(layout, migrations={0: zero_to_one}, wait=60) == (0, 1)
    finally:
        (layout.root / "end").touch()
        process.join(timeout=60)
    assert process.exitcode == 0
    assert len(list((layout.root / "old").iterdir())) == 5, "who came second found it done"
