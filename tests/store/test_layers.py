from __future__ import annotations

import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING

import pytest

from smartinit.errors import StoreError
from smartinit.store import Store, layers
from smartinit.store.keys import Key
from smartinit.store.layers import Layer, is_remote, open_place
from smartinit.store.local import LocalStore
from smartinit.store.remote import RemoteStore

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY = Key("artefact", {"a": 1})


@pytest.fixture
def team(tmp_path: Path) -> LocalStore:
    """A folder with an entry."""
    store = LocalStore(tmp_path / "team")
    store.put(KEY, files={"a": b"1" * 100}, tags=["t"])
    return store


@pytest.fixture
def remote(team: LocalStore, tmp_path: Path) -> RemoteStore:
    """The same at a URL."""
    store = RemoteStore(f"memory://{tmp_path.name}-{tmp_path.stat().st_ino}")
    store.send(KEY, team)
    store.transport.calls = 0
    return store


@pytest.fixture(params=["folder", "remote"])
def place(request: pytest.FixtureRequest, team: LocalStore) -> Path | RemoteStore:
    return team.layout.root if request.param == "folder" else request.getfixturevalue("remote")


@pytest.fixture(autouse=True)
def _nothing_told() -> Iterator[None]:
    before = set(layers._told)
    layers._told.clear()
    yield
    layers._told.update(before)


def look(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def test_what_a_layer_has_is_found_and_copied(place: Path | RemoteStore, tmp_path: Path) -> None:
    store = Store(tmp_path / "mine", place)
    assert store.peek(KEY) is not None
    assert KEY in store
    assert KEY not in store.local  # a look copies nothing
    assert list(store.keys()) == list(store.keys("t")) == [KEY.digest]
    entry = store.get(KEY)
    assert entry is not None
    assert entry.files["a"].read_bytes() == b"1" * 100
    assert entry.files["a"].is_relative_to(tmp_path / "mine")
    assert KEY in store.local
    assert list(store.local.keys("t")) == [KEY.digest]
    assert Store(tmp_path / "mine").get(KEY) is not None


def test_the_first_store_goes_first_and_layers_in_order(team: LocalStore, tmp_path: Path) -> None:
    second, mine = LocalStore(tmp_path / "second"), LocalStore(tmp_path / "mine")
    for store, text in ((second, b"second"), (mine, b"mine")):
        store.put("both", files={"a": text})
    team.put("both", files={"a": b"team"})
    second.put("two", files={"a": b"second"})
    team.put("two", files={"a": b"team"})
    store = Store(mine.layout.root, second.layout.root, team.layout.root)
    assert store.get("both").files["a"].read_bytes() == b"mine"
    assert store.get("two").files["a"].read_bytes() == b"second"
    assert sorted(store.keys()) == sorted([KEY.digest, "both", "two"])


def test_a_layer_is_never_written(team: LocalStore, tmp_path: Path) -> None:
    before = look(team.layout.root)
    store = Store(tmp_path / "mine", team.layout.root)
    store.put("new", files={"a": b"1"})
    store.get(KEY)
    store.get("missing")
    list(store.keys())
    store.verify()
    store.prune(0)
    assert look(team.layout.root) == before


def test_a_first_store_that_is_read_only_is_never_written(place: Path | RemoteStore, tmp_path: Path) -> None:
    mine = LocalStore(tmp_path / "mine")
    mine.put("own", files={"a": b"1"})
    before = look(tmp_path / "mine")
    store = Store(tmp_path / "mine", place, read_only=True)
    assert store.get("own") is not None
    entry = store.get(KEY)
    if isinstance(place, RemoteStore):
        assert entry is None  # there is no place where its bytes could be put
    else:
        assert entry is not None
        assert entry.files["a"].is_relative_to(place)
    assert store.peek(KEY) is not None
    assert look(tmp_path / "mine") == before
    with pytest.raises(StoreError, match="read-only"):
        store.put("x", files={"a": b"1"})


def test_a_first_store_that_is_full(team: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "mine", team.layout.root)

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("smartinit.store.durable.os.fsync", no_space)
    with pytest.warns(UserWarning, match="cannot be copied") as told:
        entry = store.get(KEY)
    assert len(told) == 1
    assert entry is not None
    assert entry.files["a"].is_relative_to(team.layout.root)
    monkeypatch.undo()
    assert store.get(KEY).files["a"].is_relative_to(tmp_path / "mine")


@pytest.mark.parametrize("how", ["a file", "newer", "no manifest", "no blob", "entries is a file"])
def test_a_layer_that_is_broken_is_a_layer_less(team: LocalStore, tmp_path: Path, how: str) -> None:
    root = team.layout.root
    broken = tmp_path / "broken"
    if how == "a file":
        broken.write_text("x")
    else:
        LocalStore(broken).put(KEY, files={"a": b"2" * 100})
    if how == "newer":
        (broken / "smartinit-store.json").chmod(0o644)
        (broken / "smartinit-store.json").write_text('{"schema": 2}')
    elif how == "no manifest":
        path = broken / "entries" / f"{KEY}.json"
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:50])
    elif how == "no blob":
        for path in (broken / "blobs").rglob("*"):
            if path.is_file():
                path.chmod(0o644)
                path.write_bytes(b"3" * 100)
    elif how == "entries is a file":
        (broken / "entries").rename(broken / "gone")
        (broken / "entries").write_text("x")
    store = Store(tmp_path / "mine", broken, root)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        entry = store.get(KEY)
        assert sorted(store.keys()) == [KEY.digest]
    assert entry.files["a"].read_bytes() == b"1" * 100
    assert len(told) == (0 if how == "entries is a file" else 1), [str(w.message) for w in told]


def test_a_layer_that_comes_and_goes(team: LocalStore, tmp_path: Path) -> None:
    root = team.layout.root
    store = Store(tmp_path / "mine", root)
    root.rename(tmp_path / "away")
    assert store.get(KEY) is None
    (tmp_path / "away").rename(root)
    assert store.get(KEY) is not None


def test_what_is_broken_here_is_fetched_anew(place: Path | RemoteStore, tmp_path: Path) -> None:
    store = Store(tmp_path / "mine", place)
    path = store.get(KEY).files["a"]
    path.chmod(0o644)
    path.write_bytes(b"2" * 100)
    with pytest.warns(UserWarning, match="put into quarantine"):
        entry = store.get(KEY)
    assert entry.files["a"].read_bytes() == b"1" * 100


# --- a remote layer is asked little ----------------------------------------------------------------------------------


def test_many_missing_keys_cost_few_questions(remote: RemoteStore, tmp_path: Path) -> None:
    store = Store(tmp_path / "mine", remote)
    for _ in range(5):
        for number in range(500):
            assert store.peek(f"missing-{number}") is None
            assert store.get(f"missing-{number}") is None
            assert f"missing-{number}" not in store
    assert remote.transport.calls <= layers._SINGLY + 1  # a few keys, and the list
    assert store.get(KEY) is not None


def test_many_looks_at_one_key_cost_one_question(remote: RemoteStore, tmp_path: Path) -> None:
    store = Store(tmp_path / "mine", remote)
    for _ in range(100):
        assert store.peek(KEY) is not None
        assert list(store.keys("t")) == [KEY.digest]
        assert list(store.keys("u")) == []
        assert list(store.keys()) == [KEY.digest]
    assert remote.transport.calls == 1 + 3
    store.get(KEY)
    assert remote.transport.calls == 4 + 1  # its blob
    for _ in range(100):
        store.get(KEY)
        store.peek(KEY)
    assert remote.transport.calls == 5


def test_what_others_add_is_seen_after_a_minute(
    remote: RemoteStore, team: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "mine", remote)
    for number in range(100):
        store.peek(f"missing-{number}")
    team.put("missing-1", files={"a": b"1"}, tags=["t"])
    assert list(store.keys("t")) == [KEY.digest]
    remote.send("missing-1", team)
    now = time.monotonic()
    monkeypatch.setattr(layers.time, "monotonic", lambda: now + layers.HOLDS_SECONDS / 2)
    assert store.peek("missing-1") is None
    monkeypatch.setattr(layers.time, "monotonic", lambda: now + 2 * layers.HOLDS_SECONDS)
    assert sorted(store.keys("t")) == sorted([KEY.digest, "missing-1"])
    assert store.get("missing-1") is not None


def test_a_layer_that_cannot_be_listed_is_asked_for_each_key(
    remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "_MOST_LISTED", 0)  # too many to be kept
    store = Store(tmp_path / "mine", remote)
    for number in range(50):
        assert store.peek(f"missing-{number}") is None
    assert remote.transport.calls == 50 + 1
    assert store.get(KEY) is not None


def test_a_layer_that_was_away_is_asked_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = RemoteStore("webdav://127.0.0.1:9/x", timeout=20, attempts=1)
    store = Store(tmp_path / "mine", remote)
    now = time.monotonic()

    def look_after(*seconds: float) -> None:
        for moment in seconds:
            monkeypatch.setattr(layers.time, "monotonic", lambda moment=moment: now + moment)
            assert store.get(KEY) is None

    with pytest.warns(UserWarning, match="going on without this layer") as told:
        look_after(0, 1, 59, 61, 62, 100, 300, 302, 303, 1000, 1203, 1300)
    assert len(told) == 1
    assert remote.transport.calls == 4  # at 0, 61, 302 and 1203 s: after pauses of 60, 240 and 900


# --- places ----------------------------------------------------------------------------------------------------------


def test_an_address_as_the_first_store_is_a_layer_of_the_default_one(
    remote: RemoteStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    url = remote.transport.url
    monkeypatch.setenv("SMARTINIT_CACHE", str(tmp_path / "of the environment"))
    store = Store(url)
    assert store.local.layout.root == tmp_path / "of the environment"
    assert store.get(KEY).files["a"].is_relative_to(tmp_path / "of the environment")
    monkeypatch.setenv("SMARTINIT_CACHE", url)
    for store in (Store(), Store(url)):
        assert store.local.layout.root == tmp_path / "cache"
        assert store.peek(KEY) is not None
    monkeypatch.delenv("SMARTINIT_CACHE")
    assert Store().local.layout.root == tmp_path / "cache"
    assert Store().layers == []


def test_what_places_are(tmp_path: Path) -> None:
    assert open_place(tmp_path.as_uri()).layout.root == tmp_path
    assert open_place(str(tmp_path)).layout.root == tmp_path
    assert open_place(tmp_path).layout.root == tmp_path
    assert isinstance(open_place("s3://bucket/x"), RemoteStore)
    assert is_remote("s3://bucket/x")
    assert not any(is_remote(place) for place in ("C:\\stores", "x:y", "a/b", tmp_path, "file:///x", tmp_path.as_uri()))
    with pytest.raises(StoreError, match="chains protocols"):
        open_place("simplecache::s3://bucket/x")
    with pytest.raises(StoreError, match="three slashes"):
        open_place("file://host/x")


def test_a_layer_is_shown_without_secrets() -> None:
    assert "word" not in repr(Layer("webdav://me:word@host/x"))
    assert "word" not in repr(Layer(RemoteStore("webdav://me:word@host/x")))


def test_without_layers_nothing_of_the_network_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from smartinit.store import Store; s = Store(sys.argv[1], 's3://bucket/x');"
        "s.put('k', files={'a': b'1'}); s.get('k'); s.peek('k');"
        "print([m for m in ('torch', 'fsspec', 's3fs', 'aiohttp', 'cryptography', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "mine")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
